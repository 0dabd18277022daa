// Integer arithmetic: PTX ISA 9.7.1 and 9.7.2 (carries), dp4a, packed 16-bit pairs.
#include "lanes.h"

namespace dsv4::sim {
namespace {

template <class T> using U = std::make_unsigned_t<T>;
struct Add { template <class T> static T f(T a, T b) { return static_cast<T>(U<T>(a) + U<T>(b)); } };
struct Sub { template <class T> static T f(T a, T b) { return static_cast<T>(U<T>(a) - U<T>(b)); } };
struct MulLow { template <class T> static T f(T a, T b) { return static_cast<T>(uint64_t(a) * uint64_t(b)); } };
template <class T> struct Twice;
template <> struct Twice<uint16_t> { using type = uint32_t; };
template <> struct Twice<int16_t> { using type = int32_t; };
template <> struct Twice<uint32_t> { using type = uint64_t; };
template <> struct Twice<int32_t> { using type = int64_t; };
template <> struct Twice<uint64_t> { using type = unsigned __int128; };
template <> struct Twice<int64_t> { using type = __int128; };
struct MulHigh {
  template <class T> static T f(T a, T b) { using W = typename Twice<T>::type; return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T))); }
};
struct MulWide {
  template <class T> static auto f(T a, T b) { using W = typename Twice<T>::type; return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); }
};
struct MadLow { template <class T> static T f(T a, T b, T c) { return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c)); } };
struct MadHigh { template <class T> static T f(T a, T b, T c) { return static_cast<T>(U<T>(MulHigh::f(a, b)) + U<T>(c)); } };
struct MadWide {
  template <class T, class W> static W f(T a, T b, W c) { return static_cast<W>(U<W>(MulWide::f(a, b)) + U<W>(c)); }
};
struct AddSat { static int32_t f(int32_t a, int32_t b) { const int64_t s = int64_t(a) + b; return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : int32_t(s); } };
struct SubSat { static int32_t f(int32_t a, int32_t b) { const int64_t s = int64_t(a) - b; return s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : int32_t(s); } };
struct MadHighSat { static int32_t f(int32_t a, int32_t b, int32_t c) { return AddSat::f(MulHigh::f(a, b), c); } };
struct Div {  // by zero, like Rem: all ones, as the device gives (the ISA leaves it open)
  template <class T> static T f(T a, T b) {
    if (b == 0) return static_cast<T>(~U<T>(0));
    if constexpr (std::is_signed_v<T>) if (b == -1) return static_cast<T>(U<T>(0) - U<T>(a));
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T> static T f(T a, T b) {
    if (b == 0) return static_cast<T>(~U<T>(0));
    if constexpr (std::is_signed_v<T>) if (b == -1) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min { template <class T> static T f(T a, T b) { return a < b ? a : b; } };
struct Max { template <class T> static T f(T a, T b) { return a > b ? a : b; } };
struct MinRelu { template <class T> static T f(T a, T b) { const T m = a < b ? a : b; return m > 0 ? m : T(0); } };
struct MaxRelu { template <class T> static T f(T a, T b) { const T m = a > b ? a : b; return m > 0 ? m : T(0); } };
struct Abs { template <class T> static T f(T a) { return a < 0 ? static_cast<T>(U<T>(0) - U<T>(a)) : a; } };
struct Neg { template <class T> static T f(T a) { return static_cast<T>(U<T>(0) - U<T>(a)); } };
struct Sad { template <class T> static T f(T a, T b, T c) { return static_cast<T>(U<T>(c) + (a < b ? U<T>(b) - U<T>(a) : U<T>(a) - U<T>(b))); } };
template <class Op> struct Pair {  // both halves of 32 bits
  template <class T> static uint32_t half(uint32_t a, uint32_t b) { return static_cast<uint16_t>(Op::f(static_cast<T>(a), static_cast<T>(b))); }
};
template <class Op, class T> struct Packed {
  static uint32_t f(uint32_t a, uint32_t b) { return Pair<Op>::template half<T>(a & 0xFFFF, b & 0xFFFF) | Pair<Op>::template half<T>(a >> 16, b >> 16) << 16; }
};
struct Mul24 {
  template <class T> static int64_t wide(T a) { return std::is_signed_v<T> ? int64_t(int32_t(uint32_t(a) << 8) >> 8) : int64_t(uint32_t(a) & 0xFFFFFF); }
};
template <bool High, bool Plus> struct Mad24 {
  template <class T> static T f(T a, T b, T c) { return static_cast<T>(uint32_t((Mul24::wide(a) * Mul24::wide(b)) >> (High ? 16 : 0)) + (Plus ? uint32_t(c) : 0)); }
  template <class T> static T f(T a, T b) { return f(a, b, T(0)); }
};

template <class F> void binary(Decode& d, Type t) { d.in.run = by_integer<F, 2>(d, t); d.dst(0, t); d.src(1, t); d.src(2, t); }
template <class F> void unary(Decode& d, Type t) { d.in.run = by_integer<F, 1>(d, t); d.dst(0, t); d.src(1, t); }

// add.cc, addc, sub.cc, subc, mad.cc, madc: the carry lives in a predicate of the frame.
template <class T, int Kind> Step carry(Ctx& c, const Instr& in) {  // in.a: reads the carry, in.b: writes it, in.c: high half
  const T *x = src<T>(c, in, 1), *y = src<T>(c, in, 2), *z = Kind == 2 ? src<T>(c, in, 3) : x;
  const int flag = Kind == 2 ? 4 : 3;
  const uint32_t before = pred(c, in, flag);
  uint32_t after = 0;
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) {
    const unsigned __int128 k = in.a ? before >> l & 1 : 0;
    unsigned __int128 s;
    if (Kind == 0) s = static_cast<unsigned __int128>(x[l]) + y[l] + k;
    else if (Kind == 1) s = static_cast<unsigned __int128>(x[l]) - y[l] - k;
    else {
      const T product = in.c == 0 ? static_cast<T>(x[l] * y[l]) : in.c == 1 ? MulHigh::f<T>(x[l], y[l])
                        : static_cast<T>(MulHigh::f<std::make_signed_t<T>>(static_cast<std::make_signed_t<T>>(x[l]), static_cast<std::make_signed_t<T>>(y[l])));
      s = static_cast<unsigned __int128>(product) + z[l] + k;
    }
    r[l] = static_cast<T>(s);
    after |= static_cast<uint32_t>((s >> (8 * sizeof(T))) & 1) << l;
  }
  put(out<T>(c, in, 0), r, c.mask);
  if (in.b) put_pred(c, in, flag, after);
  return Step::next;
}

int32_t carry_flag(Decode& d) {
  for (const Register& r : d.f.registers) if (r.name == "%CC") return r.slot;
  const int32_t s = d.hidden(Type::pred);
  d.f.registers.push_back({"%CC", Type::pred, s});
  return s;
}

template <int Kind> void with_carry(Decode& d, bool reads) {
  d.in.a = reads;
  d.in.b = d.take("cc");
  if (Kind == 2) { const int half = d.must({"lo", "hi"}); d.in.c = static_cast<uint16_t>(half); }
  const Type t = d.type();
  if (!is_integer(t) || bits_of(t) < 32) d.wrong("carries exist for 32 and 64 bits");
  if (Kind == 2 && d.in.c && is_signed(t)) d.in.c = 2;
  d.in.run = wide_type(t) ? &carry<uint64_t, Kind> : &carry<uint32_t, Kind>;
  d.dst(0, t); d.src(1, t); d.src(2, t);
  if (Kind == 2) d.src(3, t);
  d.slot(carry_flag(d));
}

struct Dot {
  static int32_t byte(uint32_t v, int i, bool sign) { const uint32_t b = v >> (8 * i) & 255; return sign ? int8_t(b) : int32_t(b); }
  static int32_t word(uint32_t v, int i, bool sign) { const uint32_t b = v >> (16 * i) & 65535; return sign ? int16_t(b) : int32_t(b); }
  static uint32_t f(const Instr& in, uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 4; ++i) {
      if (in.c == 0) c += static_cast<uint32_t>(byte(a, i, in.a) * byte(b, i, in.b));
      else if (i < 2) c += static_cast<uint32_t>(word(a, i, in.a) * byte(b, i + (in.c == 2 ? 2 : 0), in.b));
    }
    return c;
  }
};

void dot(Decode& d, int kind) {
  if (kind) d.in.c = static_cast<uint16_t>(d.must({"lo", "hi"}) + 1);
  const Type a = d.type(), b = d.type();
  if (bits_of(a) != 32 || bits_of(b) != 32) d.wrong("takes .u32 or .s32");
  d.in.a = is_signed(a);
  d.in.b = is_signed(b);
  d.in.run = &map_with<Dot, uint32_t, uint32_t, uint32_t, uint32_t>;
  d.dst(0, Type::b32);
  for (int i = 1; i < 4; ++i) d.src(static_cast<size_t>(i), Type::b32);
}

template <class F> void packed(Decode& d, Type t) {
  d.in.run = t == Type::u16x2 ? &map<Packed<F, uint16_t>, uint32_t, uint32_t, uint32_t> : &map<Packed<F, int16_t>, uint32_t, uint32_t, uint32_t>;
  d.dst(0, t); d.src(1, t); d.src(2, t);
}
bool is_packed(Type t) { return t == Type::u16x2 || t == Type::s16x2; }
}  // namespace

