// The doubly stochastic 4 x 4 matrix of hyper-connections (facts section 2, mHC) in one lane.
#pragma once

#include "numerics.h"

namespace dsv4 {

DSV4_D float reciprocal(float x) {  // 1 ulp; the bounds of mixes and of Sinkhorn are tens of them
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

DSV4_D float quick_sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// Divides every group of four numbers (the rows, or the columns) by its sum plus eps. The numbers themselves stay: what stands for
// them is c[i, j] / (divisors[i] * others[j]), so that divisors[i] becomes sum_j c[i, j] / others[j] + eps * divisors[i]. One
// reciprocal serves the four others, and is under way while the products that it scales are made; with eps >= 1e-9 the product
// of the four, of which not all can be small, stays above 1e-25 for the hardest logits.
template <int across, int along>  // distance of the groups, and of the numbers of one
DSV4_D void divide_by_sums(const float (&c)[16], const float (&others)[4], float eps, float (&divisors)[4]) {
  const float low = others[0] * others[1], high = others[2] * others[3];
  const float both = reciprocal(low * high);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* of = c + i * across;
    const float first = fmaf(of[0], others[1], of[along] * others[0]);
    const float second = fmaf(of[2 * along], others[3], of[3 * along] * others[2]);
    divisors[i] = fmaf(both, fmaf(first, high, second * low), eps * divisors[i]);
  }
}

// c[4 j + k], the softmax over k plus eps, becomes doubly stochastic. In one lane, because the 2 * iterations dependent sums would
// cross lanes otherwise.
DSV4_D void sinkhorn(float (&c)[16], int iterations, float eps) {
  float rows[4] = {1.0f, 1.0f, 1.0f, 1.0f}, columns[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  divide_by_sums<1, 4>(c, rows, eps, columns);
#pragma unroll 1
  for (int i = 1; i < iterations; ++i) {
    divide_by_sums<4, 1>(c, columns, eps, rows);
    divide_by_sums<1, 4>(c, rows, eps, columns);
  }
  float row_factor[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) row_factor[j] = reciprocal(rows[j]);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float column_factor = reciprocal(columns[k]);
#pragma unroll
    for (int j = 0; j < 4; ++j) c[4 * j + k] = c[4 * j + k] * row_factor[j] * column_factor;
  }
}

// A number of the softmax over four consecutive lanes, plus eps; the whole warp takes part.
DSV4_D float softmax_of_four(float x, float eps) {
  float top = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));  // a nan comes back with the exponentials
  top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
  const float exponential = expf(x - top);
  return fmaf(exponential, reciprocal(warp_sum<4>(exponential)), eps);
}

}  // namespace dsv4
