// Matrices in shared memory as descriptors of wgmma and tcgen05 lay them out: canonical layouts, PTX ISA 9.7.15.5.1.2.
#pragma once

#include <cstdint>

namespace dsv4::sim {

struct MatrixLayout {
  uint32_t start, leading, stride;  // bytes
  uint32_t swizzle;                 // bytes of the swizzled row: 0, 32, 64 or 128
  bool k_major;

  // Shared address of byte `kb` along k of row `mn` (k-major), or of byte `kb` along mn of row `k` (mn-major): `row` counts
  // the other dimension. A 16-byte piece that starts at a multiple of 16 stays together.
  uint32_t at(uint32_t row, uint32_t kb) const {
    uint32_t a;
    if (k_major) {
      a = swizzle ? start + row % 8 * swizzle + row / 8 * stride + kb : start + row % 8 * 16 + row / 8 * stride + kb / 16 * leading + kb % 16;
    } else {
      a = swizzle ? start + row % 8 * swizzle + row / 8 * stride + kb / swizzle * leading + kb % swizzle
                  : start + row % 8 * 16 + row / 8 * leading + kb / 16 * stride + kb % 16;
    }
    const uint32_t mask = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
    return a ^ ((a >> 7 & mask) << 4);
  }
};

inline uint32_t descriptor_field(uint64_t d, int bit) { return static_cast<uint32_t>(d >> bit & 0x3FFF) << 4; }

}  // namespace dsv4::sim
