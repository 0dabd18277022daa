// Quantize and dequantize by themselves, and SwiGLU with quantized output; any number of rows. Bit for bit the formats of
// ffi_kernels/reference.py. Not here: weights' own quantizers (checkpoint conversion runs them once, through XLA).
#include "dependent.cuh"
#include "row_codes.cuh"

using namespace dsv4;

namespace {

struct QuantizeParams {
  const void* x;        // T [rows, width]
  uint8_t* codes;       // FP8: e4m3 [rows, width]; MXFP4: e2m1 [rows, width/2]
  uint8_t* scale;       // FP8: e8m0 [rows, ceil(width/128)]; MXFP4: e8m0 [rows, width/32]
  int32_t rows, width;
};

// 16 threads per block of 128.
template <typename T>
__device__ void quantize_fp8(const QuantizeParams& p) {
  const int blocks = (p.width + kFp8Block - 1) / kFp8Block;
  const int64_t block = int64_t(blockIdx.x) * (blockDim.x / 16) + threadIdx.x / 16;
  const int64_t row = block / blocks;
  const bool there = row < p.rows;
  const int at = int(block % blocks) * kFp8Block + int(threadIdx.x % 16) * kVector;
  float x[kVector];
  load_channels(static_cast<const T*>(p.x) + row * p.width, at, there ? p.width : 0, x);
  store_fp8_codes(x, at, there ? p.width : 0, p.codes + row * p.width, p.scale + row * blocks);
}

// 4 threads per block of 32; width is a multiple of 32, so rows do not matter.
template <typename T>
__device__ void quantize_mxfp4(const QuantizeParams& p) {
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVector;
  const bool there = at < int64_t(p.rows) * p.width;
  float x[kVector] = {};
  if (there) load_vector(static_cast<const T*>(p.x) + at, x);
  const int exponent = fp4_exponent(warp_max<kMxfp4Block / kVector>(largest_of(x)));
  if (!there) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] *= power_of_two(-exponent);
  *reinterpret_cast<uint32_t*>(p.codes + at / 2) = pack_e2m1(x);
  if (at % kMxfp4Block == 0) p.scale[at / kMxfp4Block] = encode_e8m0(exponent);
}

struct QuantizeRowsParams {
  const void* x;        // T [rows, width], width a multiple of 16
  const float* amax;    // fp32 [rows]: the largest magnitude of the whole row; null: of what is here
  uint8_t* codes;       // e2m1 [rows, width/2]
  uint8_t* scale;       // e4m3 [rows, width/16]
  float* global_scale;  // fp32 [rows]
  int32_t width;
};

// One CTA per row; the second pass finds the row in the cache.
template <typename T>
__device__ void quantize_nvfp4(const QuantizeRowsParams& p) {
  __shared__ uint32_t scratch[32];
  const int64_t row = blockIdx.x;
  const T* from = static_cast<const T*>(p.x) + row * p.width;
  const int first = kVector * int(threadIdx.x), step = kVector * int(blockDim.x);
  float x[kVector];
  uint32_t amax = 0;
  if (p.amax) {
    amax = float_bits(p.amax[row]);
  } else {
    for (int at = first; at < p.width; at += step) {
      load_vector(from + at, x);
      amax = max(amax, largest_of(x));
    }
    amax = cta_max(amax, scratch);
  }
  const float global_scale = nvfp4_global_scale(amax);
  if (threadIdx.x == 0) p.global_scale[row] = global_scale;
  for (int start = 0; start < p.width; start += step) {  // whole warps: lanes beyond the row take part
    const int at = start + first;
    load_channels(from, at, p.width, x);
    store_nvfp4_codes(x, at, p.width, global_scale, p.codes + row * p.width / 2, p.scale + row * p.width / kNvfp4Block);
  }
}

struct DequantizeFp4Params {
  const uint8_t* codes;       // e2m1 [rows, width/2]
  const uint8_t* scale;       // NVFP4: e4m3 [rows, width/16]; MXFP4: e8m0 [rows, width/32]
  const float* global_scale;  // NVFP4: fp32, one per rows_per_global rows; null for MXFP4
  float* y;                   // fp32 [rows, width]
  int32_t rows, width, rows_per_global;
};

