// Index scores of decode with bf16 entries (recipe bf16); see index_scores.cuh for the layout and indexer.cu for FP4.
#include "../include/dependent.cuh"
#include "../include/index_scores.cuh"

namespace dsv4 {
namespace {

template <int kRows>
struct PlainQuery {
  uint4 a[kRows][8][32];  // step s holds channels 32 (s / 2) + 8 j + 4 (s % 2) .. + 3 of heads 16 m + g and + 8
  float2 weight[kRows][8];
};

template <int kRows>
DSV4_D void index_scores_bf16(const IndexScoresParams& p) {
  extern __shared__ uint4 shared[];
  PlainQuery<kRows>* query = reinterpret_cast<PlainQuery<kRows>*>(shared);  // [T]
  const int b = blockIdx.y, lane = lane_id(), g = lane / 4, j = lane % 4;
  const int visible = visible_entries(p, b);
  if (int(blockIdx.x) * kTile >= visible) return;
  for (int unit = threadIdx.x; unit < p.tokens * kRows * 256; unit += kWarps * 32) {
    const int t = unit / (kRows * 256), head = (unit / 16) % (kRows * 16), v = unit % 16;  // 8 channels, 8 v = 32 c + 8 j
    const int64_t at = (int64_t(b) * p.tokens + t) * p.heads + head;
    const bool real = head < p.heads;
    const uint4 raw = real ? reinterpret_cast<const uint4*>(p.q + at * kChannels)[v] : uint4{0, 0, 0, 0};
    uint32_t* a = reinterpret_cast<uint32_t*>(&query[t].a[head / 16][2 * (v / 4)][4 * (head % 8) + v % 4]) + (head % 16) / 8;
    a[0] = raw.x, a[2] = raw.y, a[128] = raw.z, a[130] = raw.w;
    if (v == 0) {
      float* weight = reinterpret_cast<float*>(&query[t].weight[head / 16][head % 8]);
      weight[(head % 16) / 8] = real ? head_weight(p, at) : 0.0f;
    }
  }
  __syncthreads();

  const int step = int(gridDim.x) * kWarps * kTile;
  for (int base = (int(warp_id()) * int(gridDim.x) + int(blockIdx.x)) * kTile; base < visible; base += step) {
    uint4 operand[kWays][4];
#pragma unroll
    for (int i = 0; i < kWays; ++i) {
      const int entry = base + 4 * g + i;
      const uint4* from = static_cast<const uint4*>(p.keys) + (int64_t(b) * p.entries + entry) * 16 + j;
#pragma unroll
      for (int c = 0; c < 4; ++c) operand[i][c] = entry < p.entries ? from[4 * c] : uint4{0, 0, 0, 0};
    }
    const int entry = base + 8 * j + g;
    for (int t = 0; t < p.tokens; ++t) {
      float part[kWays][2] = {};
#pragma unroll 1
      for (int m = 0; m < kRows; ++m) {
        float dots[kWays][4] = {};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint4 even = query[t].a[m][2 * c][lane], odd = query[t].a[m][2 * c + 1][lane];
#pragma unroll
          for (int i = 0; i < kWays; ++i) {
            mma_bf16(dots[i], even.x, even.y, even.z, even.w, operand[i][c].x, operand[i][c].y);
            mma_bf16(dots[i], odd.x, odd.y, odd.z, odd.w, operand[i][c].z, operand[i][c].w);
          }
        }
        const float2 weight = query[t].weight[m][g];
        const bool first = 16 * m + g < p.heads, second = 16 * m + g + 8 < p.heads;  // 0 * nan is no weight
#pragma unroll
        for (int i = 0; i < kWays; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (first) part[i][e] = fmaf(relu(dots[i][e]), weight.x, part[i][e]);
            if (second) part[i][e] = fmaf(relu(dots[i][2 + e]), weight.y, part[i][e]);
          }
        }
      }
      const float score = sum_over_rows(part, g);
      if (entry < p.entries) p.scores[(int64_t(b) * p.tokens + t) * p.entries + entry] = score;
    }
  }
}

}  // namespace
}  // namespace dsv4

using dsv4::IndexScoresParams;

extern "C" __global__ void __launch_bounds__(256, 2) index_scores_bf16_16(const __grid_constant__ IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores_bf16<1>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) index_scores_bf16_64(const __grid_constant__ IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores_bf16<4>(p);
}
