// The two latent projections of a token, made ready by one CTA each: the normed input of the query projections in the
// format that they take, and the window entry in the format of the cache. Shared by the kernels that do only this
// (entries.cu) and that compress beside it (compressor.cu).
#pragma once

#include "warp_row.cuh"

namespace dsv4 {

struct LatentInputs {
  const uint16_t* qr;         // bf16 [R, Q]
  const uint16_t* kv;         // bf16 [R, K]
  const uint16_t* q_weight;   // bf16 [Q]
  const uint16_t* kv_weight;  // bf16 [K]
  const float* cos;           // [R, rope/2]
  const float* sin;           // [R, rope/2]
};

struct LatentOutputs {
  uint16_t* normed;      // bf16 [R, Q]
  uint8_t* codes;        // e4m3 [R, Q] | e2m1 [R, Q/2] | null
  uint8_t* scale;        // e8m0 [R, ceil(Q/128)] | e4m3 [R, Q/16] | null
  float* global_scale;   // [R] of NVFP4 | null
  uint8_t* entry;        // bf16 [R, K] | FP8KVCache.data [R, K + rope]
  uint8_t* entry_scale;  // null | FP8KVCache.scale [R, scales]
};

struct LatentShape {
  int32_t rows, q_channels, kv_channels, rope;
  int32_t quantized;     // CodeFormat
  int32_t entry_format;  // EntryFormat
  int32_t scales;
  float eps;
};

// A row of latent queries over a CTA, eight channels to a thread.
DSV4_D void latent_query(const LatentInputs& in, const LatentOutputs& out, const LatentShape& shape, int64_t row) {
  __shared__ float sums[32];
  __shared__ uint32_t peaks[32];
  const int at = kVector * int(threadIdx.x), width = shape.q_channels;
  float x[kVector], weight[kVector];
  load_channels(in.qr + row * width, at, width, x);
  load_channels(in.q_weight, at, width, weight);
  const float factor = rsqrtf(cta_sum(sum_of_squares(x), sums) * (1.0f / float(width)) + shape.eps);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = round_bf16(x[i] * factor * weight[i]);
  store_channels(out.normed + row * width, at, width, x);
  store_codes(x, row, width, shape.quantized, {out.codes, out.scale, out.global_scale}, peaks);
}

// A window entry, by one warp.
DSV4_D void window_entry(const LatentInputs& in, const LatentOutputs& out, const LatentShape& shape, size_t row) {
  const int width = shape.kv_channels, rope = shape.rope;
  WarpRow x, weight;
  RowAngles angles;
  x.width = weight.width = width;
  x.load(in.kv + row * width);
  weight.load(in.kv_weight);
  angles.load(in.cos + row * (rope / 2), in.sin + row * (rope / 2), width, rope);
  x.norm(&weight, shape.eps);
  angles.rotate(x);
  if (shape.entry_format == kFp8Entry)
    x.store_fp8(out.entry + row * (width + rope), out.entry_scale + row * shape.scales, rope, shape.scales);
  else
    x.store_plain(reinterpret_cast<uint16_t*>(out.entry) + row * width);
}

// What CTA `cta` of 2 * rows does; its threads hold at least the channels of a latent query.
DSV4_D void latent_row(const LatentInputs& in, const LatentOutputs& out, const LatentShape& shape, int cta) {
  if (cta < shape.rows)
    latent_query(in, out, shape, cta);
  else if (cta < 2 * shape.rows && warp_id() == 0)
    window_entry(in, out, shape, cta - shape.rows);
}

}  // namespace dsv4
