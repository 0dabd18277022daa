// One row of at most 512 channels in the registers of one warp: what becomes of a cache entry or a query head. Norm,
// rotation, Hadamard transform, and storing in each format, each with the rounding points of ffi_kernels/reference.py.
//
// Lane l holds channels 8 l .. 8 l + 7 of each 256: vector j at j * 256 + 8 l. A vector beyond the row is zero and is
// never stored. Every function is called by all 32 lanes.
#pragma once

#include "row_codes.cuh"

namespace dsv4 {

constexpr int kRowVectors = 2;
constexpr int kRowChannels = 256 * kRowVectors;
enum EntryFormat : int32_t { kPlainEntry = 0, kFp8Entry = 1, kFp4Entry = 2 };

DSV4_D float sum_of_squares(const float (&x)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

// Cosines and sines of the four pairs in eight channels; loaded early, used late.
struct Angles {
  float4 cos, sin;
};

// Pairs (2i, 2i + 1), in fp32, rounded once to bf16.
DSV4_D void rotate(float (&x)[kVector], const Angles& angles) {
  const float cos[4] = {angles.cos.x, angles.cos.y, angles.cos.z, angles.cos.w};
  const float sin[4] = {angles.sin.x, angles.sin.y, angles.sin.z, angles.sin.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = round_bf16(a * cos[i] - b * sin[i]);
    x[2 * i + 1] = round_bf16(a * sin[i] + b * cos[i]);
  }
}

struct WarpRow {
  float x[kRowVectors][kVector];
  int width;  // channels, a multiple of 8

  static DSV4_D int channel(int j) { return j * 256 + 8 * int(lane_id()); }
  DSV4_D bool holds(int j) const { return channel(j) < width; }

  DSV4_D void clear() {
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[j][i] = 0.0f;
  }

  template <typename T>
  DSV4_D void load(const T* row) {  // bf16 or fp32 [width] in global memory, 16-byte aligned
    clear();
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
      if (holds(j)) load_vector(row + channel(j), x[j]);
  }

  DSV4_D void round_from(const float* row) {  // fp32 [width] in shared memory, 16-byte aligned, rounded to bf16
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[j][i] = holds(j) ? round_bf16(row[channel(j) + i]) : 0.0f;
  }

  // x * rsqrt(mean(x^2) + eps) * weight, rounded once; weight null for none.
  DSV4_D void norm(const WarpRow* weight, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) sum += sum_of_squares(x[j]);
    const float factor = rsqrtf(warp_sum(sum) * (1.0f / float(width)) + eps);
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float y = x[j][i] * factor;
        x[j][i] = round_bf16(weight ? y * weight->x[j][i] : y);
      }
  }

  // Walsh-Hadamard transform (Sylvester order) of a row of 32, 64, 128 or 256 channels, times scale, rounded to bf16.
  DSV4_D void hadamard(float scale) {
    float(&v)[kVector] = x[0];
#pragma unroll
    for (int step = 1; step < kVector; step *= 2)
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (!(i & step)) {
          const float a = v[i], b = v[i + step];
          v[i] = a + b, v[i + step] = a - b;
        }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      if (8 * step >= width) break;  // the lanes beyond hold zeros
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, v[i], step);
        v[i] = lane_id() & step ? other - v[i] : v[i] + other;
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = round_bf16(v[i] * scale);
  }

  // The exponent of the MXFP4 scale of the block of 32 channels that vector 0 of this lane lies in.
  DSV4_D int fp4_block() const { return fp4_exponent(warp_max<kMxfp4Block / 8>(largest_of(x[0]))); }

  DSV4_D uint32_t fp4_codes(int exponent) const {
    float scaled[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) scaled[i] = times_power_of_two(x[0][i], -exponent);
    return pack_e2m1(scaled);
  }

  DSV4_D void store_plain(uint16_t* row) const {  // bf16 [width]
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
      if (holds(j)) store_vector(row + channel(j), x[j]);
  }

  // FP8KVCache: data [nope + 2 rope] and scales [scales], of which the first nope / 64 count and the rest are zero.
  DSV4_D void store_fp8(uint8_t* data, uint8_t* scale, int rope, int scales) const {
    const int nope = width - rope;
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
      const int exponent = fp8_exponent(warp_max<kKvBlock / 8>(largest_of(x[j])));
      const float inverse = power_of_two(-exponent);
      const int at = channel(j);
      if (at < nope) {
        float y[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = x[j][i] * inverse;
        *reinterpret_cast<uint2*>(data + at) = {pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7])};
        if (at % kKvBlock == 0) scale[at / kKvBlock] = encode_e8m0(exponent);
      } else if (at < width) {
        store_vector(reinterpret_cast<uint16_t*>(data + nope + 2 * (at - nope)), x[j]);
      }
    }
    const int pad = nope / kKvBlock + int(lane_id());
    if (pad < scales) scale[pad] = 0;
  }

  // MXFP4: data [width / 2], scales [width / 32]; width as in `hadamard`.
  DSV4_D void store_fp4(uint8_t* data, uint8_t* scale) const {
    const int exponent = fp4_block();
    const uint32_t codes = fp4_codes(exponent);
    if (!holds(0)) return;
    *reinterpret_cast<uint32_t*>(data + channel(0) / 2) = codes;
    if (lane_id() % (kMxfp4Block / 8) == 0) scale[channel(0) / kMxfp4Block] = encode_e8m0(exponent);
  }
};

// The angles of one position, fp32 [rope / 2] each, spread as the last `rope` channels of a WarpRow are.
struct RowAngles {
  Angles of[kRowVectors];
  int nope;

  DSV4_D void load(const float* cos, const float* sin, int width, int rope) {
    nope = width - rope;
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j) {
      const int at = WarpRow::channel(j);
      if (at >= nope && at < width) {
        of[j].cos = *reinterpret_cast<const float4*>(cos + (at - nope) / 2);
        of[j].sin = *reinterpret_cast<const float4*>(sin + (at - nope) / 2);
      }
    }
  }

  DSV4_D void rotate(WarpRow& row) const {
#pragma unroll
    for (int j = 0; j < kRowVectors; ++j)
      if (WarpRow::channel(j) >= nope && row.holds(j)) dsv4::rotate(row.x[j], of[j]);
  }
};

}  // namespace dsv4
