// The best `count` of a row of scores, exactly, in ascending order of their index.
//
// One cluster per row; every thread keeps 16 scores in registers as unsigned integers of the same order. Radix selection
// finds the key of the last winner, eight bits at a time: each CTA counts digits in shared memory, all CTAs add up all
// counts, which they send to each other, and so agree on the digit. Then a prefix sum in index order gives every winner
// its place. Counts are integers: no order of arrival changes the result.
#include "../include/dependent.cuh"
#include "../include/exchange.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kVectors = 4;          // of four scores in a thread's registers
constexpr int kSpan = 4 * kThreads;  // scores of a CTA per vector
constexpr int kMaxCluster = 16;
constexpr int kBins = 256;
constexpr int kMaxPasses = 4;

struct TopEntriesParams {
  const void* scores;      // fp32 or bf16 [rows, C]
  const int32_t* visible;  // int32 [rows]
  int32_t* picked;         // int32 [rows, X]
  int32_t entries;         // C <= 16 CTAs * 16384
  int32_t count;           // X <= C
};

// Unsigned order = order of the scores: -0 is 0, nan is the largest. 0 is below every score: "no entry".
DSV4_D uint32_t order_key(float score) {
  if (score != score) return 0xFFFFFFFFu;
  const uint32_t bits = score == 0.0f ? 0u : float_bits(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DSV4_D uint32_t scan_warp(uint32_t x, uint32_t lane) {  // inclusive
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t below = __shfl_up_sync(0xFFFFFFFFu, x, offset);
    if (lane >= uint32_t(offset)) x += below;
  }
  return x;
}

DSV4_D uint32_t sum_warp(uint32_t x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

template <bool kBf16>
DSV4_D void load_keys(const TopEntriesParams& p, int row, int at, int visible, uint32_t (&key)[4]) {
  const int64_t start = int64_t(row) * p.entries + at;
  const float* wide = static_cast<const float*>(p.scores) + start;
  const uint16_t* narrow = static_cast<const uint16_t*>(p.scores) + start;
  if (p.entries % 4 == 0 && at + 4 <= visible) {
    if constexpr (kBf16) {
      const uint2 raw = *reinterpret_cast<const uint2*>(narrow);
      key[0] = order_key(bf16_low(raw.x)), key[1] = order_key(bf16_high(raw.x));
      key[2] = order_key(bf16_low(raw.y)), key[3] = order_key(bf16_high(raw.y));
    } else {
      const float4 raw = *reinterpret_cast<const float4*>(wide);
      key[0] = order_key(raw.x), key[1] = order_key(raw.y), key[2] = order_key(raw.z), key[3] = order_key(raw.w);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      key[e] = 0;
      if (at + e < visible) key[e] = order_key(kBf16 ? bf16_to_float(narrow[e]) : wide[e]);
    }
  }
}

// The digit in which the last winner lies.
struct Choice {
  uint32_t digit, need, count;  // winners still to find in the digit's bin, and entries in that bin
};

struct Shared {
  uint32_t counts[kMaxPasses][kBins];           // of this CTA
  uint32_t received[2][kMaxCluster][kBins];     // of each CTA; passes alternate, since no CTA is two passes ahead
  uint32_t totals[kMaxCluster];                 // winners of each CTA: better ones above, level ones in the low half
  uint32_t sums[kWarps];
  uint64_t arrived[kMaxPasses + 1];             // of the passes' counts, and of the totals
  Choice choice;
};

// counts[pass] of every CTA -> the choice, in all threads.
DSV4_D Choice choose_digit(Shared& shared, int pass, int rank, int ctas, uint32_t need) {
  const uint32_t bin = kBins - 1 - threadIdx.x, warp = warp_id(), lane = lane_id();
  __syncthreads();
  if (ctas > 1 && int(threadIdx.x) < ctas * (kBins / 4)) {
    const uint32_t to = threadIdx.x / (kBins / 4), at = threadIdx.x % (kBins / 4);
    const float4 four = reinterpret_cast<const float4*>(shared.counts[pass])[at];
    send(reinterpret_cast<float4*>(shared.received[pass % 2][rank]) + at, &shared.arrived[pass], to, four);
  }
  uint32_t own = 0, upto = 0;
  if (threadIdx.x < kBins) {
    if (ctas == 1) {
      own = shared.counts[pass][bin];
    } else {
      barrier_wait(&shared.arrived[pass]);
#pragma unroll
      for (int from = 0; from < kMaxCluster; ++from) own += from < ctas ? shared.received[pass % 2][from][bin] : 0;
    }
    upto = scan_warp(own, lane);
    if (lane == 31) shared.sums[warp] = upto;
  }
  __syncthreads();
  if (threadIdx.x < kBins) {
    uint32_t above = upto - own;
#pragma unroll
    for (uint32_t w = 0; w < kBins / 32; ++w) above += w < warp ? shared.sums[w] : 0;
    if (above < need && above + own >= need) shared.choice = {bin, need - above, own};
  }
  __syncthreads();
  return shared.choice;
}

template <bool kBf16>
DSV4_D void top_entries(const TopEntriesParams& p) {
  __shared__ __align__(16) Shared shared;
  const int row = blockIdx.y, rank = blockIdx.x;
  const uint32_t lane = lane_id(), warp = warp_id();
  int32_t* picked = p.picked + int64_t(row) * p.count;
  const int visible = min(max(p.visible[row], 0), p.entries);
  if (visible <= p.count) {
    for (int i = rank * kThreads + int(threadIdx.x); i < p.count; i += int(gridDim.x) * kThreads) picked[i] = i < visible ? i : -1;
    return;
  }
  // What one CTA can hold needs no cluster. All CTAs of a cluster decide alike.
  const int ctas = visible <= kVectors * kSpan ? 1 : int(gridDim.x), vectors = (visible + ctas * kSpan - 1) / (ctas * kSpan);
  if (rank >= ctas) return;

  // A warp's entries are neighbours, so that the order of (CTA, warp, vector, lane) is that of the indices.
  const int first = ((rank * kWarps + int(warp)) * vectors) * 128 + 4 * int(lane);
  uint32_t keys[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v >= vectors) break;
    load_keys<kBf16>(p, row, first + 128 * v, visible, keys[v]);
  }
  (&shared.counts[0][0])[threadIdx.x] = 0;
  constexpr int kPasses = kBf16 ? 2 : 4;
  if (ctas > 1) {
    if (threadIdx.x == 0) {
      for (int pass = 0; pass < kPasses; ++pass) barrier_init(&shared.arrived[pass], 4 * kBins * ctas);
      barrier_init(&shared.arrived[kMaxPasses], 4 * ctas);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    cluster_wait();
  }
  __syncthreads();

  uint32_t prefix = 0, need = uint32_t(p.count);
  int shift = 32;
  for (int pass = 0; pass < kPasses; ++pass) {
    shift -= 8;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= vectors) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t digit = (keys[v][e] >> shift) ^ (prefix << 8);  // below 256 where the prefix is the same
        if (digit < kBins && keys[v][e] != 0) atomicAdd(&shared.counts[pass][digit], 1u);
      }
    }
    const Choice found = choose_digit(shared, pass, rank, ctas, need);
    prefix = prefix << 8 | found.digit;
    need = found.need;
    if (found.count == need) break;  // the whole bin wins: no further digit decides anything
  }

  // Winners are the keys above the prefix, and the first `need` of those equal to it. Both counts share a word.
  uint32_t before[kVectors], total = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v >= vectors) break;
    uint32_t own = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t key = keys[v][e] >> shift;
      own += key > prefix ? 0x10000u : key == prefix && keys[v][e] != 0 ? 1u : 0u;
    }
    const uint32_t upto = scan_warp(own, lane);
    before[v] = total + upto - own;
    total += __shfl_sync(0xFFFFFFFFu, upto, 31);
  }
  if (lane == 0) shared.sums[warp] = total;
  __syncthreads();
  const uint32_t of_lane = shared.sums[lane];  // the sum of all is at most 16384 of each kind
  const uint32_t in_cta = sum_warp(lane < warp ? of_lane : 0);
  uint32_t better = in_cta >> 16, level_before = in_cta & 0xFFFF;
  if (ctas > 1) {
    if (warp == 0) {
      const uint32_t all = sum_warp(of_lane);
      if (int(lane) < ctas) send(&shared.totals[rank], &shared.arrived[kMaxPasses], lane, all);
    }
    barrier_wait(&shared.arrived[kMaxPasses]);
    const uint32_t below = int(lane) < rank ? shared.totals[lane] : 0;
    better += sum_warp(below >> 16);
    level_before += sum_warp(below & 0xFFFF);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (v >= vectors) break;
    uint32_t above = better + (before[v] >> 16), level = level_before + (before[v] & 0xFFFF);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t key = keys[v][e] >> shift;
      const bool is_above = key > prefix, is_level = key == prefix && keys[v][e] != 0;
      if (is_above || (is_level && level < need)) picked[above + min(level, need)] = first + 128 * v + e;
      above += is_above;
      level += is_level;
    }
  }
}

}  // namespace
}  // namespace dsv4

using dsv4::TopEntriesParams;

extern "C" __global__ void __launch_bounds__(1024, 1) top_entries_f32(const __grid_constant__ TopEntriesParams p) {
  dsv4::start_after_previous();
  dsv4::top_entries<false>(p);
}
extern "C" __global__ void __launch_bounds__(1024, 1) top_entries_bf16(const __grid_constant__ TopEntriesParams p) {
  dsv4::start_after_previous();
  dsv4::top_entries<true>(p);
}
