// Which matrices a MoE step reads, and for which tokens: found by every CTA of experts.cu from the ids, so that tokens
// that picked one expert share the read of its matrices.
//
// The first groups are of as many tokens of the shared expert as a group holds: they are known without the ids. Each of the others is one
// expert with up to `columns` of the slots that picked it, of different tokens. Slots of weight zero belong to no group. The order of
// groups follows the routing of all tokens; nothing that a token is given depends on it.
#pragma once

#include "tile.cuh"

namespace dsv4 {

constexpr int kMaxSlots = 128;                            // tokens * experts per token
constexpr int kMaxTokens = 16;
constexpr int kMaxGroups = kMaxSlots + kMaxTokens;

struct alignas(16) Groups {
  float weight[kMaxSlots];              // of each slot, as given
  int key[kMaxSlots];                   // expert and repetition, -1 for a slot of weight zero
  int starts[kMaxSlots];                // what names its group (`id`), if the slot is the first there, else -1
  int matrix[kMaxGroups];               // expert; 0 for the shared one
  int count[kMaxGroups];
  uint8_t member[kMaxGroups][kColumns]; // slot r * slots + x; of the shared expert's groups token r
  int shared, all;                      // groups of the shared expert come first
};

// From L2: what no earlier launch of this multiprocessor has left in L1.
template <class T>
DSV4_D T early(const T* from) { return __ldcg(from); }

// Groups of the shared expert.
DSV4_D int shared_groups(bool shared, int rows, int columns) { return shared ? (rows + columns - 1) / columns : 0; }

// The same for at most 32 slots: one warp finds out by votes.
DSV4_D void find_few_groups(Groups& g, const int* ids, const float* weights, int rows, int slots, int experts, int of_shared, int columns) {
  const int lane = lane_id();
  for (int i = threadIdx.x; i < kMaxGroups; i += kTileThreads) g.count[i] = 0;
  __syncthreads();
  if (warp_id() == 0) {
    constexpr uint32_t kAll = 0xFFFFFFFFu;
    const bool there = lane < rows * slots;
    const float weight = there ? early(weights + lane) : 0.0f;
    const int id = there ? early(ids + lane) : 0, expert = weight != 0.0f ? min(max(id, 0), experts - 1) : -1;
    const uint32_t before = (1u << lane) - 1, of_row = (kAll >> (32 - slots)) << (there ? lane / slots * slots : 0);
    const int repeats = __popc(__match_any_sync(kAll, expert) & of_row & before), key = expert < 0 ? -1 : expert + repeats * experts;
    uint32_t same = __match_any_sync(kAll, key);
    const int rank = __popc(same & before);
    for (int i = rank / columns * columns; i > 0; --i) same &= same - 1;  // what is left starts with the first of this group
    const bool starts = expert >= 0 && rank % columns == 0;
    const uint32_t all = __ballot_sync(kAll, starts);
    if (there) g.weight[lane] = weight;
    if (expert >= 0) {
      const int group = of_shared + __popc(all & ((same & -same) - 1));
      g.member[group][rank % columns] = uint8_t(lane);
      atomicAdd(&g.count[group], 1);
      if (starts) g.matrix[group] = expert;
    }
    if (lane == 0) g.shared = of_shared, g.all = of_shared + __popc(all);
  } else if (of_shared && int(threadIdx.x) - 32 < rows) {
    const int token = int(threadIdx.x) - 32, group = token / columns;
    g.member[group][token % columns] = uint8_t(token);
    atomicAdd(&g.count[group], 1);
    if (token % columns == 0) g.matrix[group] = 0;
  }
  __syncthreads();
}

// The same for one token with a shared expert and at most 32 slots, by one warp.
DSV4_D void find_picks(Groups& g, const int* ids, const float* weights, int slots, int experts) {
  const int lane = lane_id();
  const bool there = lane < slots;
  const float weight = there ? early(weights + lane) : 0.0f;
  const int id = there ? early(ids + lane) : 0;
  const uint32_t active = __ballot_sync(0xFFFFFFFFu, weight != 0.0f);
  if (there) g.weight[lane] = weight;
  if (weight != 0.0f) {
    const int group = 1 + __popc(active & ((1u << lane) - 1));
    g.matrix[group] = min(max(id, 0), experts - 1);
    g.count[group] = 1;
    g.member[group][0] = uint8_t(lane);
  }
  if (lane == 0) {
    g.matrix[0] = 0, g.count[0] = 1, g.member[0][0] = 0;
    g.shared = 1, g.all = 1 + __popc(active);
  }
}

// Four neighbouring threads: use(q, words[q]) for every q < count, each by one of them.
template <class Use>
DSV4_D void each_of_four(const int (&words)[kMaxSlots], int count, int part, const Use& use) {
  for (int q = 4 * part; q < count; q += 16) {
    const int4 four = reinterpret_cast<const int4*>(words)[q / 4];
    use(q, four.x), use(q + 1, four.y), use(q + 2, four.z), use(q + 3, four.w);
  }
}

// All threads of the CTA. ids int32, weights fp32 [rows, slots], of `experts` experts; ids outside are clipped.
DSV4_D void find_groups(Groups& g, const int* ids, const float* weights, int rows, int slots, int experts, bool shared, int columns) {
  static_assert(kTileThreads == 4 * kMaxSlots);
  const int t = threadIdx.x, pairs = rows * slots, of_shared = shared_groups(shared, rows, columns);
  if (pairs <= 32) return find_few_groups(g, ids, weights, rows, slots, experts, of_shared, columns);
  const int slot = t / 4, part = t % 4;  // four threads to a slot: each looks at every fourth of the others
  const bool there = slot < pairs, one = part == 0;
  const float weight = there ? early(weights + slot) : 0.0f;
  const int expert = weight != 0.0f ? min(max(early(ids + slot), 0), experts - 1) : -1;
  if (one) g.weight[slot] = weight, g.key[slot] = expert;
  for (int i = t; i < kMaxGroups; i += kTileThreads) g.count[i] = 0;
  __syncthreads();
  int repeats = 0;  // an expert that a token picked twice is another group for the second time
  for (int q = slot / slots * slots + part; q < slot; q += 4) repeats += g.key[q] == expert;
  repeats = warp_sum<4>(repeats);
  const int key = expert < 0 ? -1 : expert + repeats * experts;
  __syncthreads();
  if (one) g.key[slot] = key;
  __syncthreads();
  int rank = 0;
  each_of_four(g.key, pairs, part, [&](int q, int other) { rank += q < slot && other == key; });
  rank = warp_sum<4>(rank);
  const int id = key * kMaxSlots + rank / columns;  // of the group
  const bool starts = expert >= 0 && rank % columns == 0;
  if (one) g.starts[slot] = starts ? id : -1;
  const int routed = __syncthreads_count(starts && one);
  int first = 0, before = 0;
  each_of_four(g.starts, pairs, part, [&](int q, int other) { first += other == id ? q : 0; });
  first = warp_sum<4>(first);
  each_of_four(g.starts, pairs, part, [&](int q, int other) { before += q < first && other >= 0; });
  before = warp_sum<4>(before);
  if (one && expert >= 0) {
    const int group = of_shared + before;
    g.member[group][rank % columns] = uint8_t(slot);
    atomicAdd(&g.count[group], 1);
    if (starts) g.matrix[group] = expert;
  }
  if (t < rows && of_shared) {
    const int group = t / columns;
    g.member[group][t % columns] = uint8_t(t);
    atomicAdd(&g.count[group], 1);
    if (t % columns == 0) g.matrix[group] = 0;
  }
  if (t == 0) g.shared = of_shared, g.all = of_shared + routed;
  __syncthreads();
}

}  // namespace dsv4
