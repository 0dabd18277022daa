// The arithmetic of tensor cores on the host: elements out of registers and shared memory, sums of products.
// Products and sums are formed in double (integers: in 32 bits, which hold them), along k, and rounded once by the caller.
// The device truncates the addends of a block to a common exponent instead: results agree where sums are exact, and within
// a few units of the last place elsewhere.
#pragma once

#include <cstdint>

#include "formats.h"
#include "module.h"

namespace dsv4::sim {

// The 32 / bits elements of each word, in order. f16, bf16, tf32, e4m3, e5m2, e2m1; integers of 8 and 4 bits.
void unpack(Type t, const uint32_t* words, int count, double* to);
void unpack(Type t, const uint32_t* words, int count, int32_t* to);

// sum [rows, n] += a [rows, k] times b [k, n], one product after the other along k. rows a multiple of 4, n of 8.
void multiply_add(const double* a, const double* b, double* sum, int rows, int n, int k);
void multiply_add(const int32_t* a, const int32_t* b, int32_t* sum, int rows, int n, int k);

// to [columns, rows] = from [rows, columns]
template <class T> void transpose(const T* from, T* to, int rows, int columns) {
  for (int j = 0; j < columns; ++j) for (int i = 0; i < rows; ++i) to[j * rows + i] = from[i * columns + j];
}

// A sum as the bits of D: f16 or f32; or s32, wrapped or saturated, where C is added last.
inline uint32_t rounded_sum(double sum, Type d) { return d == Type::f16 ? half_bits(sum) : bit_cast<uint32_t>(canonical(static_cast<float>(sum))); }
inline uint32_t rounded_sum(int32_t products, int32_t c, bool saturate) {
  const int64_t sum = int64_t{products} + c;
  return static_cast<uint32_t>(!saturate ? sum : sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
}
// C as what sums start from.
inline double accumulator(uint32_t bits, Type c) { return c == Type::f16 ? value_of(Half{static_cast<uint16_t>(bits)}) : bit_cast<float>(bits); }

}  // namespace dsv4::sim
