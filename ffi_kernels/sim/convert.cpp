// cvt in all its families, and cvt.pack. PTX ISA 9.7.9.21 and 9.7.9.22.
#include <limits>

#include "formats.h"
#include "lanes.h"

namespace dsv4::sim {
namespace {

struct Cvt {  // how a cvt reads, rounds and writes
  Type to, from;
  Round round = Round::rn;
  int integral = -1;  // 0 rni, 1 rzi, 2 rmi, 3 rpi
  bool ftz = false, sat = false, satfinite = false, relu = false;
  int from_slot = 32, to_slot = 32;  // bits of the registers
};

uint64_t read_slot(Ctx& c, const Instr& in, int i, int lane, int slot) { return slot == 64 ? src<uint64_t>(c, in, i)[lane] : src<uint32_t>(c, in, i)[lane]; }
void write_slot(Ctx& c, const Instr& in, int lane, int slot, uint64_t v) {
  if (slot == 64) out<uint64_t>(c, in, 0)[lane] = v;
  else out<uint32_t>(c, in, 0)[lane] = static_cast<uint32_t>(v);
}

// Sources widen exactly: integers to 128 bits or floats to double (u64 and s64 stay integers).
__int128 integer_of(Type t, uint64_t raw) {
  switch (t) {
    case Type::u8: return static_cast<uint8_t>(raw);
    case Type::s8: return static_cast<int8_t>(raw);
    case Type::u16: return static_cast<uint16_t>(raw);
    case Type::s16: return static_cast<int16_t>(raw);
    case Type::u32: return static_cast<uint32_t>(raw);
    case Type::s32: return static_cast<int32_t>(raw);
    case Type::u64: return raw;
    default: return static_cast<int64_t>(raw);
  }
}
double float_of(Type t, uint64_t raw, bool ftz) {
  switch (t) {
    case Type::f16: return value_of(Half{static_cast<uint16_t>(raw)});
    case Type::bf16: return value_of(Bf16{static_cast<uint16_t>(raw)});
    case Type::f32: { const float x = bit_cast<float>(static_cast<uint32_t>(raw)); return ftz ? flush(x) : x; }
    default: return bit_cast<double>(raw);
  }
}
bool is_float(Type t) { return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64; }
uint64_t clamp_to(Type t, __int128 v) {
  const int n = bits_of(t);
  const __int128 low = is_signed(t) ? -(static_cast<__int128>(1) << (n - 1)) : 0, high = (static_cast<__int128>(1) << (is_signed(t) ? n - 1 : n)) - 1;
  return static_cast<uint64_t>(v < low ? low : v > high ? high : v);
}
uint64_t extend(Type t, uint64_t v) {  // to 64 bits, as the type's sign says
  switch (t) {
    case Type::s8: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(v)));
    case Type::s16: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int16_t>(v)));
    case Type::s32: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(v)));
    case Type::u8: return static_cast<uint8_t>(v);
    case Type::u16: return static_cast<uint16_t>(v);
    case Type::u32: return static_cast<uint32_t>(v);
    default: return v;
  }
}
double to_integral(double v, int how) { return how == 0 ? std::nearbyint(v) : how == 1 ? std::trunc(v) : how == 2 ? std::floor(v) : std::ceil(v); }
// An integer as a double that is exact or odd-rounded.
double odd_integer(__int128 v) {
  const bool negative = v < 0;
  unsigned __int128 u = negative ? static_cast<unsigned __int128>(-v) : static_cast<unsigned __int128>(v);
  int shift = 0;
  bool lost = false;
  while (u >> 53) { lost |= u & 1; u >>= 1; ++shift; }
  const double d = std::ldexp(static_cast<double>(static_cast<uint64_t>(u) | (lost ? 1 : 0)), shift);
  return negative ? -d : d;
}
double round_f64(__int128 v, Round mode) {  // only 64-bit integers are inexact in f64
  const double odd = odd_integer(v);
  if (mode == Round::rn) return v < 0 ? -static_cast<double>(static_cast<uint64_t>(-v)) : static_cast<double>(static_cast<uint64_t>(v));
  const double near = v < 0 ? -static_cast<double>(static_cast<uint64_t>(-v)) : static_cast<double>(static_cast<uint64_t>(v));
  const __int128 back = static_cast<__int128>(near);
  (void)odd;
  if (back == v) return near;
  const bool down = mode == Round::rm || (mode == Round::rz && v > 0);
  if (down) return back > v ? std::nextafter(near, -INFINITY) : near;
  return back < v ? std::nextafter(near, INFINITY) : near;
}

