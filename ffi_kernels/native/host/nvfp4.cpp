// Weights to NVFP4 on the host, for conversions of checkpoints: what `checkpoints/requantize.py` states in numpy, bit for
// bit, without the memory that numpy writes between two operations. Plain C functions, called through ctypes.
//
// A matrix is its blocks of 16 numbers in order. The loops over the 16 numbers of a block have no order, so that compilers
// vectorise them; the error is summed for each place in a block, in the order of the blocks. Not here: kernels.
#include <algorithm>
#include <cstddef>

#include "numerics.h"

#if defined(__GLIBC__) && defined(__x86_64__) && defined(__GNUC__)
#define DSV4_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))  // the best one is taken at load
#else
#define DSV4_EACH_CPU
#endif
#define DSV4_INLINE inline __attribute__((always_inline))  // or it would not be part of what is compiled for each CPU

namespace dsv4 {
namespace {

constexpr int kBlock = kNvfp4Block;
constexpr int kBatch = 64;                  // blocks that are in the first cache at a time
constexpr uint32_t kNormalBits = 1u << 23;  // of 2**-126

// What is lost, for each of the 16 places in a block.
struct Lost {
  double squared[kBlock] = {}, norm[kBlock] = {};
  float largest[kBlock] = {};

  void into(double* out) const {  // squared error, squared norm, largest deviation
    out[0] = out[1] = out[2] = 0;
    for (int i = 0; i < kBlock; ++i) {
      out[0] += squared[i];
      out[1] += norm[i];
      out[2] = std::max(out[2], double(largest[i]));
    }
  }
};

// One block of finite numbers and what one unit of e2m1 is worth in it (0: the block becomes zero) -> 8 bytes.
DSV4_INLINE void encode_block(const float* x, float unit, uint8_t* data, Lost& lost) {
  const float divisor = unit > 0 ? unit : bits_float(kInfBits);
  uint32_t code[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float magnitude = bits_float(magnitude_bits(x[i]));
    // To the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6: adding and subtracting 1.5 * 2**(23 + n) rounds to multiples of 2**n,
    // where n is -1 below 2, 0 below 4, then 1.
    const float ratio = std::min(magnitude / divisor, 6.0f);
    const float shift = bits_float(std::max(float_bits(ratio) & 0x7F800000u, 127u << 23) + (22u << 23 | 1u << 22));
    const float value = (ratio + shift) - shift;
    const int halves = int(value * 2);  // 0, 1, 2, 3, 4, 6, 8, 12
    code[i] = uint32_t(halves - (halves > 4) - (halves > 6) - 3 * (halves > 8)) | (float_bits(x[i]) >> 31 << 3);
    const float deviation = bits_float(magnitude_bits(value * unit - magnitude));
    lost.squared[i] += double(deviation) * double(deviation);
    lost.norm[i] += double(magnitude) * double(magnitude);
    lost.largest[i] = std::max(lost.largest[i], deviation);
  }
  for (int i = 0; i < kBlock / 2; ++i) data[i] = uint8_t(code[2 * i] | code[2 * i + 1] << 4);
  if (!(unit > 0)) std::memset(data, 0, kBlock / 2);
}

// Up to kBatch blocks of finite numbers -> 8 bytes and the code of a scale for each.
DSV4_INLINE void encode_batch(float* x, int blocks, float global, uint8_t* data, uint8_t* scale, Lost& lost) {
  if (global < 0x1p-100f) {  // subnormals would be seen; XLA makes them zero
    for (int i = 0; i < blocks * kBlock; ++i) {
      if (magnitude_bits(x[i]) < kNormalBits) x[i] = bits_float(float_bits(x[i]) & 0x80000000u);
    }
  }
  float unit[kBatch];
  for (int b = 0; b < blocks; ++b) {
    uint32_t amax = 0;
    for (int i = 0; i < kBlock; ++i) amax = std::max(amax, magnitude_bits(x[b * kBlock + i]));
    const uint8_t code = float_to_e4m3_host(bits_float(amax) / (6 * global));
    const float found = e4m3_to_float(code) * global;
    const bool usable = float_bits(found) >= kNormalBits;
    scale[b] = usable ? code : 0;
    unit[b] = usable ? found : 0;
  }
  for (int b = 0; b < blocks; ++b) encode_block(x + b * kBlock, unit[b], data + b * kBlock / 2, lost);
}

}  // namespace
}  // namespace dsv4

extern "C" {

// `blocks` blocks of finite fp32 (or, if is_bf16, bf16) numbers. data: 8 bytes a block, scale: one; lost: three numbers.
DSV4_EACH_CPU void dsv4_nvfp4_of_numbers(const void* numbers, int is_bf16, ptrdiff_t blocks, float global, uint8_t* data, uint8_t* scale,
                                         double* lost) {
  using namespace dsv4;
  Lost sums;
  float x[kBatch * kBlock];
  for (ptrdiff_t b = 0; b < blocks; b += kBatch) {
    const int count = int(std::min<ptrdiff_t>(kBatch, blocks - b));
    if (is_bf16) {
      const uint16_t* narrow = static_cast<const uint16_t*>(numbers) + b * kBlock;
      for (int i = 0; i < count * kBlock; ++i) x[i] = bf16_to_float(narrow[i]);
    } else {
      std::memcpy(x, static_cast<const float*>(numbers) + b * kBlock, size_t(count) * kBlock * sizeof(float));
    }
    encode_batch(x, count, global, data + b * kBlock / 2, scale + b, sums);
  }
  sums.into(lost);
}

// The same of e4m3 codes (no nan), each block with the e8m0 byte of its scale.
DSV4_EACH_CPU void dsv4_nvfp4_of_fp8(const uint8_t* codes, const uint8_t* exponents, ptrdiff_t blocks, float global, uint8_t* data,
                                     uint8_t* scale, double* lost) {
  using namespace dsv4;
  Lost sums;
  float value_of[256], x[kBatch * kBlock];
  for (int c = 0; c < 256; ++c) value_of[c] = e4m3_to_float(uint8_t(c));
  for (ptrdiff_t b = 0; b < blocks; b += kBatch) {
    const int count = int(std::min<ptrdiff_t>(kBatch, blocks - b));
    for (int j = 0; j < count; ++j) {
      const float power = e8m0_to_float(exponents[b + j]);
      for (int i = 0; i < kBlock; ++i) x[j * kBlock + i] = value_of[codes[(b + j) * kBlock + i]] * power;
    }
    encode_batch(x, count, global, data + b * kBlock / 2, scale + b, sums);
  }
  sums.into(lost);
}
}
