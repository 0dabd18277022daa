// Index scores of FP4 entries in integers, which is exact and twice as fast as bf16. Here: entries and queries as integers, what
// becomes of their products, and the bf16 products, exact too, for what is none. Not here: tiles (the kernels).
//
// Twice an e2m1 value is an integer up to 12; the exponents of an entry's four blocks differ by at most 3 in nearly all data (they
// follow a Hadamard transform), so an entry is a common power of two times integers up to 96. So is a query head, which is
// recognised from its bf16 values and becomes integers up to 127. Sums of 128 products stay below 2**22.
#pragma once

#include "index_scores.cuh"

namespace dsv4 {

constexpr int kNearExponent = 60;                // integers are used while all exponents are this near to zero
constexpr float kMagic = 12582912.0f;            // 1.5 * 2**23: adding it rounds to an integer, which then lies in the lowest bits
constexpr uint32_t kHugeBits = 0x7F000000u;      // 2**127
constexpr int kSumExponent = 22, kShiftRoom = 3;  // 2**-22 brings every relu below 1, where .sat is a relu

// max(n, 0) * 2**-22: as fp32, the bits of n >= 0 are n * 2**-149, and those of n < 0 are nan, of which .sat makes 0.
DSV4_D float relu_of_integer(int32_t n) {
  float out;
  asm("mul.sat.f32 %0, %1, %2;" : "=f"(out) : "f"(bits_float(uint32_t(n))), "f"(bits_float(kHugeBits)));
  return out;
}

// 2**22 of the relu and 2**-4 of the entry's integers, times 2**exponent: what a sum over heads is multiplied by.
DSV4_D float unit_of_entry(uint32_t largest) { return bits_float((largest + kSumExponent - 1 - kShiftRoom) << 23); }

// --- entries -------------------------------------------------------------------------------------------------------

// Bytes of (low, high) picked by the four low nibbles of `selector`; a nibble with bit 3 set picks its byte's sign: 0x00 or 0xFF.
DSV4_D uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// word >> 16. On sm_90 as a dot product of halves, which runs beside the units for shifts and picks that decoding is made of.
DSV4_D uint32_t high_half(uint32_t word) {
#if __CUDA_ARCH__ == 900
  uint32_t out;
  asm("dp2a.lo.u32.u32 %0, %1, 256, 0;" : "=r"(out) : "r"(word));
  return out;
#else
  return word >> 16;
#endif
}

// For an e2m1 code, 127 + n by magnitude: n is 0 1 2 3 4 6 8 12 times a power of two, at most 96. Among the negative codes that of 0
// has 128. So the sign bit of a byte is set but for the positive 0.
struct IntegerTables {
  uint32_t low, high, negative_low;
};

DSV4_D IntegerTables integer_tables(uint32_t power) {
  const uint32_t low = 0x03020100u * power + 0x7F7F7F7Fu;
  return {low, 0x0C080604u * power + 0x7F7F7F7Fu, low + 1};
}

// Eight e2m1 codes -> their integers as signed bytes. Of each code one pick sees the magnitude and the other one a sign bit:
// (127 + n) + 128 - 255 = n, 255 + 128 - (127 + n) = 256 - n, 127 + 128 - 255 = 0 = 0 + 128 - 128; no byte borrows from the next.
DSV4_D void decode_integers(uint32_t word, const IntegerTables& of, uint32_t& first, uint32_t& second) {
  const uint32_t negated = word ^ 0x88888888u;
  first = pick_bytes(of.low, of.high, word) + 0x80808080u - pick_bytes(of.negative_low, of.high, negated);
  second = pick_bytes(of.low, of.high, high_half(word)) + 0x80808080u - pick_bytes(of.negative_low, of.high, high_half(negated));
}

// --- queries -------------------------------------------------------------------------------------------------------

struct HeadBlock {  // 32 channels of a head, from 32 j on, and its weight in all four of its lanes
  uint4 raw[4];
  float weight;
};

DSV4_D HeadBlock load_head(const IndexScoresParams& p, int b, int t, int head, int j) {
  const int64_t at = (int64_t(b) * p.tokens + t) * p.heads + head;
  const bool real = head < p.heads;
  HeadBlock block;
#pragma unroll
  for (int v = 0; v < 4; ++v) block.raw[v] = real ? reinterpret_cast<const uint4*>(p.q + at * kChannels + 32 * j)[v] : uint4{0, 0, 0, 0};
  block.weight = real ? head_weight(p, at) : 0.0f;
  return block;
}

// Calls place(w, four channels from 32 j + 4 w on) for w < 8. Returns whether these channels are integers times the head's power of two;
// `weight` becomes the head's weight in units of its integers. All lanes of a warp take part, four for each head.
template <class Place>
DSV4_D bool head_integers(const HeadBlock& block, float& weight, Place place) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(block.raw);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = max(largest, max(pairs[i] & 0x7FFFu, (pairs[i] >> 16) & 0x7FFFu));
  largest = warp_max<4>(largest);
  const int exponent = largest ? int(largest >> 7) - 127 : 0;
  const bool near = exponent >= -kNearExponent && exponent <= kNearExponent;
  const float up = power_of_two(near ? 6 - exponent : 0);  // the largest magnitude becomes 64 .. 127
  bool exact = near;
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t pair = pairs[2 * w + e / 2];
      const float scaled = (e % 2 ? bf16_high(pair) : bf16_low(pair)) * up;
      const float rounded = scaled + kMagic;
      exact = exact && rounded - kMagic == scaled;
      word |= (float_bits(rounded) & 0xFFu) << (8 * e);
    }
    place(w, word);
  }
  weight = times_power_of_two(block.weight, exponent - 6);
  return exact;
}

