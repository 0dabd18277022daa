// What the two kernels of index scores share: their parameters, the layout of a warp's tile, the sum over heads.
//
// A warp takes 32 entries at a time: lane (g, j) = (lane / 4, lane % 4) loads its part of the entries 4 g .. 4 g + 3
// straight into the registers that mma.sync wants as its B operand. Which channel a lane's bytes are does not matter to a
// dot product as long as the queries, in shared memory as A operands, are permuted alike; all tokens share the entries.
#pragma once

#include "mma.cuh"

namespace dsv4 {

constexpr int kChannels = 128;  // K of every published model
constexpr int kWarps = 8;
constexpr int kTile = 32;  // entries of a warp's step
constexpr int kWays = kTile / 8;

struct IndexScoresParams {
  const uint16_t* q;          // bf16 [B, T, H, 128]
  const void* keys;           // e2m1 pairs [B, C, 64], or bf16 [B, C, 128]
  const uint8_t* scale;       // e8m0 [B, C, 4], null for bf16 keys
  const void* head_weights;   // fp32 or bf16 [B, T, H]
  const int32_t* visible;     // int32 [B, T], or null: all entries
  float* scores;              // fp32 [B, T, C]
  int32_t tokens;             // T <= 16
  int32_t heads;              // H
  int32_t entries;            // C
  int32_t weights_in_bf16;
  float weight_scale;
};

DSV4_D float head_weight(const IndexScoresParams& p, int64_t at) {
  const float w = p.weights_in_bf16 ? bf16_to_float(static_cast<const uint16_t*>(p.head_weights)[at]) : static_cast<const float*>(p.head_weights)[at];
  return w * p.weight_scale;
}

DSV4_D float relu(float x) {  // keeps nan
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
}

// Entries that some token of sequence b sees.
DSV4_D int visible_entries(const IndexScoresParams& p, int b) {
  int most = p.visible == nullptr ? p.entries : 0;
  for (int t = 0; p.visible != nullptr && t < p.tokens; ++t) most = max(most, p.visible[b * p.tokens + t]);
  return min(most, p.entries);
}

// Each lane holds, for its rows, partial sums of the entries 4 * (2 j + e) + i; leaves the sum over g of entry 8 j + g.
DSV4_D float sum_over_rows(const float (&part)[kWays][2], int g) {
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float keep = g & 4 ? part[i][1] : part[i][0], give = g & 4 ? part[i][0] : part[i][1];
    four[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float keep = g & 2 ? four[2 + i] : four[i], give = g & 2 ? four[i] : four[2 + i];
    two[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, 8);
  }
  const float keep = g & 1 ? two[1] : two[0], give = g & 1 ? two[0] : two[1];
  return keep + __shfl_xor_sync(0xFFFFFFFFu, give, 4);
}

}  // namespace dsv4