uint64_t to_float(const Cvt& k, double v) {
  if (k.sat) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if (k.relu && v <= 0) v = 0;
  switch (k.to) {
    case Type::f16: return encode(v, kF16, k.round, k.satfinite);
    case Type::bf16: return encode(v, kBf16, k.round, k.satfinite);
    case Type::tf32: return uint64_t{encode(v, kTf32, k.round, k.satfinite)} << 13;
    case Type::f64: return bit_cast<uint64_t>(v);
    default: {
      float f = round_float(v, k.round);
      if (k.satfinite && std::isinf(f)) f = f > 0 ? 3.402823466e38f : -3.402823466e38f;
      return bit_cast<uint32_t>(k.ftz ? flush(f) : f);
    }
  }
}

uint64_t convert(const Cvt& k, uint64_t raw) {
  if (is_float(k.from)) {
    double v = float_of(k.from, raw, k.ftz);
    if (is_float(k.to) || k.to == Type::tf32) {
      if (k.integral >= 0) v = to_integral(v, k.integral);
      if (k.to == Type::f64 && v != v && k.from != Type::f64) return 0x7FFFFFFFFFFFFFFFull;
      return to_float(k, v);
    }
    if (v != v) return k.from != Type::f64 && bits_of(k.to) < 64 ? 0 : uint64_t{1} << (bits_of(k.to) - 1);
    v = to_integral(v, k.integral);
    if (v >= 1.9e19) v = 1.9e19;
    if (v <= -1e19) v = -1e19;
    return extend(k.to, clamp_to(k.to, static_cast<__int128>(v)));
  }
  const __int128 v = integer_of(k.from, raw);
  if (is_float(k.to)) return k.to == Type::f64 ? bit_cast<uint64_t>(round_f64(v, k.round)) : to_float(k, odd_integer(v));
  return extend(k.to, k.sat ? clamp_to(k.to, v) : static_cast<uint64_t>(v));
}

Step general(Ctx& c, const Instr& in) {
  const Cvt& k = *static_cast<const Cvt*>(in.extra);
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) write_slot(c, in, l, k.to_slot, convert(k, read_slot(c, in, 1, l, k.from_slot)));
  return Step::next;
}
// The common ones, vectorised.
struct Narrow32 { static uint32_t f(uint64_t a) { return static_cast<uint32_t>(a); } };
struct Widen { template <class T> static uint64_t f(T a) { return static_cast<uint64_t>(static_cast<int64_t>(a)); } };
struct WidenU { static uint64_t f(uint32_t a) { return a; } };
struct FromBf16 { static float f(uint32_t a) { return bit_cast<float>(a << 16); } };
struct FromHalf { static float f(uint32_t a) { return value_of(Half{static_cast<uint16_t>(a)}); } };
struct ToBf16 { static uint32_t f(float a) { return bf16_of(a); } };
struct ToBf16Pair { static uint32_t f(float a, float b) { return uint32_t{bf16_of(a)} << 16 | bf16_of(b); } };
struct FromS32 { static float f(int32_t a) { return static_cast<float>(a); } };
struct FromU32 { static float f(uint32_t a) { return static_cast<float>(a); } };

const Format* small(Type t) {
  switch (t) {
    case Type::e4m3x2: case Type::e4m3x4: return &kE4m3;
    case Type::e5m2x2: case Type::e5m2x4: return &kE5m2;
    case Type::e2m1x2: case Type::e2m1x4: return &kE2m1;
    case Type::e2m3x2: case Type::e2m3x4: return &kE2m3;
    case Type::e3m2x2: case Type::e3m2x4: return &kE3m2;
    default: return nullptr;
  }
}
int cell(Type t) { return small(t) == &kE2m1 ? 4 : 8; }  // bits that an element takes when packed

