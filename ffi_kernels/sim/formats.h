// Floating point formats on the host: exact widening, and narrowing under every rounding mode through "round to odd" in
// double, which no second rounding can spoil (53 bits >= 2 * 24 + 2).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dsv4::sim {

template <class T, class S> inline T bit_cast(S s) {
  static_assert(sizeof(T) == sizeof(S));
  T t;
  std::memcpy(&t, &s, sizeof t);
  return t;
}

struct Half { uint16_t bits; };
struct Bf16 { uint16_t bits; };

inline float value_of(Half h) {
  const uint32_t magnitude = uint32_t(h.bits & 0x7FFF) << 13, sign = uint32_t(h.bits & 0x8000) << 16;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t{0x77800000});  // 2^112 mends the bias, subnormals too
  const uint32_t special = uint32_t{0} - uint32_t{(h.bits & 0x7C00) == 0x7C00};  // as a mask: a branch would keep loops from vectors
  return bit_cast<float>((special & (0x7F800000 | magnitude)) | (~special & bit_cast<uint32_t>(scaled)) | sign);
}
inline float value_of(Bf16 h) { return bit_cast<float>(uint32_t{h.bits} << 16); }
template <class T> inline T value_of(T v) { return v; }

enum class Round : uint8_t { rn, rz, rm, rp, rna };

struct Format {
  int exponent_bits, mantissa_bits;
  uint32_t max, infinity, nan;  // codes without sign; infinity == 0: none
};
constexpr Format kF16{5, 10, 0x7BFF, 0x7C00, 0x7FFF}, kBf16{8, 7, 0x7F7F, 0x7F80, 0x7FFF}, kE4m3{4, 3, 0x7E, 0, 0x7F}, kE5m2{5, 2, 0x7B, 0x7C, 0x7F},
    kE2m1{2, 1, 7, 0, 7}, kE2m3{2, 3, 31, 0, 31}, kE3m2{3, 2, 31, 0, 31}, kTf32{8, 10, 0x3FBFF, 0x3FC00, 0x3FFFF},
    kF32{8, 23, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF};

// Exact sum, or the neighbour with an odd last bit that encloses it.
inline double odd_add(double a, double b) {
  const double s = a + b, bb = s - a, error = (a - (s - bb)) + (b - bb);
  uint64_t u = bit_cast<uint64_t>(s);
  const bool inexact = error != 0 && error == error && std::fabs(s) <= 1.7976931348623157e308;
  if (inexact && !(u & 1)) u += (error > 0) == (s > 0) ? 1 : uint64_t(-1);
  return bit_cast<double>(u);
}
inline double odd_fma(float a, float b, float c) { return odd_add(static_cast<double>(a) * b, c); }

// The code (with sign on top) of a value that is exact or odd-rounded. `saturate`: overflow gives the largest number.
inline uint32_t encode(double value, const Format& f, Round mode, bool saturate) {
  const uint64_t bits = bit_cast<uint64_t>(value);
  const uint32_t sign_bit = 1u << (f.exponent_bits + f.mantissa_bits);
  const bool negative = bits >> 63;
  const uint32_t sign = negative ? sign_bit : 0;
  if (value != value) return f.nan;
  const uint64_t magnitude = bits & ~(uint64_t{1} << 63);
  const bool infinite = magnitude == 0x7FF0000000000000;
  if (infinite) return saturate || !f.infinity ? sign | f.max : sign | f.infinity;
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(magnitude >> 52);
  const uint64_t significand = (magnitude & 0xFFFFFFFFFFFFF) | (exponent ? uint64_t{1} << 52 : 0);
  int target = exponent - 1023 + bias, shift = 52 - f.mantissa_bits;
  if (target < 1) { shift += 1 - target; target = 0; }
  if (shift > 62) shift = 62;
  const uint64_t kept = significand >> shift, rest = significand & ((uint64_t{1} << shift) - 1), half = uint64_t{1} << (shift - 1);
  bool up = false;
  switch (mode) {
    case Round::rn: up = rest > half || (rest == half && (kept & 1)); break;
    case Round::rna: up = rest >= half; break;
    case Round::rz: break;
    case Round::rm: up = rest && negative; break;
    case Round::rp: up = rest && !negative; break;
  }
  const int64_t code = static_cast<int64_t>(kept) + up + (target > 0 ? (static_cast<int64_t>(target) - 1) << f.mantissa_bits : 0);
  if (code > f.max) {
    const bool to_infinity = f.infinity && !saturate && (mode == Round::rn || mode == Round::rna || (mode == Round::rm && negative) || (mode == Round::rp && !negative));
    return sign | (to_infinity ? f.infinity : f.max);
  }
  return sign | static_cast<uint32_t>(code);
}

inline float round_float(double odd, Round mode) {  // like encode(kF32), fast for rn
  if (mode == Round::rn) {
    const float f = static_cast<float>(odd);
    return f != f ? bit_cast<float>(0x7FFFFFFFu) : f;
  }
  return bit_cast<float>(encode(odd, kF32, mode, false));
}

// The value of a code of a small format.
inline float decode(uint32_t code, const Format& f) {
  const uint32_t sign = code >> (f.exponent_bits + f.mantissa_bits) & 1;
  const uint32_t magnitude = code & ((1u << (f.exponent_bits + f.mantissa_bits)) - 1);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const int e = static_cast<int>(magnitude >> f.mantissa_bits);
  const uint32_t m = magnitude & ((1u << f.mantissa_bits) - 1);
  float v;
  if (f.infinity && magnitude >= f.infinity) v = m ? bit_cast<float>(0x7FFFFFFFu) : bit_cast<float>(0x7F800000u);
  else if (!f.infinity && f.nan > f.max && magnitude == f.nan) v = bit_cast<float>(0x7FFFFFFFu);
  else v = std::ldexp(static_cast<float>(e ? m | 1u << f.mantissa_bits : m), (e ? e : 1) - bias - f.mantissa_bits);
  return sign ? -v : v;
}

// The fast ways of the common narrowing, equal to encode(..., rn).
inline uint16_t bf16_of(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : rounded);
}
inline uint16_t half_bits(double odd, Round mode = Round::rn) { return static_cast<uint16_t>(encode(odd, kF16, mode, false)); }
inline uint16_t bf16_bits(double odd, Round mode = Round::rn) { return static_cast<uint16_t>(encode(odd, kBf16, mode, false)); }

inline float flush(float x) { return (bit_cast<uint32_t>(x) & 0x7F800000) == 0 ? bit_cast<float>(bit_cast<uint32_t>(x) & 0x80000000u) : x; }
inline float canonical(float x) { return x != x ? bit_cast<float>(0x7FFFFFFFu) : x; }
inline float saturate01(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }  // nan gives 0

}  // namespace dsv4::sim
