// Products of small matrices, and the elements that enter them: see products.h.
#include "products.h"

#include <array>
#include <cstring>

// One binary for every x86: the loader picks the widest vectors that the machine has. All give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_WIDTH
#endif

namespace dsv4::sim {
namespace {

template <class T> using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;

template <class T> __attribute__((always_inline)) inline void multiply_blocks(const T* a, const T* b, T* sum, int rows, int n, int k) {
  constexpr int kRows = 4;
  for (int j = 0; j < n; j += 8) {
    for (int i = 0; i < rows; i += kRows) {
      Eight<T> s[kRows], v;
      for (int r = 0; r < kRows; ++r) std::memcpy(&s[r], sum + (i + r) * n + j, sizeof v);
      for (int q = 0; q < k; ++q) {
        std::memcpy(&v, b + q * n + j, sizeof v);
        for (int r = 0; r < kRows; ++r) s[r] += a[(i + r) * k + q] * v;
      }
      for (int r = 0; r < kRows; ++r) std::memcpy(sum + (i + r) * n + j, &s[r], sizeof v);
    }
  }
}

template <int kBits> using Table = std::array<double, 1 << kBits>;
template <int kBits> Table<kBits> table_of(const Format& f) {
  Table<kBits> t;
  for (uint32_t i = 0; i < t.size(); ++i) t[i] = decode(i, f);
  return t;
}

template <int kBits, class F> __attribute__((always_inline)) inline void each(const uint32_t* words, int count, F f) {
  constexpr int per = 32 / kBits;
  constexpr uint32_t mask = kBits == 32 ? 0xFFFFFFFFu : (1u << (kBits % 32)) - 1;
  for (int i = 0; i < count; ++i) for (int e = 0; e < per; ++e) f(i * per + e, words[i] >> (kBits * e) & mask);
}

// Words as pairs of 16 bits: loops that become vector instructions.
template <class H> __attribute__((always_inline)) inline void unpack_pairs(const uint32_t* words, int count, double* to) {
  const auto* halves = reinterpret_cast<const H*>(words);
  for (int i = 0; i < 2 * count; ++i) {
    H h;
    std::memcpy(&h, halves + i, sizeof h);
    to[i] = value_of(h);
  }
}
EVERY_WIDTH void unpack_halves(const uint32_t* words, int count, double* to) { unpack_pairs<Half>(words, count, to); }
EVERY_WIDTH void unpack_bf16(const uint32_t* words, int count, double* to) { unpack_pairs<Bf16>(words, count, to); }

}  // namespace

EVERY_WIDTH void multiply_add(const double* a, const double* b, double* sum, int rows, int n, int k) { multiply_blocks(a, b, sum, rows, n, k); }
EVERY_WIDTH void multiply_add(const int32_t* a, const int32_t* b, int32_t* sum, int rows, int n, int k) { multiply_blocks(a, b, sum, rows, n, k); }

void unpack(Type t, const uint32_t* words, int count, double* to) {
  static const Table<8> e4m3 = table_of<8>(kE4m3), e5m2 = table_of<8>(kE5m2);
  static const Table<4> e2m1 = table_of<4>(kE2m1);
  switch (t) {
    case Type::f16: return unpack_halves(words, count, to);
    case Type::bf16: return unpack_bf16(words, count, to);
    case Type::tf32: return each<32>(words, count, [&](int i, uint32_t x) { to[i] = bit_cast<float>(x & 0xFFFFE000); });
    case Type::e4m3: return each<8>(words, count, [&](int i, uint32_t x) { to[i] = e4m3[x]; });
    case Type::e5m2: return each<8>(words, count, [&](int i, uint32_t x) { to[i] = e5m2[x]; });
    case Type::e2m1: return each<4>(words, count, [&](int i, uint32_t x) { to[i] = e2m1[x]; });
    default: fail("no product takes elements of type .%s", name_of(t));
  }
}

void unpack(Type t, const uint32_t* words, int count, int32_t* to) {
  switch (t) {
    case Type::s8: return each<8>(words, count, [&](int i, uint32_t x) { to[i] = static_cast<int8_t>(x); });
    case Type::u8: return each<8>(words, count, [&](int i, uint32_t x) { to[i] = static_cast<int32_t>(x); });
    case Type::s4: return each<4>(words, count, [&](int i, uint32_t x) { to[i] = static_cast<int32_t>(x << 28) >> 28; });
    case Type::u4: return each<4>(words, count, [&](int i, uint32_t x) { to[i] = static_cast<int32_t>(x); });
    default: fail("no product takes elements of type .%s", name_of(t));
  }
}

}  // namespace dsv4::sim