void integer_add(Decode& d, Type t, bool minus) {  // after the type is known; floats go to float.cpp
  if (is_packed(t)) return minus ? packed<Sub>(d, t) : packed<Add>(d, t);
  if (d.take("sat")) {
    if (t != Type::s32) d.wrong(".sat is for .s32");
    return minus ? binary<SubSat>(d, t) : binary<AddSat>(d, t);
  }
  minus ? binary<Sub>(d, t) : binary<Add>(d, t);
}

void integer_mul(Decode& d, Type t) {
  const int form = d.must({"lo", "hi", "wide"});
  if (form == 0) return binary<MulLow>(d, t);
  if (form == 1) return binary<MulHigh>(d, t);
  switch (t) {
    case Type::u16: d.in.run = &map<MulWide, uint32_t, uint16_t, uint16_t>; break;
    case Type::s16: d.in.run = &map<MulWide, int32_t, int16_t, int16_t>; break;
    case Type::u32: d.in.run = &map<MulWide, uint64_t, uint32_t, uint32_t>; break;
    case Type::s32: d.in.run = &map<MulWide, int64_t, int32_t, int32_t>; break;
    default: d.wrong(".wide takes 16 or 32 bits");
  }
  d.dst(0, bits_of(t) == 16 ? Type::b32 : Type::b64); d.src(1, t); d.src(2, t);
}

