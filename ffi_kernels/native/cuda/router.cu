// The router of a mixture of experts: scores sqrt(softplus(gate . x)), the choice of experts, their weights.
//
// Learned routing takes two launches: `router_scores` reads the gate with all multiprocessors, then one warp per row picks
// in `route_scores`. (One cluster that does both in a launch was measured to be slower: its 16 multiprocessors read the
// gate at a tenth of the memory's speed.) `route_fixed` (hash routing) reads only the given experts' rows of the gate.
// A score is the sum of four slices of D, each summed by one warp, lanes striding over vectors of eight channels: always
// in this order, however many rows there are.
#include "../include/dependent.cuh"

namespace dsv4 {
namespace {

constexpr int kSlices = 4;
constexpr int kMaxPicked = 8;

struct RouterScoresParams {
  const uint16_t* x;  // bf16 [R, D]
  const void* gate;   // bf16 or fp32 [E, D]
  float* scores;      // fp32 [R, E]
  int32_t rows;       // R
  int32_t hidden;     // D, a multiple of 8
  int32_t experts;    // E
  int32_t per_cta;    // experts of a CTA, which has 4 warps for each
};

struct RouteScoresParams {
  const float* scores;  // fp32 [R, E]
  const float* bias;    // fp32 [E]
  int32_t* ids;         // int32 [R, X]
  float* weights;       // fp32 [R, X]
  int32_t experts;      // E <= 512
  int32_t count;        // X <= 8
  float scale;
};

struct RouteFixedParams {
  const uint16_t* x;      // bf16 [R, D]
  const void* gate;       // bf16 or fp32 [E, D]
  const int32_t* table;   // int32 [V, X]: experts of a token; with tokens null, [R, X]: experts of a row
  const int32_t* tokens;  // int32 [R] or null
  int32_t* ids;           // int32 [R, X]
  float* weights;         // fp32 [R, X]
  int32_t hidden;         // D, a multiple of 8
  int32_t experts;        // E
  int32_t count;          // X <= 8, with 4 warps for each
  int32_t vocab;          // V
  float scale;
};

DSV4_D void unpack_bf16(uint4 raw, float (&x)[8]) {
  x[0] = bf16_low(raw.x), x[1] = bf16_high(raw.x), x[2] = bf16_low(raw.y), x[3] = bf16_high(raw.y);
  x[4] = bf16_low(raw.z), x[5] = bf16_high(raw.z), x[6] = bf16_low(raw.w), x[7] = bf16_high(raw.w);
}

// Eight channels of a row of the gate.
template <bool kF32>
struct GateVector {
  uint4 raw[kF32 ? 2 : 1];
  DSV4_D void load(const void* gate, int64_t vector) {
#pragma unroll
    for (int i = 0; i < (kF32 ? 2 : 1); ++i) raw[i] = __ldg(static_cast<const uint4*>(gate) + vector * (kF32 ? 2 : 1) + i);
  }
  DSV4_D void unpack(float (&out)[8]) const {
    if constexpr (kF32) {
      const uint32_t words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = bits_float(words[i]);
    } else {
      unpack_bf16(raw[0], out);
    }
  }
};

// A warp's slice of an expert's row of the gate. As many of its vectors are in flight as registers allow, the first ones from the start.
template <bool kF32, int kRows>
struct GateSlice {
  static constexpr int kAhead = kF32 || kRows > 1 ? 4 : 8;
  const void* gate;
  int64_t row;
  int vectors, begin, end;  // of D; of this lane
  GateVector<kF32> ahead[kAhead] = {};

  DSV4_D GateSlice(const void* gate_, int hidden, int expert, int slice) : gate(gate_), row(int64_t(expert) * (hidden / 8)), vectors(hidden / 8) {
    const int length = (vectors + kSlices - 1) / kSlices;
    begin = slice * length + int(lane_id()), end = min((slice + 1) * length, vectors);
    load(begin);
  }

  DSV4_D void load(int v) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (v + 32 * i < end) ahead[i].load(gate, row + v + 32 * i);
    }
  }
};