// --- what is no integers -------------------------------------------------------------------------------------------

// Two nibbles of a word, from bit `at` on, times 2**exponent as a pair of bf16: exact.
DSV4_D uint32_t decode_pair(uint32_t word, int at, int exponent) {
  const float low = times_power_of_two(e2m1_to_float(word >> at), exponent);
  return pack_bf16(low, times_power_of_two(e2m1_to_float(word >> (at + 4)), exponent));
}

// The scores of eight entries for one token in bf16 products, from global memory: right for any exponents, and rare. `entry` is that of
// column g; leaves those of columns 2 j and 2 j + 1.
DSV4_D float2 wide_scores(const IndexScoresParams& p, int b, int t, int entry, int g, int j) {
  const int64_t token = int64_t(b) * p.tokens + t, at = int64_t(b) * p.entries + min(entry, p.entries - 1);
  const uint16_t* q = p.q + token * p.heads * kChannels + 32 * j;
  const uint32_t* words = static_cast<const uint32_t*>(p.keys) + at * 16 + 4 * j;
  const int exponent = decode_e8m0(p.scale[at * 4 + j]);
  float2 sum = {0.0f, 0.0f};
#pragma unroll 1
  for (int h = g; h < p.heads + g; h += 16) {
    float dots[4] = {};
    const bool first = h < p.heads, second = h + 8 < p.heads;
#pragma unroll 1
    for (int s = 0; s < 8; ++s) {
      const uint32_t word = words[s / 2] >> (16 * (s % 2));
      const uint2 none = {0, 0};
      const uint2 a = first ? *reinterpret_cast<const uint2*>(q + h * kChannels + 4 * s) : none;
      const uint2 c = second ? *reinterpret_cast<const uint2*>(q + (h + 8) * kChannels + 4 * s) : none;
      mma_bf16(dots, a.x, c.x, a.y, c.y, decode_pair(word, 0, exponent), decode_pair(word, 8, exponent));
    }
    const float w = first ? head_weight(p, token * p.heads + h) : 0.0f, w8 = second ? head_weight(p, token * p.heads + h + 8) : 0.0f;
    if (first) sum.x = fmaf(relu(dots[0]), w, sum.x), sum.y = fmaf(relu(dots[1]), w, sum.y);
    if (second) sum.x = fmaf(relu(dots[2]), w8, sum.x), sum.y = fmaf(relu(dots[3]), w8, sum.y);
  }
#pragma unroll
  for (int offset = 16; offset >= 4; offset /= 2) {
    sum.x += __shfl_xor_sync(0xFFFFFFFFu, sum.x, offset);
    sum.y += __shfl_xor_sync(0xFFFFFFFFu, sum.y, offset);
  }
  return sum;
}

}  // namespace dsv4