void integer_mad(Decode& d, Type t) {
  const int form = d.must({"lo", "hi", "wide"});
  const Type wide = form == 2 ? (bits_of(t) == 16 ? Type::b32 : Type::b64) : t;
  if (form == 0) d.in.run = by_integer<MadLow, 3>(d, t);
  else if (form == 1 && d.take("sat")) { if (t != Type::s32) d.wrong(".sat is for .s32"); d.in.run = &map<MadHighSat, int32_t, int32_t, int32_t, int32_t>; }
  else if (form == 1) d.in.run = by_integer<MadHigh, 3>(d, t);
  else switch (t) {
    case Type::u16: d.in.run = &map<MadWide, uint32_t, uint16_t, uint16_t, uint32_t>; break;
    case Type::s16: d.in.run = &map<MadWide, int32_t, int16_t, int16_t, int32_t>; break;
    case Type::u32: d.in.run = &map<MadWide, uint64_t, uint32_t, uint32_t, uint64_t>; break;
    case Type::s32: d.in.run = &map<MadWide, int64_t, int32_t, int32_t, int64_t>; break;
    default: d.wrong(".wide takes 16 or 32 bits");
  }
  d.dst(0, wide); d.src(1, t); d.src(2, t); d.src(3, wide);
}

void integer_div(Decode& d, Type t) { binary<Div>(d, t); }
void integer_abs(Decode& d, Type t) { if (!is_signed(t)) d.wrong("takes a signed type"); unary<Abs>(d, t); }
void integer_neg(Decode& d, Type t) { unary<Neg>(d, t); }
void integer_min(Decode& d, Type t, bool greater) {
  const bool relu = d.take("relu");
  if (is_packed(t)) {
    if (relu && t == Type::s16x2) return greater ? packed<MaxRelu>(d, t) : packed<MinRelu>(d, t);
    return greater ? packed<Max>(d, t) : packed<Min>(d, t);
  }
  if (relu) {
    if (t != Type::s32) d.wrong(".relu is for signed types");
    return greater ? binary<MaxRelu>(d, t) : binary<MinRelu>(d, t);
  }
  greater ? binary<Max>(d, t) : binary<Min>(d, t);
}
void carry_add(Decode& d, bool reads) { with_carry<0>(d, reads); }
void carry_sub(Decode& d, bool reads) { with_carry<1>(d, reads); }
void carry_mad(Decode& d, bool reads) { with_carry<2>(d, reads); }

