// Bits: and/or/xor/not, shifts, fields, permutes, counts, and mov with its packing of vectors. PTX ISA 9.7.1, 9.7.8, 9.7.9.
#include "lanes.h"

namespace dsv4::sim {
namespace {

struct And { template <class T> static T f(T a, T b) { return a & b; } };
struct Or { template <class T> static T f(T a, T b) { return a | b; } };
struct Xor { template <class T> static T f(T a, T b) { return a ^ b; } };
struct Not { template <class T> static T f(T a) { return static_cast<T>(~a); } };
struct Cnot { template <class T> static T f(T a) { return a == 0; } };
struct Shl { template <class T> static T f(T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : static_cast<T>(uint64_t(a) << n); } };
struct Shr {
  template <class T> static T f(T a, uint32_t n) {
    const uint32_t top = 8 * sizeof(T) - 1;
    if (n > top) return std::is_signed_v<T> ? static_cast<T>(a >> top) : T(0);
    return static_cast<T>(a >> n);
  }
};
struct Popc { template <class T> static uint32_t f(T a) { return static_cast<uint32_t>(__builtin_popcountll(a)); } };
struct Clz { template <class T> static uint32_t f(T a) { return a ? static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); } };
struct Brev {
  template <class T> static T f(T a) {
    uint64_t v = a;
    v = (v >> 1 & 0x5555555555555555) | (v & 0x5555555555555555) << 1;
    v = (v >> 2 & 0x3333333333333333) | (v & 0x3333333333333333) << 2;
    v = (v >> 4 & 0x0F0F0F0F0F0F0F0F) | (v & 0x0F0F0F0F0F0F0F0F) << 4;
    return static_cast<T>(__builtin_bswap64(v) >> (64 - 8 * sizeof(T)));
  }
};
struct Bfind {
  template <class T> static uint32_t f(const Instr& in, T a) {
    if (std::is_signed_v<T> && a < 0) a = static_cast<T>(~a);
    if (!a) return ~0u;
    const uint32_t top = 63 - static_cast<uint32_t>(__builtin_clzll(static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(a))));
    return in.a ? 8 * sizeof(T) - 1 - top : top;
  }
};
struct Fns {
  static uint32_t f(uint32_t mask, uint32_t base, int32_t offset) {
    if (base > 31) return ~0u;
    if (offset == 0) return mask >> base & 1 ? base : ~0u;
    const int step = offset > 0 ? 1 : -1;
    int left = offset > 0 ? offset : -offset;
    for (int i = static_cast<int>(base); i >= 0 && i < 32; i += step) if (mask >> i & 1 && --left == 0) return static_cast<uint32_t>(i);
    return ~0u;
  }
};
// A place or length of a bit field: the low byte in the 32-bit forms, the whole number in the 64-bit ones. The ISA restricts
// both to 0..255; this is what the device makes of others.
template <class T> uint32_t field_number(uint32_t n) { return sizeof(T) == 8 ? std::min(n, 64u) : n & 255; }
struct Bfe {
  template <class T> static T f(T a, uint32_t b, uint32_t c) {
    const uint32_t width = 8 * sizeof(T), pos = field_number<T>(b), len = field_number<T>(c);
    using W = std::make_unsigned_t<T>;
    const uint32_t sign_at = std::min(pos + len - 1, width - 1);
    const bool sign = std::is_signed_v<T> && len && (static_cast<W>(a) >> sign_at & 1);
    const W shifted = pos >= width ? W(0) : static_cast<W>(static_cast<W>(a) >> pos);
    if (len == 0) return 0;
    const uint32_t have = pos >= width ? 0 : std::min(len, width - pos);  // bits that come from a; the rest is sign
    const W low = have >= width ? ~W(0) : static_cast<W>((W(1) << have) - 1);
    return static_cast<T>((shifted & low) | (sign ? ~low : W(0)));
  }
};
struct Bfi {
  template <class T> static T f(T a, T b, uint32_t c, uint32_t d) {
    const uint32_t width = 8 * sizeof(T), pos = field_number<T>(c), len = field_number<T>(d);
    if (pos >= width || len == 0) return b;
    const T field = len >= width ? ~T(0) : static_cast<T>((T(1) << len) - 1);
    const T mask = static_cast<T>(field << pos);
    return (b & ~mask) | (static_cast<T>(a << pos) & mask);
  }
};
struct Szext {
  template <class T> static T f(const Instr& in, T a, uint32_t n) {
    if (in.a) n &= 31;
    if (n == 0) return 0;
    if (n >= 32) return a;
    return std::is_signed_v<T> ? static_cast<T>(static_cast<int32_t>(static_cast<uint32_t>(a) << (32 - n)) >> (32 - n)) : static_cast<T>(static_cast<uint32_t>(a) & ((1u << n) - 1));
  }
};
struct Bmsk {
  static uint32_t f(const Instr& in, uint32_t a, uint32_t b) {
    if (in.a) { a &= 31; b &= 31; }
    if (a >= 32) return 0;
    const uint32_t field = b >= 32 ? ~0u : (1u << b) - 1;
    return field << a;
  }
};
struct Shf {
  static uint32_t f(const Instr& in, uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = in.b ? c & 31 : std::min(c, 32u);
    const uint64_t v = uint64_t(b) << 32 | a;
    return in.a ? static_cast<uint32_t>(v >> n) : static_cast<uint32_t>(v << n >> 32);
  }
};
struct Prmt {
  static uint32_t f(const Instr& in, uint32_t a, uint32_t b, uint32_t c) {
    static const uint16_t modes[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, {0x0000, 0x1111, 0x2222, 0x3333},
                                         {0x3210, 0x3211, 0x3222, 0x3333}, {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
    const uint32_t control = in.a ? modes[in.a - 1][c & 3] : c;
    const uint64_t v = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t k = control >> (4 * i) & 15;
      uint32_t byte = v >> (8 * (k & 7)) & 255;
      if (!in.a && k & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};
struct Lop3 {
  static uint32_t f(const Instr& in, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
    if (in.a & 0x01) r |= ~a & ~b & ~c;
    if (in.a & 0x02) r |= ~a & ~b & c;
    if (in.a & 0x04) r |= ~a & b & ~c;
    if (in.a & 0x08) r |= ~a & b & c;
    if (in.a & 0x10) r |= a & ~b & ~c;
    if (in.a & 0x20) r |= a & ~b & c;
    if (in.a & 0x40) r |= a & b & ~c;
    if (in.a & 0x80) r |= a & b & c;
    return r;
  }
};
Step lop3_pred(Ctx& c, const Instr& in) {  // d|p = lop3, p = (d != 0) and/or q
  const uint32_t *x = src<uint32_t>(c, in, 1), *y = src<uint32_t>(c, in, 2), *z = src<uint32_t>(c, in, 3);
  uint32_t r[32], p = 0;
  for (int l = 0; l < 32; ++l) { r[l] = Lop3::f(in, x[l], y[l], z[l]); p |= uint32_t(r[l] != 0) << l; }
  const uint32_t q = pred(c, in, 4);
  put(out<uint32_t>(c, in, 0), r, c.mask);
  put_pred(c, in, 5, in.b ? p | q : p & q);
  return Step::next;
}

template <class F> Step pred_logic(Ctx& c, const Instr& in) { put_pred(c, in, 0, F::f(pred(c, in, 1), pred(c, in, 2))); return Step::next; }
Step pred_not(Ctx& c, const Instr& in) { put_pred(c, in, 0, ~pred(c, in, 1)); return Step::next; }
Step pred_mov(Ctx& c, const Instr& in) { put_pred(c, in, 0, pred(c, in, 1)); return Step::next; }

template <class F> void logic(Decode& d) {
  const Type t = d.type();
  if (t == Type::pred) { d.in.run = &pred_logic<F>; d.dst(0, t); d.src(1, t); d.src(2, t); return; }
  d.in.run = by_integer<F, 2>(d, t);
  d.dst(0, t); d.src(1, t); d.src(2, t);
}

template <class F> void shift(Decode& d) {
  const Type t = d.type();
  switch (t) {
    case Type::u16: case Type::b16: d.in.run = &map<F, uint16_t, uint16_t, uint32_t>; break;
    case Type::s16: d.in.run = &map<F, int16_t, int16_t, uint32_t>; break;
    case Type::u32: case Type::b32: d.in.run = &map<F, uint32_t, uint32_t, uint32_t>; break;
    case Type::s32: d.in.run = &map<F, int32_t, int32_t, uint32_t>; break;
    case Type::u64: case Type::b64: d.in.run = &map<F, uint64_t, uint64_t, uint32_t>; break;
    case Type::s64: d.in.run = &map<F, int64_t, int64_t, uint32_t>; break;
    default: d.wrong("takes an integer type");
  }
  d.dst(0, t); d.src(1, t); d.src(2, Type::b32);
}

// mov between a register and a vector of narrower ones: in.a parts of in.b bits.
Step pack(Ctx& c, const Instr& in) {
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t v[2] = {0, 0};
    for (int i = 0; i < in.a; ++i) {
      const uint64_t part = in.b == 64 ? src<uint64_t>(c, in, 1 + i)[l] : src<uint32_t>(c, in, 1 + i)[l];
      const int at = i * in.b;
      v[at / 64] |= (in.b == 64 ? part : part & ((uint64_t{1} << in.b) - 1)) << (at % 64);
    }
    if (in.a * in.b == 128) std::memcpy(c.regs + in.op[0] + 16 * l, v, 16);
    else if (in.a * in.b == 64) out<uint64_t>(c, in, 0)[l] = v[0];
    else out<uint32_t>(c, in, 0)[l] = static_cast<uint32_t>(v[0]);
  }
  return Step::next;
}
Step unpack(Ctx& c, const Instr& in) {  // parts first, then the source
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t v[2] = {0, 0};
    if (in.a * in.b == 128) std::memcpy(v, src<uint8_t>(c, in, in.a) + 16 * l, 16);
    else v[0] = in.a * in.b == 64 ? src<uint64_t>(c, in, in.a)[l] : src<uint32_t>(c, in, in.a)[l];
    for (int i = 0; i < in.a; ++i) {
      const int at = i * in.b;
      const uint64_t part = v[at / 64] >> (at % 64);
      if (in.b == 64) out<uint64_t>(c, in, i)[l] = part;
      else out<uint32_t>(c, in, i)[l] = static_cast<uint32_t>(part & ((uint64_t{1} << in.b) - 1));
    }
  }
  return Step::next;
}
struct Copy1 { template <class T> static T f(T a) { return a; } };
Step mov128(Ctx& c, const Instr& in) {
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) std::memmove(c.regs + in.op[0] + 16 * l, src<uint8_t>(c, in, 1) + 16 * l, 16);
  return Step::next;
}

void mov(Decode& d) {
  const Type t = d.type();
  const bool split = d.arg(0).kind == Arg::vector, join = d.arg(1).kind == Arg::vector;
  if (split || join) {
    if (split && join) d.wrong("one operand must be a register");
    const Arg& v = d.arg(split ? 0 : 1);
    const int n = static_cast<int>(v.parts.size()), width = n ? bits_of(t) / n : 0;
    if ((n != 2 && n != 4) || (width != 8 && width != 16 && width != 32 && width != 64)) d.wrong("packs 2 or 4 parts of 8 to 64 bits");
    const Type part = width == 64 ? Type::b64 : Type::b32;
    d.in.a = static_cast<uint16_t>(n);
    d.in.b = static_cast<uint16_t>(width);
    if (join) d.dst(0, t);
    for (const Arg& p : v.parts) split ? d.dst(p, part) : d.src(p, part);
    if (split) d.src(1, t);
    d.in.run = split ? unpack : pack;
    return;
  }
  d.dst(0, t);
  d.src(1, t);
  d.in.run = t == Type::pred ? pred_mov : bits_of(t) == 128 ? mov128 : wide_type(t) ? &map<Copy1, uint64_t, uint64_t>
             : bits_of(t) == 16 ? &map<Copy1, uint16_t, uint16_t> : &map<Copy1, uint32_t, uint32_t>;
}
}  // namespace

