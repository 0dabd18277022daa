// Number formats of DeepSeek-V4 (facts section 3) and the arithmetic that kernels share. Rounding is that of
// ffi_kernels/numerics.py, bit for bit: to nearest, ties to even, saturating.
//
// Here: bf16, e4m3, e2m1, e8m0 (host and device), scales of the block formats, reductions over a warp, a CTA and a
// cluster (device). Every reduction adds in an order that depends on the launch shape only, and leaves the same bits in
// all its threads. Largest magnitudes travel as bit patterns without the sign: unsigned comparison orders them as
// numbers, with nan above inf, so a maximum never loses a nan. Not here: loads, copies, tensor cores.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DSV4_HD __host__ __device__ __forceinline__
#define DSV4_D __device__ __forceinline__
#else
#define DSV4_HD inline
#endif

namespace dsv4 {

constexpr int kFp8Block = 128;    // channels per e8m0 scale of an FP8 activation
constexpr int kKvBlock = 64;      // of the FP8 cache
constexpr int kMxfp4Block = 32;   // channels per e8m0 scale
constexpr int kNvfp4Block = 16;   // channels per e4m3 scale
constexpr uint32_t kInfBits = 0x7F800000u;

DSV4_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

DSV4_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// |x| as a bit pattern: the operand of every largest magnitude.
DSV4_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }

// --- powers of two -------------------------------------------------------------------------------------------------

// 2**exponent exactly; exponent in [-126, 127].
DSV4_HD float power_of_two(int exponent) { return bits_float(uint32_t(exponent + 127) << 23); }

// x * 2**exponent for exponent in [-252, 254], in two exact steps: neither factor leaves the range of fp32.
DSV4_HD float times_power_of_two(float x, int exponent) {
  const int first = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
  return x * power_of_two(first) * power_of_two(exponent - first);
}

// Smallest n with |x| <= (1 + threshold * 2**-23) * 2**n, for the bit pattern of a normal |x|; exact.
DSV4_HD int ceil_log2(uint32_t magnitude, uint32_t threshold) {
  return int(magnitude >> 23) - 127 + ((magnitude & 0x7FFFFFu) > threshold ? 1 : 0);
}

// n of the scale 2**n of an FP8 block with this largest magnitude: ceil(log2(max(amax, 1e-4) / 448)), in [-22, 120].
// nan scales like inf.
DSV4_HD int fp8_exponent(uint32_t amax) {
  const uint32_t floor = 0x38D1B717u;  // 1e-4
  amax = amax < floor ? floor : amax > kInfBits ? kInfBits : amax;
  return ceil_log2(amax, 0x600000u) - 8;  // 448 = 1.75 * 2**8
}

// n of the scale 2**n of an MXFP4 block: ceil(log2(max(amax, 6 * 2**-126) / 6)), in [-126, 126]. nan scales like inf.
DSV4_HD int fp4_exponent(uint32_t amax) {
  const uint32_t floor = 0x01C00000u;  // 6 * 2**-126
  amax = amax < floor ? floor : amax > kInfBits ? kInfBits : amax;
  return ceil_log2(amax, 0x400000u) - 2;  // 6 = 1.5 * 2**2
}

// --- bf16 ----------------------------------------------------------------------------------------------------------

DSV4_HD float bf16_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

DSV4_HD uint16_t float_to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFFu) > kInfBits) return 0x7FFF;
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
#endif
}

// x rounded to bf16, as fp32.
DSV4_HD float round_bf16(float x) { return bf16_to_float(float_to_bf16(x)); }

// Two bf16 in one word, the lower address in the low half.
DSV4_HD float bf16_low(uint32_t pair) { return bits_float(pair << 16); }
DSV4_HD float bf16_high(uint32_t pair) { return bits_float(pair & 0xFFFF0000u); }

DSV4_HD uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return uint32_t(float_to_bf16(low)) | uint32_t(float_to_bf16(high)) << 16;
#endif
}