// dots[r] = this slice's part of gate[expert] . x[r], in all lanes.
template <bool kF32, int kRows>
DSV4_D void slice_dots(GateSlice<kF32, kRows>& slice, const uint16_t* x, int rows, float (&dots)[kRows]) {
  constexpr int kAhead = GateSlice<kF32, kRows>::kAhead;
  const int vectors = slice.vectors, end = slice.end;
#pragma unroll
  for (int r = 0; r < kRows; ++r) dots[r] = 0.0f;
  const uint4 none = {0, 0, 0, 0};
  for (int v = slice.begin; v < end; v += 32 * kAhead) {
    if (v != slice.begin) slice.load(v);
    uint4 inputs[kAhead][kRows];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = v + 32 * i;
#pragma unroll
      for (int r = 0; r < kRows; ++r) inputs[i][r] = at < end && r < rows ? reinterpret_cast<const uint4*>(x)[int64_t(r) * vectors + at] : none;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float w[8];
      slice.ahead[i].unpack(w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float a[8];
        unpack_bf16(inputs[i][r], a);
#pragma unroll
        for (int e = 0; e < 8; ++e) dots[r] = fmaf(w[e], a[e], dots[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) dots[r] = warp_sum(dots[r]);
}

DSV4_D float score_of(float a, float b, float c, float d) {
  const float logit = (a + b) + (c + d);
  return sqrtf(fmaxf(logit, 0.0f) + log1pf(expf(-fabsf(logit))));
}

// Unsigned order = order of the candidates, nan the largest. 0 is below all of them.
DSV4_D uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x);
  return x != x ? 0xFFFFFFFFu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

DSV4_D void write_weights(const float* picked, int count, float scale, float* weights) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += picked[i];
  for (int i = 0; i < count; ++i) weights[i] = __fdiv_rn(picked[i], sum) * scale;
}

// One warp picks for one row, kCandidates experts to a lane.
template <int kCandidates>
DSV4_D void route_scores(const RouteScoresParams& p) {
  const int lane = int(lane_id()), experts = p.experts;
  const float* scores = p.scores + blockIdx.x * experts;
  uint32_t key[kCandidates];
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const int expert = lane + 32 * i;
    key[i] = expert < experts ? order_key(scores[expert] + p.bias[expert]) : 0;
  }
  float mine = 0.0f;  // lane i keeps the i-th pick
  int my_id = 0;
  for (int n = 0; n < p.count; ++n) {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) best = max(best, key[i]);
    best = __reduce_max_sync(0xFFFFFFFFu, best);
    uint32_t expert = 0xFFFFFFFFu;  // ties go to the lower one
#pragma unroll
    for (int i = kCandidates - 1; i >= 0; --i) expert = key[i] == best && best != 0 ? uint32_t(lane + 32 * i) : expert;
    expert = __reduce_min_sync(0xFFFFFFFFu, expert);
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) key[i] = expert == uint32_t(lane + 32 * i) ? 0 : key[i];
    if (lane == n) my_id = int(expert), mine = scores[expert];
  }
  float sum = 0.0f;
  for (int n = 0; n < p.count; ++n) sum += __shfl_sync(0xFFFFFFFFu, mine, n);
  if (lane < p.count) {
    p.ids[blockIdx.x * p.count + lane] = my_id;
    p.weights[blockIdx.x * p.count + lane] = __fdiv_rn(mine, sum) * p.scale;
  }
}

template <bool kF32, int kRows>
DSV4_D void router_scores(const RouterScoresParams& p) {
  extern __shared__ float parts[];  // [per_cta][kRows][4]
  const int local = int(warp_id()) / kSlices, slice = int(warp_id()) % kSlices;
  const int expert = int(blockIdx.x) * p.per_cta + local, first = int(blockIdx.y) * kRows, rows = min(p.rows - first, kRows);
  GateSlice<kF32, kRows> gate(p.gate, p.hidden, min(expert, p.experts - 1), slice);
  wait_and_let_next_start();
  if (expert < p.experts) {
    float dots[kRows];
    slice_dots<kF32, kRows>(gate, p.x + int64_t(first) * p.hidden, rows, dots);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (lane_id() == 0) parts[(local * kRows + r) * kSlices + slice] = dots[r];
    }
  }
  __syncthreads();
  const int i = threadIdx.x, of = int(blockIdx.x) * p.per_cta + i / kRows, row = first + i % kRows;
  if (i < p.per_cta * kRows && of < p.experts && row < p.rows) {
    const float* part = parts + i * kSlices;
    p.scores[row * p.experts + of] = score_of(part[0], part[1], part[2], part[3]);
  }
}

template <bool kF32>
DSV4_D void route_fixed(const RouteFixedParams& p) {
  __shared__ float parts[kMaxPicked * kSlices], picked[kMaxPicked];
  const int row = blockIdx.x, slot = int(warp_id()) / kSlices, slice = int(warp_id()) % kSlices;
  wait_and_let_next_start();
  const int entry = p.tokens == nullptr ? row : min(max(p.tokens[row], 0), p.vocab - 1);
  const int expert = min(max(p.table[int64_t(entry) * p.count + slot], 0), p.experts - 1);
  float dots[1];
  GateSlice<kF32, 1> gate(p.gate, p.hidden, expert, slice);
  slice_dots<kF32, 1>(gate, p.x + int64_t(row) * p.hidden, 1, dots);
  if (lane_id() == 0) parts[slot * kSlices + slice] = dots[0];
  if (lane_id() == 0 && slice == 0) p.ids[row * p.count + slot] = expert;
  __syncthreads();
  const int i = threadIdx.x;
  if (i < p.count) picked[i] = score_of(parts[i * kSlices], parts[i * kSlices + 1], parts[i * kSlices + 2], parts[i * kSlices + 3]);
  __syncthreads();
  if (i == 0) write_weights(picked, p.count, p.scale, p.weights + row * p.count);
}

}  // namespace
}  // namespace dsv4

using dsv4::RouteFixedParams;
using dsv4::RouterScoresParams;
using dsv4::RouteScoresParams;

#define ROUTER_SCORES(name, f32, rows) \
  extern "C" __global__ void __launch_bounds__(512, 1) name(const __grid_constant__ RouterScoresParams p) { dsv4::router_scores<f32, rows>(p); }
ROUTER_SCORES(router_scores_bf16_1, false, 1)
ROUTER_SCORES(router_scores_bf16_4, false, 4)
ROUTER_SCORES(router_scores_f32_1, true, 1)
ROUTER_SCORES(router_scores_f32_4, true, 4)

#define ROUTE_SCORES(name, candidates) \
  extern "C" __global__ void __launch_bounds__(32, 1) name(const __grid_constant__ RouteScoresParams p) { dsv4::start_after_previous(); dsv4::route_scores<candidates>(p); }
ROUTE_SCORES(route_scores_256, 8)
ROUTE_SCORES(route_scores_512, 16)

extern "C" __global__ void __launch_bounds__(1024, 1) route_fixed_bf16(const __grid_constant__ RouteFixedParams p) {
  dsv4::route_fixed<false>(p);
}
extern "C" __global__ void __launch_bounds__(1024, 1) route_fixed_f32(const __grid_constant__ RouteFixedParams p) {
  dsv4::route_fixed<true>(p);
}
