// Attention of 1..4 new tokens per sequence over the window and the chosen compressed entries, from a query to the
// rotated-back output. Contract: ffi_kernels/decode_attention.py.
//
// The keys of a token are divided into parts, each with an online softmax of its own; a CTA takes one of them, or four, for a group of
// heads, and those of a cluster of C CTAs are merged by distributed shared memory. Many keys have several clusters, and a second
// launch, decode_attention_join, adds up what these leave (attention_join.cuh). Grid (C clusters, head groups, B T), cluster (C, 1, 1).
// For each tile of 80 keys:
//   product with K   a pair of slices (128 channels) has kSplit warps of a team, which take groups of 8 keys in turn: stored bytes
//                    -> bf16 fragments in registers -> partial scores; the bf16 entries stay in shared memory
//   softmax          sum of the partial scores in channel order, running maximum and sum of each head
//   product with V   a warp has 128 / kSplit channels and all keys
// A CTA may serve several groups of heads in turn; entries that fit in one tile are then decoded once.
// Each token and head goes through the same sums in the same order whatever else is in the launch, in every mapping: up to four
// neighbouring parts are a chain, each added to the sum before it (Link), and the chains of a cluster are added in order.
#include "attention_join.cuh"
#include "attention_tile.cuh"
#include "dependent.cuh"

