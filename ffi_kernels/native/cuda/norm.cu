// RMSNorm with and without quantized output, RoPE, Hadamard transform; any number of rows. Rounding points are those of
// ffi_kernels/reference.py: fp32 inside, one rounding to the dtype of the input.
#include "dependent.cuh"
#include "row_codes.cuh"

using namespace dsv4;

namespace {

struct RmsNormParams {
  const void* x;       // T [rows, width]
  const void* weight;  // bf16 or fp32 [width], or null
  void* y;             // T [rows, width]
  RowCodes quantized;  // of y: FP8 [rows, width], scale [rows, ceil(width/128)]; NVFP4 [rows, width/2], [rows, width/16], [rows, 1]
  int32_t width, weight_is_fp32, format;
  float eps;
};

// One CTA per row, eight channels per thread.
template <typename T>
__device__ void rms_norm(const RmsNormParams& p) {
  __shared__ float scratch[32];
  __shared__ uint32_t scratch_of_codes[32];
  const int64_t row = blockIdx.x;
  const int at = kVector * int(threadIdx.x);
  float x[kVector], weight[kVector];
  load_channels(static_cast<const T*>(p.x) + row * p.width, at, p.width, x);
  if (p.weight && p.weight_is_fp32)
    load_channels(static_cast<const float*>(p.weight), at, p.width, weight);
  else if (p.weight)
    load_channels(static_cast<const uint16_t*>(p.weight), at, p.width, weight);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], x[i], sum);
  const float factor = rsqrtf(__fdiv_rn(cta_sum(sum, scratch), float(p.width)) + p.eps);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = rounded<T>(p.weight ? x[i] * factor * weight[i] : x[i] * factor);
  store_channels(static_cast<T*>(p.y) + row * p.width, at, p.width, x);
  if (at >= p.width) {  // beyond the row a weight of zero channels must not turn into nan
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = 0.0f;
  }
  store_codes(x, row, p.width, p.format, p.quantized, scratch_of_codes);
}

struct RopeParams {
  const void* x;     // T [rows, width]
  const float* cos;  // fp32 [count, rope / 2]: row r takes line (r / repeat) % count
  const float* sin;  // fp32 [count, rope / 2]
  void* y;           // T [rows, width]
  int32_t rows, width, rope, repeat, count;
};

// One thread: n channels of a row, 8 or 2.
template <typename T, int n>
__device__ void rope(const RopeParams& p) {
  struct alignas(n * sizeof(T)) Pack {
    T of[n];
  };
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = item / (p.width / n);
  const int at = int(item % (p.width / n)) * n, nope = p.width - p.rope;
  if (row >= p.rows) return;
  Pack x = static_cast<const Pack*>(p.x)[item];
  if (at >= nope) {
    const int64_t angle = (row / p.repeat) % p.count * (p.rope / 2) + (at - nope) / 2;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float cos = p.cos[angle + i], sin = p.sin[angle + i];
      const float a = to_float(x.of[2 * i]), b = to_float(x.of[2 * i + 1]);
      assign(x.of[2 * i], a * cos - b * sin);
      assign(x.of[2 * i + 1], a * sin + b * cos);
    }
  }
  static_cast<Pack*>(p.y)[item] = x;
}

struct HadamardParams {
  const void* x;  // T [rows, width], width a power of two
  void* y;        // T [rows, width]
  int32_t width;
  float scale;    // width**-0.5
};

// One CTA per row: in step h every pair (i, i + h) becomes its sum and difference.
template <typename T>
__device__ void hadamard(const HadamardParams& p) {
  extern __shared__ float values[];  // [width]
  const T* x = static_cast<const T*>(p.x) + int64_t(blockIdx.x) * p.width;
  T* y = static_cast<T*>(p.y) + int64_t(blockIdx.x) * p.width;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) values[i] = to_float(x[i]);
  for (int step = 1; step < p.width; step *= 2) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < p.width / 2; pair += blockDim.x) {
      const int i = pair / step * 2 * step + pair % step;
      const float a = values[i], b = values[i + step];
      values[i] = a + b;
      values[i + step] = a - b;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) assign(y[i], values[i] * p.scale);
}

}  // namespace

#define DSV4_KERNEL(name, threads, params, body) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ params p) { start_after_previous(); body(p); }
DSV4_KERNEL(rms_norm_bf16, 1024, RmsNormParams, rms_norm<uint16_t>)
DSV4_KERNEL(rms_norm_fp32, 1024, RmsNormParams, rms_norm<float>)
DSV4_KERNEL(rope_bf16_8, 128, RopeParams, (rope<uint16_t, 8>))
DSV4_KERNEL(rope_bf16_2, 128, RopeParams, (rope<uint16_t, 2>))
DSV4_KERNEL(rope_fp32_8, 128, RopeParams, (rope<float, 8>))
DSV4_KERNEL(rope_fp32_2, 128, RopeParams, (rope<float, 2>))
DSV4_KERNEL(hadamard_bf16, 512, HadamardParams, hadamard<uint16_t>)
DSV4_KERNEL(hadamard_fp32, 512, HadamardParams, hadamard<float>)