// --- e4m3 ----------------------------------------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__)
inline uint8_t float_to_e4m3_host(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  const uint8_t sign = uint8_t(bits >> 24) & 0x80u;
  if (magnitude > kInfBits) return 0x7F;
  if (magnitude >= 0x43E00000u) return sign | 0x7E;  // 448 and above
  if (magnitude < 0x3C800000u) {                     // below 2**-6: steps of 2**-9; adding 2**14 rounds to them
    return sign | uint8_t(float_bits(bits_float(magnitude) + 16384.0f) & 0xFu);
  }
  const uint32_t code = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1)) >> 20) - (120u << 3);
  return sign | uint8_t(code > 0x7E ? 0x7E : code);
}
#endif

// Two e4m3 codes, `low` at the lower address. Saturates at 448; nan becomes 0x7F.
DSV4_HD uint16_t pack_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
  return out;
#else
  return uint16_t(float_to_e4m3_host(low) | uint16_t(float_to_e4m3_host(high)) << 8);
#endif
}

DSV4_HD uint32_t pack_e4m3(float a, float b, float c, float d) {
  return uint32_t(pack_e4m3(a, b)) | uint32_t(pack_e4m3(c, d)) << 16;
}

DSV4_HD uint8_t float_to_e4m3(float x) { return uint8_t(pack_e4m3(x, 0.0f)); }

// Exponent and mantissa land in those of an fp32 that is 2**120 too small (subnormals too); 0x7F and 0xFF are nan.
DSV4_HD float e4m3_to_float(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu;
  const float value = bits_float((uint32_t(code & 0x80u) << 24) | (magnitude << 20)) * power_of_two(120);
  return magnitude == 0x7F ? bits_float(0x7FC00000u) : value;
}

// --- e2m1 ----------------------------------------------------------------------------------------------------------

// fp32 -> code: sign in bit 3, then magnitude 0, .5, 1, 1.5, 2, 3, 4, 6. Saturates at 6; nan becomes +6.
// In integer and fp32 arithmetic, because sm_90a has no such conversion; the same code runs on every arch.
DSV4_HD uint32_t float_to_e2m1(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  // Below 1 the codes are steps of 0.5, which is what an fp32 sum with 2**22 rounds to.
  const uint32_t small = float_bits(bits_float(magnitude) + 4194304.0f) & 7u;
  // From 1 up one mantissa bit stays; ties go to the even one.
  const uint32_t large = ((magnitude + 0x1FFFFFu + ((magnitude >> 22) & 1)) >> 22) - (126u << 1);
  const uint32_t code = magnitude < 0x3F800000u ? small : large > 7u ? 7u : large;
  return magnitude > kInfBits ? 7u : code | ((bits >> 28) & 8u);
}

// At most eight values -> codes in K order, the even K in the low nibble.
template <int n>
DSV4_HD uint32_t pack_e2m1(const float (&x)[n]) {
  uint32_t out = 0;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < n; ++i) out |= float_to_e2m1(x[i]) << (4 * i);
  return out;
}

// Low 4 bits -> fp32. Exponent and mantissa land in those of an fp32 that is 2**126 too small (0.5 as a subnormal).
DSV4_HD float e2m1_to_float(uint32_t code) {
  return bits_float(((code & 7u) << 22) | ((code & 8u) << 28)) * power_of_two(126);
}

// --- e8m0 ----------------------------------------------------------------------------------------------------------

DSV4_HD int decode_e8m0(uint8_t scale) { return int(scale) - 127; }
DSV4_HD uint8_t encode_e8m0(int exponent) { return uint8_t((exponent < -127 ? -127 : exponent > 127 ? 127 : exponent) + 127); }

// The scale 2**(byte - 127) as fp32; byte 0 is the subnormal 2**-127; byte 255 is no scale.
DSV4_HD float e8m0_to_float(uint8_t scale) { return bits_float(scale ? uint32_t(scale) << 23 : 0x00400000u); }