namespace dsv4 {
namespace {

// Leaves the output of the team, where the entries were or behind them, for the merge. `turn` counts its parts.
template <int kHeadTiles, int kSplit>
DSV4_D void store_output(const AttentionParams& p, const Role<kSplit>& role, int turn, const float (&out)[kHeadTiles][kPart<kSplit> / 8][4]) {
  constexpr int width = kPart<kSplit>;
  const int channel = role.warp * width + (2 * role.c & ~3);
  const uint32_t to = role.base + p.output + turn * 64 * kHeadTiles * p.channels + output_at<16 * kHeadTiles, kSplit>(role.g, channel) + (2 * role.c & 2) * 4;
#pragma unroll
  for (int m = 0; m < kHeadTiles; ++m)
#pragma unroll
    for (int n = 0; n < width / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        in_shared<float2>((to ^ (32 * n)) + (16 * m + 8 * i) * width * 4) = {out[m][n][2 * i], out[m][n][2 * i + 1]};
}

// A part to a CTA, all warps at one tile.
template <bool kFp8, int kHeadTiles>
DSV4_D void attend(const AttentionParams& p) {
  constexpr int heads = 16 * kHeadTiles;
  const Role<4> role(p);
  const int row = blockIdx.z, place = blockIdx.x, thread = threadIdx.x;
  const auto [sequence, token] = Token(p, row);
  Part part(p, token, place);
  const bool locates = thread < kTileKeys;  // entry `thread` of each tile
  int pick = locates ? load_pick(p, part, row, thread) : -1;  // in flight together with start and length
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  if (token >= length) return store_nothing<heads>(p, row, rank_of(p));
  part.set_position(p, start, place);
  const int count = part.count(), tiles = (count + kTileKeys - 1) / kTileKeys;
  load_constants(p, row, heads);
#pragma unroll 1
  for (int pass = 0; pass < p.passes; ++pass) {
    const int first_head = (int(blockIdx.y) * p.passes + pass) * heads;
    const bool decoded = pass > 0 && p.stages == 1;  // the first pass left the one tile in bf16
    uint32_t scales[kRounds<4>] = {};
    if (!decoded) {
      if (locates) {
        in_shared<Entry>(p.rows + thread * sizeof(Entry)) = locate(p, part_anew(p, place), sequence, thread, pick);
        pick = load_pick(p, part_anew(p, place), row, kTileKeys + thread);
      }
      __syncthreads();
      load_tile<kFp8>(p, role, 0, keys_of_tile(count, 0), scales);
    }
    float out[kHeadTiles][kPart<4> / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = p.stages == 2 ? tile & 1 : 0, keys = keys_of_tile(count, tile);
      if (locates && tile + 1 < tiles) {
        const Part part = part_anew(p, place);
        const int key = (tile + 1) * kTileKeys + thread;
        in_shared<Entry>(p.rows + (((tile + 1) & 1) * kTileKeys + thread) * sizeof(Entry)) = locate(p, part, sequence, key, pick);
        pick = load_pick(p, part, row, key + kTileKeys);
      }
      multiply_keys<kFp8, kHeadTiles>(p, role, row, first_head, stage, keys, decoded, scales);
      __syncthreads();
      if (tile + 1 < tiles) load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 1), scales);
      uint32_t early[kTileKeys / 16][kPart<4> / 16][4];
#pragma unroll
      for (int n = 0; n < kEarlyGroups<kHeadTiles, 4>; ++n)
        if (16 * n < keys) load_values(p, role, stage, n, early[n]);
      softmax_tile<heads, 32 / kHeadTiles>(p, role, 0, tile, tile == 0, keys);
      __syncthreads();
      multiply_values<kHeadTiles>(p, role, tile == 0, stage, keys, early, out);
    }

    copy_async_wait<0>();
    __syncthreads();  // the entries have been read: the output may take their place
    store_output<kHeadTiles>(p, role, 0, out);
    if (!tiles && thread < heads) in_shared<float>(p.largest + 4 * thread) = -infinity(), in_shared<float>(p.total + 4 * thread) = 0.0f;
    cluster_sync();
    merge<heads, 4>(p, row, first_head, pass, rank_of(p));
    if (pass + 1 < p.passes && locates) pick = load_pick(p, part_anew(p, place), row, thread);
    cluster_wait();  // nobody goes on while others read from it
  }
}

// Two parts of one tile to each of two teams of a CTA: while one waits for entries or for its softmax, the other multiplies.
template <bool kFp8>
DSV4_D void attend_in_teams(const AttentionParams& p) {
  constexpr int heads = 16, width = kPart<2> / 8;
  const Role<2> role(p);
  const int row = blockIdx.z, first_head = int(blockIdx.y) * heads, first = 2 * (2 * int(blockIdx.x) + role.team), thread = role.thread;
  const auto [sequence, token] = Token(p, row);
  const bool locates = thread < kTileKeys;
  int pick = locates ? load_pick(p, Part(p, token, first), row, thread) : -1;
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  if (token >= length) return store_nothing<heads>(p, row, rank_of(p));
  load_constants(p, row, heads);
  Part part(p, token, first);
  part.set_position(p, start, first);
  const int keys = keys_of_tile(part.count(), 0);  // the second part has no more
  uint32_t scales[kRounds<2>] = {};
  if (locates) in_shared<Entry>(role.base + p.rows + thread * sizeof(Entry)) = locate(p, part, sequence, thread, pick);
  role.sync(p);
  load_tile<kFp8>(p, role, 0, keys, scales);
  float out[1][width][4] = {};     // of this part
  volatile float other[width][4];  // of the one before: in local memory, because registers are short
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const bool last = turn == 1;
    if (locates && !last) pick = load_pick(p, Part(p, token, first + 1), row, thread);
    multiply_keys<kFp8, 1>(p, role, row, first_head, 0, keys, false, scales);
    role.sync(p);
    if (locates && !last) {
      const Entry entry = locate(p, part_anew(p, first + 1), sequence, thread, pick);
      in_shared<Entry>(role.base + p.rows + (kTileKeys + thread) * sizeof(Entry)) = entry;
      announce(p, entry);
    }
    softmax_tile<heads, 16>(p, role, role.base + turn * heads * 4, turn, true, keys);
    role.sync(p);
    const uint32_t none[kTileKeys / 16][kPart<2> / 16][4] = {};
    multiply_values<1>(p, role, true, 0, keys, none, out);
    if (last) break;
#pragma unroll
    for (int n = 0; n < width; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) other[n][i] = out[0][n][i], out[0][n][i] = 0.0f;
    role.sync(p);  // the entries have been read, and the next ones are located
    load_tile<kFp8>(p, role, 1, keys, scales);
  }

  role.sync(p);  // the entries have been read
  store_output<1>(p, role, 1, out);
#pragma unroll
  for (int n = 0; n < width; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[0][n][i] = other[n][i];
  store_output<1>(p, role, 0, out);
  cluster_sync();
  merge<heads, 2>(p, row, first_head, 0, rank_of(p));
  cluster_wait();  // nobody ends while others read from it
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) decode_attention_join(const __grid_constant__ JoinParams p) {
  start_after_previous();
  join_clusters(p);
}

// decode_attention_<format>_<heads of a CTA, or teams>
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_16(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<true, 1>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_32(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<true, 2>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_16(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<false, 1>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_32(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<false, 2>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_teams(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend_in_teams<true>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_teams(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend_in_teams<false>(p);
}

}  // namespace dsv4