void add_integer(Decoders& t) {
  t["rem"] = [](Decode& d) { binary<Rem>(d, d.type()); };
  t["sad"] = [](Decode& d) { const Type x = d.type(); d.in.run = by_integer<Sad, 3>(d, x); d.dst(0, x); for (size_t i = 1; i < 4; ++i) d.src(i, x); };
  t["addc"] = [](Decode& d) { carry_add(d, true); };
  t["subc"] = [](Decode& d) { carry_sub(d, true); };
  t["madc"] = [](Decode& d) { carry_mad(d, true); };
  t["dp4a"] = [](Decode& d) { dot(d, 0); };
  t["dp2a"] = [](Decode& d) { dot(d, 1); };
  t["mul24"] = [](Decode& d) {
    const int high = d.must({"lo", "hi"});
    const Type x = d.type();
    if (bits_of(x) != 32) d.wrong("takes .u32 or .s32");
    if (is_signed(x)) d.in.run = high ? &map<Mad24<true, false>, int32_t, int32_t, int32_t> : &map<Mad24<false, false>, int32_t, int32_t, int32_t>;
    else d.in.run = high ? &map<Mad24<true, false>, uint32_t, uint32_t, uint32_t> : &map<Mad24<false, false>, uint32_t, uint32_t, uint32_t>;
    d.dst(0, x); d.src(1, x); d.src(2, x);
  };
  t["mad24"] = [](Decode& d) {
    const int high = d.must({"lo", "hi"});
    const Type x = d.type();
    if (bits_of(x) != 32) d.wrong("takes .u32 or .s32");
    if (is_signed(x)) d.in.run = high ? &map<Mad24<true, true>, int32_t, int32_t, int32_t, int32_t> : &map<Mad24<false, true>, int32_t, int32_t, int32_t, int32_t>;
    else d.in.run = high ? &map<Mad24<true, true>, uint32_t, uint32_t, uint32_t, uint32_t> : &map<Mad24<false, true>, uint32_t, uint32_t, uint32_t, uint32_t>;
    d.dst(0, x); for (size_t i = 1; i < 4; ++i) d.src(i, x);
  };
}

}  // namespace dsv4::sim