uint32_t to_scale(const Cvt& k, double v) {  // ue8m0: an exponent; nan is 255
  if (v != v) return 255;
  v = std::fabs(v);  // the sign is not represented
  if (std::isinf(v)) return k.satfinite ? 254 : 255;
  if (v == 0) return 0;
  int e;
  const double m = std::frexp(v, &e);  // v = m 2^e, 0.5 <= m < 1
  int code = e - 1 + 127 + (k.round == Round::rp && m > 0.5 ? 1 : 0);
  if (code < 0) code = 0;
  if (code > 254) code = k.satfinite ? 254 : 255;
  return static_cast<uint32_t>(code);
}
double scale_value(uint32_t code) { return code == 255 ? NAN : std::ldexp(1.0, static_cast<int>(code) - 127); }

uint32_t to_element(const Cvt& k, double v) {
  if (k.to == Type::ue8m0x2) return to_scale(k, v);
  if (k.relu && v <= 0) v = 0;
  if (k.to == Type::f16x2) return encode(v, kF16, k.round, k.satfinite);
  if (k.to == Type::bf16x2) return encode(v, kBf16, k.round, k.satfinite);
  return encode(v, *small(k.to), k.round, true);
}
int width_of(Type t) { return t == Type::f16x2 || t == Type::bf16x2 ? 16 : t == Type::ue8m0x2 ? 8 : cell(t); }
double from_element(Type t, uint32_t code) {
  if (t == Type::f16x2) return value_of(Half{static_cast<uint16_t>(code)});
  if (t == Type::bf16x2) return value_of(Bf16{static_cast<uint16_t>(code)});
  if (t == Type::ue8m0x2) return scale_value(code);
  return decode(code, *small(t));
}
Step pair_from_floats(Ctx& c, const Instr& in) {  // d = {a, b}: a on top
  const Cvt& k = *static_cast<const Cvt*>(in.extra);
  const int w = width_of(k.to);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint32_t high = to_element(k, src<float>(c, in, 1)[l]), low = to_element(k, src<float>(c, in, 2)[l]);
    out<uint32_t>(c, in, 0)[l] = high << w | low;
  }
  return Step::next;
}
Step pair_from_pair(Ctx& c, const Instr& in) {
  const Cvt& k = *static_cast<const Cvt*>(in.extra);
  const int w = width_of(k.to), s = width_of(k.from);
  const uint32_t keep = (1u << s) - 1;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint32_t v = src<uint32_t>(c, in, 1)[l];
    out<uint32_t>(c, in, 0)[l] = to_element(k, from_element(k.from, v >> s & keep)) << w | to_element(k, from_element(k.from, v & keep));
  }
  return Step::next;
}

bool is_pair(Type t) { return t == Type::f16x2 || t == Type::bf16x2 || t == Type::ue8m0x2 || (small(t) && t < Type::e4m3x4); }