void add_logic(Decoders& t) {
  t["and"] = logic<And>;
  t["or"] = logic<Or>;
  t["xor"] = logic<Xor>;
  t["not"] = [](Decode& d) {
    const Type x = d.type();
    d.in.run = x == Type::pred ? pred_not : by_integer<Not, 1>(d, x);
    d.dst(0, x); d.src(1, x);
  };
  t["cnot"] = [](Decode& d) { const Type x = d.type(); d.in.run = by_integer<Cnot, 1>(d, x); d.dst(0, x); d.src(1, x); };
  t["shl"] = shift<Shl>;
  t["shr"] = shift<Shr>;
  t["mov"] = mov;
  t["popc"] = [](Decode& d) { const Type x = d.type(); d.in.run = wide_type(x) ? &map<Popc, uint32_t, uint64_t> : &map<Popc, uint32_t, uint32_t>; d.dst(0, Type::b32); d.src(1, x); };
  t["clz"] = [](Decode& d) { const Type x = d.type(); d.in.run = wide_type(x) ? &map<Clz, uint32_t, uint64_t> : &map<Clz, uint32_t, uint32_t>; d.dst(0, Type::b32); d.src(1, x); };
  t["brev"] = [](Decode& d) { const Type x = d.type(); d.in.run = wide_type(x) ? &map<Brev, uint64_t, uint64_t> : &map<Brev, uint32_t, uint32_t>; d.dst(0, x); d.src(1, x); };
  t["bfind"] = [](Decode& d) {
    d.in.a = d.take("shiftamt");
    const Type x = d.type();
    d.in.run = x == Type::u32 ? &map_with<Bfind, uint32_t, uint32_t> : x == Type::s32 ? &map_with<Bfind, uint32_t, int32_t>
               : x == Type::u64 ? &map_with<Bfind, uint32_t, uint64_t> : &map_with<Bfind, uint32_t, int64_t>;
    if (!is_integer(x) || bits_of(x) < 32) d.wrong("takes 32 or 64 bits");
    d.dst(0, Type::b32); d.src(1, x);
  };
  t["fns"] = [](Decode& d) { d.type(); d.in.run = &map<Fns, uint32_t, uint32_t, uint32_t, int32_t>; d.dst(0, Type::b32); for (size_t i = 1; i < 4; ++i) d.src(i, Type::b32); };
  t["bfe"] = [](Decode& d) {
    const Type x = d.type();
    d.in.run = x == Type::u32 ? &map<Bfe, uint32_t, uint32_t, uint32_t, uint32_t> : x == Type::s32 ? &map<Bfe, int32_t, int32_t, uint32_t, uint32_t>
               : x == Type::u64 ? &map<Bfe, uint64_t, uint64_t, uint32_t, uint32_t> : &map<Bfe, int64_t, int64_t, uint32_t, uint32_t>;
    if (!is_integer(x) || bits_of(x) < 32) d.wrong("takes 32 or 64 bits");
    d.dst(0, x); d.src(1, x); d.src(2, Type::b32); d.src(3, Type::b32);
  };
  t["bfi"] = [](Decode& d) {
    const Type x = d.type();
    d.in.run = wide_type(x) ? &map<Bfi, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t> : &map<Bfi, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.dst(0, x); d.src(1, x); d.src(2, x); d.src(3, Type::b32); d.src(4, Type::b32);
  };
  t["szext"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(d.must({"clamp", "wrap"}));
    const Type x = d.type();
    d.in.run = is_signed(x) ? &map_with<Szext, int32_t, int32_t, uint32_t> : &map_with<Szext, uint32_t, uint32_t, uint32_t>;
    d.dst(0, x); d.src(1, x); d.src(2, Type::b32);
  };
  t["bmsk"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(d.must({"clamp", "wrap"}));
    d.type();
    d.in.run = &map_with<Bmsk, uint32_t, uint32_t, uint32_t>;
    d.dst(0, Type::b32); d.src(1, Type::b32); d.src(2, Type::b32);
  };
  t["shf"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(d.must({"l", "r"}));
    d.in.b = static_cast<uint16_t>(d.must({"clamp", "wrap"}));
    d.type();
    d.in.run = &map_with<Shf, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.dst(0, Type::b32); for (size_t i = 1; i < 4; ++i) d.src(i, Type::b32);
  };
  t["prmt"] = [](Decode& d) {
    d.type();
    d.in.a = static_cast<uint16_t>(d.choose({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}) + 1);
    d.in.run = &map_with<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.dst(0, Type::b32); for (size_t i = 1; i < 4; ++i) d.src(i, Type::b32);
  };
  t["lop3"] = [](Decode& d) {
    const int either = d.choose({"or", "and"});
    d.type();
    const Arg& table = d.arg(4);
    if (table.kind != Arg::integer || table.value > 255) d.wrong("the truth table is a number up to 255");
    d.in.a = static_cast<uint16_t>(table.value);
    const Arg& to = d.arg(0);
    d.dst(to.kind == Arg::pair ? to.parts[0] : to, Type::b32);
    for (size_t i = 1; i < 4; ++i) d.src(i, Type::b32);
    if (either < 0) { d.in.run = &map_with<Lop3, uint32_t, uint32_t, uint32_t, uint32_t>; return; }
    if (to.kind != Arg::pair) d.wrong("needs d|p");
    d.in.b = either == 0;
    d.src(5, Type::pred);
    d.dst(to.parts[1], Type::pred);
    d.in.run = lop3_pred;
  };
}

}  // namespace dsv4::sim