#if defined(__CUDACC__)

// --- NVFP4 scales (device: division is correctly rounded) ----------------------------------------------------------

// Global scale of a row or matrix with this largest magnitude: amax / (6 * 448), or 1 where that underflows.
DSV4_D float nvfp4_global_scale(uint32_t amax) {
  const float scale = __fdiv_rn(bits_float(amax), 2688.0f);
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

struct Nvfp4Scale {
  uint8_t code;  // e4m3, never negative
  float unit;    // what the elements are divided by; nan where the block is not a number
  bool usable;   // false: every code of the block is zero
};

DSV4_D Nvfp4Scale nvfp4_block_scale(uint32_t amax, float global_scale) {
  const uint8_t code = float_to_e4m3(__fdiv_rn(bits_float(amax), 6.0f * global_scale));
  const float unit = e4m3_to_float(code) * global_scale;
  const bool normal = unit >= 1.17549435e-38f, bad = unit != unit;
  return {uint8_t(normal || code == 0x7F ? code : 0), normal || bad ? unit : 1.0f, normal || bad};
}

// At most eight elements of a block -> their codes.
template <int n>
DSV4_D uint32_t nvfp4_codes(const float (&x)[n], const Nvfp4Scale& scale) {
  uint32_t out = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) out |= float_to_e2m1(__fdiv_rn(x[i], scale.unit)) << (4 * i);
  return scale.usable ? out : 0u;
}

// --- functions -----------------------------------------------------------------------------------------------------

DSV4_D float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + expf(-x)); }
DSV4_D float silu(float x) { return x * sigmoid(x); }
// As jnp.minimum and jnp.maximum: a nan on either side stays.
DSV4_D float min_nan(float a, float b) { return a != a ? a : b != b ? b : fminf(a, b); }
DSV4_D float max_nan(float a, float b) { return a != a ? a : b != b ? b : fmaxf(a, b); }

// --- reductions ----------------------------------------------------------------------------------------------------

DSV4_D uint32_t lane_id() { return threadIdx.x & 31u; }
DSV4_D uint32_t warp_id() { return threadIdx.x >> 5; }

// Over groups of `width` consecutive lanes (a power of two); all 32 lanes must take part.
template <int width = 32, class T>
DSV4_D T warp_sum(T x) {
#pragma unroll
  for (int offset = width / 2; offset; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

template <int width = 32>
DSV4_D uint32_t warp_max(uint32_t x) {
  if constexpr (width == 32) {
    return __reduce_max_sync(0xFFFFFFFFu, x);
  } else {
#pragma unroll
    for (int offset = width / 2; offset; offset /= 2) {
      const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, x, offset);
      x = x > other ? x : other;
    }
    return x;
  }
}

// Over a CTA of `warps` full warps; `scratch` holds one word per warp and must be free (synchronise before reusing it).
template <int warps>
DSV4_D float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < warps; ++i) total += scratch[i];
  return total;
}

template <int warps>
DSV4_D uint32_t block_max(uint32_t x, uint32_t* scratch) {
  x = warp_max(x);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < warps; ++i) largest = largest > scratch[i] ? largest : scratch[i];
  return largest;
}

// --- clusters and distributed shared memory --------------------------------------------------------------------------

DSV4_D uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Arrive orders what this thread wrote before; wait lets it read what all CTAs of the cluster wrote before arriving.
DSV4_D void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DSV4_D void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DSV4_D void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

DSV4_D uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// The address, in CTA `rank` of the cluster, of what lies at this address of the own shared memory.
DSV4_D uint32_t peer_address(uint32_t own_shared_address, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(own_shared_address), "r"(rank));
  return out;
}

DSV4_D float load_peer(uint32_t peer_address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(peer_address) : "memory");
  return x;
}

DSV4_D void store_peer(uint32_t peer_address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(peer_address), "f"(x) : "memory");
}

#endif  // __CUDACC__

}  // namespace dsv4