void cvt(Decode& d) {
  Cvt k;
  k.integral = d.choose({"rni", "rzi", "rmi", "rpi"});
  const int r = d.choose({"rn", "rz", "rm", "rp", "rna"});
  if (r >= 0) k.round = static_cast<Round>(r);
  if (d.take("rs")) d.wrong("stochastic rounding (.rs) is not modelled: its random bits are laid out in figures only");
  k.ftz = d.take("ftz");
  k.sat = d.take("sat");
  k.satfinite = d.take("satfinite");
  k.relu = d.take("relu");
  k.to = d.type();
  k.from = d.type();
  if (is_pair(k.to)) {
    const bool two = k.from == Type::f32;
    if (!two && !is_pair(k.from)) d.wrong("these types do not convert into each other here");
    if (r < 0) d.wrong("needs a rounding modifier");
    if (k.to == Type::ue8m0x2 && k.round != Round::rz && k.round != Round::rp) d.wrong("rounds with .rz or .rp");
    if (small(k.to) && !k.satfinite) d.wrong("needs .satfinite");
    d.dst(0, bits_of(k.to) <= 16 ? Type::b16 : Type::b32);
    d.src(1, two ? Type::f32 : k.from);
    if (two) d.src(2, Type::f32);
    *d.extra<Cvt>() = k;
    const bool plain = !k.relu && !k.satfinite && k.round == Round::rn;
    d.in.run = two && k.to == Type::bf16x2 && plain ? &map<ToBf16Pair, uint32_t, float, float> : two ? pair_from_floats : pair_from_pair;
    return;
  }
  const bool known = (is_integer(k.to) || is_float(k.to) || k.to == Type::tf32) && (is_integer(k.from) || is_float(k.from));
  if (!known) d.wrong(std::string("conversion from .") + name_of(k.from) + " to ." + name_of(k.to) + " is not modelled");
  if (k.to == Type::tf32 && k.from != Type::f32) d.wrong(".tf32 is made of .f32");
  if (is_float(k.from) && is_integer(k.to) && k.integral < 0) d.wrong("needs .rni, .rzi, .rmi or .rpi");
  const auto slot_bits = [&](const Arg& a, Type t) { return a.kind == Arg::reg ? bits_of(d.f.registers[a.reg_index].type) == 64 ? 64 : 32 : wide_type(t) ? 64 : 32; };
  k.to_slot = slot_bits(d.arg(0), k.to);
  k.from_slot = slot_bits(d.arg(1), k.from);
  if (bits_of(k.to) > k.to_slot || bits_of(k.from) > k.from_slot) d.wrong("a register is narrower than the type");
  d.dst(0, k.to_slot == 64 ? Type::b64 : Type::b32);
  if (d.arg(1).kind == Arg::real) d.src(1, k.from);
  else d.src(1, k.from_slot == 64 ? Type::b64 : Type::b32);
  *d.extra<Cvt>() = k;
  d.in.run = general;
  const bool same_slots = k.to_slot == (wide_type(k.to) ? 64 : 32) && k.from_slot == (wide_type(k.from) ? 64 : 32);
  const bool plain = same_slots && !k.sat && !k.satfinite && !k.relu && !k.ftz && k.integral < 0 && k.round == Round::rn;
  if (!plain) return;
  const Type a = k.from, b = k.to;
  if (bits_of(a) == 64 && is_integer(a) && (b == Type::u32 || b == Type::s32)) d.in.run = &map<Narrow32, uint32_t, uint64_t>;
  else if (bits_of(b) == 64 && is_integer(b) && a == Type::s32) d.in.run = &map<Widen, uint64_t, int32_t>;
  else if (bits_of(b) == 64 && is_integer(b) && a == Type::u32) d.in.run = &map<WidenU, uint64_t, uint32_t>;
  else if (b == Type::f32 && a == Type::bf16) d.in.run = &map<FromBf16, float, uint32_t>;
  else if (b == Type::f32 && a == Type::f16) d.in.run = &map<FromHalf, float, uint32_t>;
  else if (b == Type::bf16 && a == Type::f32) d.in.run = &map<ToBf16, uint32_t, float>;
  else if (b == Type::f32 && a == Type::s32) d.in.run = &map<FromS32, float, int32_t>;
  else if (b == Type::f32 && a == Type::u32) d.in.run = &map<FromU32, float, uint32_t>;
}

// cvt.pack.sat: two integers saturated and packed, above the low part of c where there is one.
Step pack(Ctx& c, const Instr& in) {
  const Cvt& k = *static_cast<const Cvt*>(in.extra);
  const int n = bits_of(k.to);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const auto part = [&](int i) { return static_cast<uint32_t>(clamp_to(k.to, static_cast<int32_t>(src<uint32_t>(c, in, i)[l]))) & ((1u << n) - 1); };
    uint32_t v = part(2) | part(1) << n;
    if (in.a) v |= src<uint32_t>(c, in, 3)[l] << (2 * n);
    out<uint32_t>(c, in, 0)[l] = v;
  }
  return Step::next;
}
}  // namespace

void add_convert(Decoders& t) {
  t["cvt"] = [](Decode& d) {
    if (!d.take("pack")) return cvt(d);
    if (!d.take("sat")) d.wrong("needs .sat");
    Cvt k;
    k.to = d.type();
    k.from = d.type();
    d.maybe_type();
    if (k.from != Type::s32 || !is_integer(k.to) || bits_of(k.to) > 16) d.wrong("packs .s32 into 8 or 16 bits");
    d.in.a = d.args() == 4;
    for (size_t i = 0; i < d.args(); ++i) i ? d.src(i, Type::b32) : d.dst(i, Type::b32);
    *d.extra<Cvt>() = k;
    d.in.run = pack;
  };
}

}  // namespace dsv4::sim
