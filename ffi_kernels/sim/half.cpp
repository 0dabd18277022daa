// f16, bf16 and their pairs: computed exactly in double (round to odd), rounded once. PTX ISA 9.7.4.
#include "formats.h"
#include "lanes.h"

namespace dsv4::sim {
namespace {

// Fields: in.a bit 0 ftz, bit 1 sat, bit 2 relu; in.c for min and max as in float.cpp.
template <class H> constexpr Format format();
template <> constexpr Format format<Half>() { return kF16; }
template <> constexpr Format format<Bf16>() { return kBf16; }

template <class H> uint32_t flush_bits(uint32_t v) { return (v & (format<H>().infinity)) == 0 ? v & 0x8000 : v; }
template <class H> double read(const Instr& in, uint32_t v) {
  if (in.a & 1) v = flush_bits<H>(v);
  return value_of(H{static_cast<uint16_t>(v)});
}
template <class H> uint32_t finish(const Instr& in, double v) {
  if (v != v && !(in.a & 2)) return 0x7FFF;
  if (in.a & 2) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if (in.a & 4 && !(v > 0)) v = 0;
  const uint32_t r = encode(v, format<H>(), Round::rn, false);
  return in.a & 1 ? flush_bits<H>(r) : r;
}

struct Add { template <class H> static uint32_t f(const Instr& in, uint32_t a, uint32_t b) { return finish<H>(in, odd_add(read<H>(in, a), read<H>(in, b))); } };
struct Sub { template <class H> static uint32_t f(const Instr& in, uint32_t a, uint32_t b) { return finish<H>(in, odd_add(read<H>(in, a), -read<H>(in, b))); } };
struct Mul { template <class H> static uint32_t f(const Instr& in, uint32_t a, uint32_t b) { return finish<H>(in, read<H>(in, a) * read<H>(in, b)); } };
struct Fma { template <class H> static uint32_t f(const Instr& in, uint32_t a, uint32_t b, uint32_t c) { return finish<H>(in, odd_add(read<H>(in, a) * read<H>(in, b), read<H>(in, c))); } };
struct MinMax {
  template <class H> static uint32_t f(const Instr& in, uint32_t a, uint32_t b) {
    uint32_t sign = 0;
    if (in.a & 1) { a = flush_bits<H>(a); b = flush_bits<H>(b); }
    if (in.c & 2) { sign = (a ^ b) & 0x8000; a &= 0x7FFF; b &= 0x7FFF; }
    const float x = value_of(H{static_cast<uint16_t>(a)}), y = value_of(H{static_cast<uint16_t>(b)});
    if (x != x || y != y) {
      if ((in.c & 1) || (x != x && y != y)) return 0x7FFF;
      return (x != x ? b : a) | sign;
    }
    const bool a_less = x < y || (x == y && a & 0x8000);
    return (a_less != (in.b != 0) ? a : b) | sign;
  }
};
template <class H> bool is_nan(uint32_t v) { return (v & 0x7FFF) > format<H>().infinity; }
struct Abs { template <class H> static uint32_t f(const Instr& in, uint32_t a) { return is_nan<H>(a) ? 0x7FFF : (in.a & 1 ? flush_bits<H>(a) : a) & 0x7FFF; } };
struct Neg { template <class H> static uint32_t f(const Instr& in, uint32_t a) { return is_nan<H>(a) ? 0x7FFF : (in.a & 1 ? flush_bits<H>(a) : a) ^ 0x8000; } };
struct Ex2 { template <class H> static uint32_t f(const Instr& in, uint32_t a) { return finish<H>(in, std::exp2(read<H>(in, a))); } };
struct Tanh { template <class H> static uint32_t f(const Instr& in, uint32_t a) { return finish<H>(in, std::tanh(read<H>(in, a))); } };

template <class F, class H, bool Pair> struct Lift {
  template <class... S> static uint32_t f(const Instr& in, S... s) {
    const uint32_t low = F::template f<H>(in, (s & 0xFFFF)...) & 0xFFFF;
    if constexpr (!Pair) return low;
    else return low | F::template f<H>(in, (s >> 16)...) << 16;
  }
};
template <class F, int N, class H, bool Pair> constexpr Handler pick() {
  if constexpr (N == 1) return &map_with<Lift<F, H, Pair>, uint32_t, uint32_t>;
  else if constexpr (N == 2) return &map_with<Lift<F, H, Pair>, uint32_t, uint32_t, uint32_t>;
  else return &map_with<Lift<F, H, Pair>, uint32_t, uint32_t, uint32_t, uint32_t>;
}
template <class F, int N> Handler handler(Type t) {
  switch (t) {
    case Type::f16: return pick<F, N, Half, false>();
    case Type::f16x2: return pick<F, N, Half, true>();
    case Type::bf16: return pick<F, N, Bf16, false>();
    default: return pick<F, N, Bf16, true>();
  }
}
}  // namespace

bool half_op(Decode& d, const char* name, Type t) {
  if (t != Type::f16 && t != Type::f16x2 && t != Type::bf16 && t != Type::bf16x2) return false;
  const std::string op = name;
  if (d.in.b && op != "min" && op != "max") d.wrong("halves round to nearest");
  if (d.take("relu")) d.in.a |= 4;
  size_t sources = 2;
  if (op == "add") d.in.run = handler<Add, 2>(t);
  else if (op == "sub") d.in.run = handler<Sub, 2>(t);
  else if (op == "mul") d.in.run = handler<Mul, 2>(t);
  else if (op == "fma") { d.in.run = handler<Fma, 3>(t); sources = 3; }
  else if (op == "min" || op == "max") { d.in.b = op == "max"; d.in.run = handler<MinMax, 2>(t); if (d.in.a & 6) d.wrong("takes no .relu or .sat"); }
  else if (op == "abs") { d.in.run = handler<Abs, 1>(t); sources = 1; }
  else if (op == "neg") { d.in.run = handler<Neg, 1>(t); sources = 1; }
  else if (op == "ex2") { d.in.run = handler<Ex2, 1>(t); sources = 1; }
  else if (op == "tanh") { d.in.run = handler<Tanh, 1>(t); sources = 1; }
  else d.wrong(std::string("type .") + name_of(t) + " is not modelled here");
  d.dst(0, t);
  for (size_t i = 1; i <= sources; ++i) d.src(i, t);
  return true;
}

void add_half(Decoders&) {}

}  // namespace dsv4::sim