// Eight values per thread.
extern "C" __global__ void __launch_bounds__(256) dequantize_fp4(const __grid_constant__ DequantizeFp4Params p) {
  start_after_previous();
  const int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * kVector;
  if (at >= int64_t(p.rows) * p.width) return;
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(p.codes + at / 2);
  float y[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = e2m1_to_float(codes >> (4 * i));
  if (p.global_scale) {
    const float scale = e4m3_to_float(p.scale[at / kNvfp4Block]);
    const float global_scale = p.global_scale[at / p.width / p.rows_per_global];
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = y[i] * scale * global_scale;
  } else {
    const int exponent = decode_e8m0(p.scale[at / kMxfp4Block]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = times_power_of_two(y[i], exponent);
  }
  store_vector(p.y + at, y);
}

struct DequantizeFp8Params {
  const uint8_t* codes;  // e4m3 [matrices * rows, width]
  const uint8_t* scale;  // e8m0 [matrices * ceil(rows/tile), ceil(width/128)]
  float* y;              // fp32 [matrices * rows, width]
  int32_t all_rows, rows, width, tile;  // tile: rows that share a scale, 1 or 128
};

// Eight values per thread, within one block.
extern "C" __global__ void __launch_bounds__(256) dequantize_fp8(const __grid_constant__ DequantizeFp8Params p) {
  start_after_previous();
  const int vectors = (p.width + kVector - 1) / kVector, blocks = (p.width + kFp8Block - 1) / kFp8Block;
  const int64_t item = int64_t(blockIdx.x) * 256 + threadIdx.x, row = item / vectors;
  if (row >= p.all_rows) return;
  const int at = int(item % vectors) * kVector;
  const int64_t scale_row = row / p.rows * ((p.rows + p.tile - 1) / p.tile) + row % p.rows / p.tile;
  const int exponent = decode_e8m0(p.scale[scale_row * blocks + at / kFp8Block]);
  const uint8_t* from = p.codes + row * p.width + at;
  uint2 codes = {0, 0};
  if (p.width % kVector == 0) {
    codes = *reinterpret_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (at + i < p.width) (i < 4 ? codes.x : codes.y) |= uint32_t(from[i]) << (8 * (i % 4));
  }
  float y[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    y[i] = times_power_of_two(e4m3_to_float(uint8_t((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)))), exponent);
  store_channels(p.y + row * p.width, at, p.width, y);
}

struct SwigluParams {
  const float* gate;    // fp32 [rows, width]
  const float* up;      // fp32 [rows, width]
  const float* weight;  // fp32 [rows], or null
  void* y;              // T [rows, width]
  RowCodes quantized;   // of y: FP8 [rows, width], scale [rows, ceil(width/128)]; NVFP4 [rows, width/2], [rows, width/16], [rows, 1]
  int32_t width, format;
  float limit;
};

// One CTA per row, eight channels per thread.
template <typename T>
__device__ void swiglu(const SwigluParams& p) {
  __shared__ uint32_t scratch[32];
  const int64_t row = blockIdx.x;
  const int at = kVector * int(threadIdx.x);
  float gate[kVector], up[kVector];
  load_channels(p.gate + row * p.width, at, p.width, gate);
  load_channels(p.up + row * p.width, at, p.width, up);
  const float weight = p.weight ? p.weight[row] : 1.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float g = min_nan(rounded<T>(gate[i]), p.limit), u = min_nan(max_nan(rounded<T>(up[i]), -p.limit), p.limit);
    const float h = silu(g) * u;
    gate[i] = at + i < p.width ? rounded<T>(p.weight ? h * weight : h) : 0.0f;
  }
  store_channels(static_cast<T*>(p.y) + row * p.width, at, p.width, gate);
  store_codes(gate, row, p.width, p.format, p.quantized, scratch);
}

}  // namespace

#define DSV4_KERNEL(name, threads, params, body) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ params p) { start_after_previous(); body(p); }
DSV4_KERNEL(quantize_fp8_bf16, 256, QuantizeParams, quantize_fp8<uint16_t>)
DSV4_KERNEL(quantize_fp8_fp32, 256, QuantizeParams, quantize_fp8<float>)
DSV4_KERNEL(quantize_mxfp4_bf16, 256, QuantizeParams, quantize_mxfp4<uint16_t>)
DSV4_KERNEL(quantize_mxfp4_fp32, 256, QuantizeParams, quantize_mxfp4<float>)
DSV4_KERNEL(quantize_nvfp4_bf16, 1024, QuantizeRowsParams, quantize_nvfp4<uint16_t>)
DSV4_KERNEL(quantize_nvfp4_fp32, 1024, QuantizeRowsParams, quantize_nvfp4<float>)
DSV4_KERNEL(swiglu_bf16, 1024, SwigluParams, swiglu<uint16_t>)
DSV4_KERNEL(swiglu_fp32, 1024, SwigluParams, swiglu<float>)
