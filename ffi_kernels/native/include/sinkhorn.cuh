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

// Reciprocals of four positive numbers, none below 1e-9, from one: four would wait for each other.
struct Reciprocals {
  float low, high, all;
  DSV4_D explicit Reciprocals(const float (&s)[4]) {
    low = __fmul_rn(s[0], s[1]), high = __fmul_rn(s[2], s[3]);
    all = reciprocal(__fmul_rn(low, high));
  }
  DSV4_D void get(const float (&s)[4], float (&out)[4]) const {
    const float of_low = __fmul_rn(all, high), of_high = __fmul_rn(all, low);
    out[0] = __fmul_rn(of_low, s[1]), out[1] = __fmul_rn(of_low, s[0]);
    out[2] = __fmul_rn(of_high, s[3]), out[3] = __fmul_rn(of_high, s[2]);
  }
};

// The sums of four groups of four numbers, each number times its factor, plus eps. One rounding per step, written out,
// so that every kernel gives the same bits.
template <int across, int along>  // distance of the groups, and of the numbers of one
DSV4_D void scaled_sums(const float (&c)[16], const float (&factor)[4], float eps, float (&sum)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* of = c + i * across;
    const float low = fmaf(of[along], factor[1], __fmul_rn(of[0], factor[0]));
    sum[i] = __fadd_rn(low, fmaf(of[3 * along], factor[3], fmaf(of[2 * along], factor[2], eps)));
  }
}

// c[4 j + k], softmax over k. In one lane, because the 2 * iterations dependent sums would cross lanes otherwise. A sum
// does not wait for the numbers that the normalisation before it makes: it takes the old ones and their factors; the new
// numbers are made while a reciprocal is under way.
DSV4_D void sinkhorn(float (&c)[16], int iterations, float eps) {
  float sum[4], row_factor[4], column_factor[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float* row = c + 4 * j;
    const float top = fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3]));  // a nan comes back with the exponentials
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = expf(row[k] - top);
    const float share = reciprocal((row[0] + row[1]) + (row[2] + row[3]));
#pragma unroll
    for (int k = 0; k < 4; ++k) row[k] = fmaf(row[k], share, eps);
    row_factor[j] = 1.0f;
  }
  scaled_sums<1, 4>(c, row_factor, eps, sum);
#pragma unroll 1
  for (int i = 1;; ++i) {
    const Reciprocals columns(sum);
#pragma unroll
    for (int k = 0; k < 16; ++k) c[k] = __fmul_rn(c[k], row_factor[k / 4]);
    columns.get(sum, column_factor);
    scaled_sums<4, 1>(c, column_factor, eps, sum);
    const Reciprocals rows(sum);
#pragma unroll
    for (int k = 0; k < 16; ++k) c[k] = __fmul_rn(c[k], column_factor[k % 4]);
    if (i == iterations) return;
    rows.get(sum, row_factor);
    scaled_sums<1, 4>(c, row_factor, eps, sum);
  }
}

}  // namespace dsv4
