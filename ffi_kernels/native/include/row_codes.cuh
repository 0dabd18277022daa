// Eight consecutive channels of a row per thread: loading, storing, and quantizing what one CTA holds of one row.
//
// Thread t holds channels 8 t .. 8 t + 7; channels beyond the row are zero and are never stored. A block of 128 (FP8) is
// half a warp, a block of 16 (NVFP4) two lanes. T is uint16_t (bf16) or float. Not here: rows shared by a cluster
// (hyper_connections.cu), rows in one warp (warp_row.cuh).
#pragma once

#include "numerics.h"

namespace dsv4 {

constexpr int kVector = 8;  // channels of a thread
enum CodeFormat : int32_t { kNoCodes = 0, kFp8Codes = 1, kNvfp4Codes = 2 };

DSV4_D void load_vector(const uint16_t* from, float (&x)[kVector]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  x[0] = bf16_low(raw.x), x[1] = bf16_high(raw.x), x[2] = bf16_low(raw.y), x[3] = bf16_high(raw.y);
  x[4] = bf16_low(raw.z), x[5] = bf16_high(raw.z), x[6] = bf16_low(raw.w), x[7] = bf16_high(raw.w);
}

DSV4_D void load_vector(const float* from, float (&x)[kVector]) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *(reinterpret_cast<const float4*>(from) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

DSV4_D void store_vector(uint16_t* to, const float (&x)[kVector]) {
  *reinterpret_cast<uint4*>(to) = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
}

DSV4_D void store_vector(float* to, const float (&x)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = {x[0], x[1], x[2], x[3]};
  reinterpret_cast<float4*>(to)[1] = {x[4], x[5], x[6], x[7]};
}

DSV4_D float to_float(uint16_t x) { return bf16_to_float(x); }
DSV4_D float to_float(float x) { return x; }
DSV4_D void assign(uint16_t& to, float x) { to = float_to_bf16(x); }
DSV4_D void assign(float& to, float x) { to = x; }
// x rounded to T.
template <typename T>
DSV4_D float rounded(float x) {
  return sizeof(T) == 2 ? round_bf16(x) : x;
}

// Channels [at, at + 8) of a row of `width`; a row starts on 16 bytes if `width` is a multiple of 8.
template <typename T>
DSV4_D void load_channels(const T* row, int at, int width, float (&x)[kVector]) {
  if (at + kVector <= width && width % kVector == 0) return load_vector(row + at, x);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
}

template <typename T>
DSV4_D void store_channels(T* row, int at, int width, const float (&x)[kVector]) {
  if (at + kVector <= width && width % kVector == 0) return store_vector(row + at, x);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (at + i < width) assign(row[at + i], x[i]);
}

DSV4_D uint32_t largest_of(const float (&x)[kVector]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) largest = max(largest, magnitude_bits(x[i]));
  return largest;
}

// Over a CTA of whole warps. `scratch`: 32 words that nothing else uses.
DSV4_D float cta_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (blockDim.x <= 32) return x;
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  return warp_sum(lane_id() < blockDim.x / 32 ? scratch[lane_id()] : 0.0f);
}

DSV4_D uint32_t cta_max(uint32_t x, uint32_t* scratch) {
  x = warp_max(x);
  if (blockDim.x <= 32) return x;
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  return warp_max(lane_id() < blockDim.x / 32 ? scratch[lane_id()] : 0u);
}

// FP8: codes e4m3 [width], scale e8m0 [ceil(width/128)]. All lanes of the warp take part, `at` a multiple of 8.
DSV4_D void store_fp8_codes(const float (&x)[kVector], int at, int width, uint8_t* codes, uint8_t* scale) {
  const int exponent = fp8_exponent(warp_max<kFp8Block / kVector>(largest_of(x)));
  if (at >= width) return;
  const float inverse = power_of_two(-exponent);
  const uint2 packed = {pack_e4m3(x[0] * inverse, x[1] * inverse, x[2] * inverse, x[3] * inverse),
                        pack_e4m3(x[4] * inverse, x[5] * inverse, x[6] * inverse, x[7] * inverse)};
  if (width % kVector == 0) {
    *reinterpret_cast<uint2*>(codes + at) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (at + i < width) codes[at + i] = uint8_t((i < 4 ? packed.x : packed.y) >> (8 * (i % 4)));
  }
  if (at % kFp8Block == 0) scale[at / kFp8Block] = encode_e8m0(exponent);
}

// NVFP4: codes e2m1 [width / 2], scale e4m3 [width / 16]; width a multiple of 16. All lanes of the warp take part.
DSV4_D void store_nvfp4_codes(const float (&x)[kVector], int at, int width, float global_scale, uint8_t* codes, uint8_t* scale) {
  const Nvfp4Scale block = nvfp4_block_scale(warp_max<kNvfp4Block / kVector>(largest_of(x)), global_scale);
  if (at >= width) return;
  *reinterpret_cast<uint32_t*>(codes + at / 2) = nvfp4_codes(x, block);
  if (at % kNvfp4Block == 0) scale[at / kNvfp4Block] = block.code;
}

struct RowCodes {  // of a whole array; null where the format has none
  uint8_t* codes;
  uint8_t* scale;
  float* global_scale;
};

// A row whose channels are spread over the CTA, as at the top of this file: in the format asked for.
DSV4_D void store_codes(const float (&x)[kVector], int64_t row, int width, int32_t format, const RowCodes& out, uint32_t* scratch) {
  const int at = kVector * int(threadIdx.x);
  if (format == kFp8Codes) {
    store_fp8_codes(x, at, width, out.codes + row * width, out.scale + row * ((width + kFp8Block - 1) / kFp8Block));
  } else if (format == kNvfp4Codes) {
    const float global_scale = nvfp4_global_scale(cta_max(largest_of(x), scratch));
    if (threadIdx.x == 0) out.global_scale[row] = global_scale;
    store_nvfp4_codes(x, at, width, global_scale, out.codes + row * width / 2, out.scale + row * width / kNvfp4Block);
  }
}

}  // namespace dsv4
