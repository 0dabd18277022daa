// f32 and f64 arithmetic, exact under every rounding mode, with .ftz and .sat; approximations (see README: relative error
// of one ulp of the true value, which the device does not promise to match bit for bit). PTX ISA 9.7.3.
// Compiled with -ffp-contract=off: a product and a sum stay two roundings.
#include <cfenv>

#include "formats.h"
#include "lanes.h"

namespace dsv4::sim {

void integer_add(Decode& d, Type t, bool minus);
void integer_mul(Decode& d, Type t);
void integer_mad(Decode& d, Type t);
void integer_div(Decode& d, Type t);
void integer_abs(Decode& d, Type t);
void integer_neg(Decode& d, Type t);
void integer_min(Decode& d, Type t, bool greater);
void carry_add(Decode& d, bool reads);
void carry_sub(Decode& d, bool reads);
void carry_mad(Decode& d, bool reads);
bool half_op(Decode& d, const char* op, Type t);  // half.cpp: true if it took the instruction

namespace {
// Fields: in.a bit 0 ftz, bit 1 sat; in.b rounding.
float in_(const Instr& in, float x) { return in.a & 1 ? flush(x) : x; }
float out_(const Instr& in, float x) {
  if (in.a & 1) x = flush(x);
  if (in.a & 2) x = saturate01(x);
  return canonical(x);
}
Round mode(const Instr& in) { return static_cast<Round>(in.b); }
// Under rm an exact zero sum of opposite signs is -0.
double signed_zero(double s, bool both_positive_zero, Round m) { return m == Round::rm && s == 0 && !both_positive_zero ? -0.0 : s; }

struct FAdd { static float f(float a, float b) { return canonical(a + b); } };
struct FSub { static float f(float a, float b) { return canonical(a - b); } };
struct FMul { static float f(float a, float b) { return canonical(a * b); } };
#ifdef __FMA__
float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
#else
float fused(float a, float b, float c) { return static_cast<float>(odd_fma(a, b, c)); }  // vectorises without the host's fma
#endif
struct FFma { static float f(float a, float b, float c) { return canonical(fused(a, b, c)); } };
struct GAdd {
  static float f(const Instr& in, float a, float b) {
    a = in_(in, a); b = in_(in, b);
    if (in.b == 0) return out_(in, a + b);
    const double s = odd_add(a, b);
    return out_(in, round_float(signed_zero(s, a == 0 && b == 0 && !std::signbit(a) && !std::signbit(b), mode(in)), mode(in)));
  }
};
struct GSub { static float f(const Instr& in, float a, float b) { return GAdd::f(in, a, b != b ? b : -b); } };
struct GMul { static float f(const Instr& in, float a, float b) { return out_(in, round_float(static_cast<double>(in_(in, a)) * in_(in, b), mode(in))); } };
struct GFma {
  static float f(const Instr& in, float a, float b, float c) {
    a = in_(in, a); b = in_(in, b); c = in_(in, c);
    if (in.b == 0) return out_(in, fused(a, b, c));
    const double p = static_cast<double>(a) * b;
    return out_(in, round_float(signed_zero(odd_add(p, c), p == 0 && c == 0 && !std::signbit(p) && !std::signbit(c), mode(in)), mode(in)));
  }
};
double odd_quotient(float a, float b) {
  double q = static_cast<double>(a) / b;
  if (q == 0 || q != q || std::isinf(q)) return q;
  const double rest = std::fma(-q, static_cast<double>(b), static_cast<double>(a));
  uint64_t u = bit_cast<uint64_t>(q);
  if (rest != 0 && !(u & 1)) u += ((rest > 0) == (b > 0)) == (q > 0) ? 1 : uint64_t(-1);
  return bit_cast<double>(u);
}
double odd_root(float a) {
  const double r = std::sqrt(static_cast<double>(a));
  if (r == 0 || r != r || std::isinf(r)) return r;
  const double rest = std::fma(-r, r, static_cast<double>(a));
  uint64_t u = bit_cast<uint64_t>(r);
  if (rest != 0 && !(u & 1)) u += rest > 0 ? 1 : uint64_t(-1);
  return bit_cast<double>(u);
}
struct FDiv { static float f(const Instr& in, float a, float b) { return out_(in, round_float(odd_quotient(in_(in, a), in_(in, b)), mode(in))); } };
struct FDivApprox {  // .approx: |b| above 2^126 gives 0; .full: nan for such b and infinite a
  static float f(const Instr& in, float a, float b) {
    a = in_(in, a); b = in_(in, b);
    const float size = std::fabs(b);
    if (in.c == 1 && size > bit_cast<float>(0x7E800000u) && size < INFINITY) return out_(in, std::isinf(a) ? NAN : 0.0f * (a < 0 ? -1.0f : 1.0f) * (b < 0 ? -1.0f : 1.0f));
    return out_(in, a / b);
  }
};
struct FRcp { static float f(const Instr& in, float a) { return out_(in, round_float(odd_quotient(1.0f, in_(in, a)), mode(in))); } };
struct FSqrt { static float f(const Instr& in, float a) { return out_(in, round_float(odd_root(in_(in, a)), mode(in))); } };
struct FRsqrt { static float f(const Instr& in, float a) { a = in_(in, a); return out_(in, static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)))); } };
struct FEx2 { static float f(const Instr& in, float a) { return out_(in, static_cast<float>(std::exp2(static_cast<double>(in_(in, a))))); } };
struct FLg2 { static float f(const Instr& in, float a) { return out_(in, static_cast<float>(std::log2(static_cast<double>(in_(in, a))))); } };
struct FSin { static float f(const Instr& in, float a) { return out_(in, static_cast<float>(std::sin(static_cast<double>(in_(in, a))))); } };
struct FCos { static float f(const Instr& in, float a) { return out_(in, static_cast<float>(std::cos(static_cast<double>(in_(in, a))))); } };
struct FTanh { static float f(const Instr& in, float a) { return out_(in, static_cast<float>(std::tanh(static_cast<double>(a)))); } };
struct FAbs { static float f(const Instr& in, float a) { return canonical(in_(in, std::fabs(a))); } };
struct FNeg { static float f(const Instr& in, float a) { return canonical(in_(in, -a)); } };
struct FCopysign { static float f(float a, float b) { return bit_cast<float>((bit_cast<uint32_t>(b) & 0x7FFFFFFF) | (bit_cast<uint32_t>(a) & 0x80000000)); } };
struct FMinMax {  // in.b: 0 min, 1 max; in.c: bit 0 NaN, bit 1 xorsign.abs
  static float f(const Instr& in, float a, float b) {
    a = in_(in, a); b = in_(in, b);
    uint32_t sign = 0;
    if (in.c & 2) {
      sign = (bit_cast<uint32_t>(a) ^ bit_cast<uint32_t>(b)) & 0x80000000;
      a = std::fabs(a); b = std::fabs(b);
    }
    if (a != a || b != b) {
      if ((in.c & 1) || (a != a && b != b)) return bit_cast<float>(0x7FFFFFFFu);
      return bit_cast<float>(bit_cast<uint32_t>(a != a ? b : a) | sign);
    }
    const bool a_less = a < b || (a == b && std::signbit(a) && !std::signbit(b));
    return bit_cast<float>(bit_cast<uint32_t>(a_less != (in.b != 0) ? a : b) | sign);
  }
};
struct FMinMax3 { static float f(const Instr& in, float a, float b, float c) { return FMinMax::f(in, FMinMax::f(in, a, b), c); } };

// f64: rn directly; the other modes through the host's rounding mode.
double with_mode(int m, double (*f)(double, double, double), double a, double b, double c) {
  static const int host[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  const int before = std::fegetround();
  std::fesetround(host[m]);
  volatile double x = a, y = b, z = c;
  const volatile double r = f(x, y, z);
  std::fesetround(before);
  return r;
}
__attribute__((noinline)) double dadd(double a, double b, double) { volatile double r = a + b; return r; }
__attribute__((noinline)) double dsub(double a, double b, double) { volatile double r = a - b; return r; }
__attribute__((noinline)) double dmul(double a, double b, double) { volatile double r = a * b; return r; }
__attribute__((noinline)) double ddiv(double a, double b, double) { volatile double r = a / b; return r; }
__attribute__((noinline)) double dfma(double a, double b, double c) { volatile double r = std::fma(a, b, c); return r; }
__attribute__((noinline)) double dsqrt(double a, double, double) { volatile double r = std::sqrt(a); return r; }
template <double (*F)(double, double, double)> struct DOp {
  static double f(const Instr& in, double a, double b, double c) { return in.b ? with_mode(in.b, F, a, b, c) : F(a, b, c); }
  static double f(const Instr& in, double a, double b) { return f(in, a, b, 0); }
  static double f(const Instr& in, double a) { return f(in, a, 0, 0); }
};
struct DRcp { static double f(const Instr& in, double a) { return in.b ? with_mode(in.b, ddiv, 1.0, a, 0) : 1.0 / a; } };
struct DRsqrt { static double f(const Instr&, double a) { return 1.0 / std::sqrt(a); } };
struct DMinMax { static double f(const Instr& in, double a, double b) { return a != a ? b : b != b ? a : (a < b || (a == b && std::signbit(a))) != (in.b != 0) ? a : b; } };
struct DAbs { static double f(const Instr&, double a) { return std::fabs(a); } };
struct DNeg { static double f(const Instr&, double a) { return a != a ? bit_cast<double>(bit_cast<uint64_t>(a) | uint64_t{1} << 51) : -a; } };  // nan: made quiet, its sign kept
struct DCopysign { static double f(double a, double b) { return std::copysign(b, a); } };

// f32x2 (sm_100): the scalar op on both halves of a 64-bit register.
template <class F, class... S> struct Both {
  static uint64_t f(const Instr& in, S... s) {
    const float low = F::f(in, bit_cast<float>(static_cast<uint32_t>(s))...), high = F::f(in, bit_cast<float>(static_cast<uint32_t>(s >> 32))...);
    return uint64_t{bit_cast<uint32_t>(high)} << 32 | bit_cast<uint32_t>(low);
  }
};

void modes(Decode& d, bool approx_only = false) {
  const int r = d.choose({"rn", "rz", "rm", "rp"});
  if (approx_only && r >= 0) d.wrong("this rounding mode is not modelled here");
  d.in.b = static_cast<uint16_t>(r < 0 ? 0 : r);
  if (d.take("ftz")) d.in.a |= 1;
  if (d.take("sat")) d.in.a |= 2;
}
void operands(Decode& d, Type t, size_t sources) {
  d.dst(0, t);
  for (size_t i = 1; i <= sources; ++i) d.src(i, t);
}
[[noreturn]] void unknown(Decode& d, Type t) { d.wrong(std::string("type .") + name_of(t) + " is not modelled here"); }

template <class Fast, class General, class D, void (*Integer)(Decode&, Type)> void two(Decode& d, const char* op) {
  modes(d);
  const Type t = d.type();
  if (half_op(d, op, t)) return;
  if (t == Type::f32) d.in.run = d.in.a || d.in.b ? &map_with<General, float, float, float> : &map<Fast, float, float, float>;
  else if (t == Type::f64) d.in.run = &map_with<D, double, double, double>;
  else if (t == Type::f32x2) d.in.run = &map_with<Both<General, uint64_t, uint64_t>, uint64_t, uint64_t, uint64_t>;
  else {
    if (d.in.a & 1) d.wrong(".ftz is for .f32");
    if (d.in.a & 2) { d.in.a = 0; if (t != Type::s32) d.wrong(".sat is for .s32 and floats"); }
    return Integer(d, t);
  }
  operands(d, t, 2);
}
void three(Decode& d, const char* op) {  // fma, mad
  modes(d);
  const bool integer = !std::strcmp(op, "mad") && (d.first() == "lo" || d.first() == "hi" || d.first() == "wide");
  if (integer) {
    for (const std::string& m : d.raw.mods) if (m == "cc") return carry_mad(d, false);
    for (const std::string& m : d.raw.mods) if (m == "sat") d.wrong("mad.hi.sat is not modelled");
    const Type t = [&] { for (const std::string& m : d.raw.mods) if (type_named(m) != Type::none) return type_named(m); return Type::none; }();
    d.maybe_type();
    return integer_mad(d, t);
  }
  const Type t = d.type();
  if (half_op(d, "fma", t)) return;
  if (t == Type::f32) d.in.run = d.in.a || d.in.b ? &map_with<GFma, float, float, float, float> : &map<FFma, float, float, float, float>;
  else if (t == Type::f64) d.in.run = &map_with<DOp<dfma>, double, double, double, double>;
  else if (t == Type::f32x2) d.in.run = &map_with<Both<GFma, uint64_t, uint64_t, uint64_t>, uint64_t, uint64_t, uint64_t, uint64_t>;
  else unknown(d, t);
  operands(d, t, 3);
}
void min_max(Decode& d, bool greater) {
  const bool nan = d.take("NaN"), flip = d.take("xorsign");
  if (flip) d.must({"abs"});
  modes(d, true);
  const Type t = d.type();
  d.in.c = static_cast<uint16_t>(nan | flip << 1);
  if (half_op(d, greater ? "max" : "min", t)) return;
  d.in.b = greater;
  if (t == Type::f32 && d.args() == 4) d.in.run = &map_with<FMinMax3, float, float, float, float>;
  else if (t == Type::f32) d.in.run = &map_with<FMinMax, float, float, float>;
  else if (t == Type::f64) d.in.run = &map_with<DMinMax, double, double, double>;
  else {
    if (nan || flip || d.in.a) d.wrong("these modifiers are for floats");
    d.in.b = d.in.c = 0;
    return integer_min(d, t, greater);
  }
  operands(d, t, d.args() - 1);
}
template <class F, class D> void one(Decode& d, const char* op, bool approx) {
  d.take("approx");
  modes(d);
  const Type t = d.type();
  if (half_op(d, op, t)) return;
  if (t == Type::f32) d.in.run = &map_with<F, float, float>;
  else if (t == Type::f64 && !std::is_same_v<D, void>) { if constexpr (!std::is_same_v<D, void>) d.in.run = &map_with<D, double, double>; }
  else unknown(d, t);
  (void)approx;
  operands(d, t, 1);
}
template <class F, class D, void (*Integer)(Decode&, Type)> void sign(Decode& d, const char* op) {
  if (d.take("ftz")) d.in.a |= 1;
  const Type t = d.type();
  if (half_op(d, op, t)) return;
  if (t == Type::f32) d.in.run = &map_with<F, float, float>;
  else if (t == Type::f64) d.in.run = &map_with<D, double, double>;
  else return Integer(d, t);
  operands(d, t, 1);
}
void no_integer(Decode& d, Type t) { unknown(d, t); }
void int_add(Decode& d, Type t) { integer_add(d, t, false); }
void int_sub(Decode& d, Type t) { integer_add(d, t, true); }
bool has(const Decode& d, const char* m) { for (const std::string& x : d.raw.mods) if (x == m) return true; return false; }
}  // namespace

void add_float(Decoders& t) {
  t["add"] = [](Decode& d) {
    if (has(d, "cc")) return carry_add(d, false);
    if (has(d, "s32") && has(d, "sat")) { d.type(); return integer_add(d, Type::s32, false); }
    two<FAdd, GAdd, DOp<dadd>, int_add>(d, "add");
  };
  t["sub"] = [](Decode& d) {
    if (has(d, "cc")) return carry_sub(d, false);
    if (has(d, "s32") && has(d, "sat")) { d.type(); return integer_add(d, Type::s32, true); }
    two<FSub, GSub, DOp<dsub>, int_sub>(d, "sub");
  };
  t["mul"] = [](Decode& d) { two<FMul, GMul, DOp<dmul>, integer_mul>(d, "mul"); };
  t["fma"] = [](Decode& d) { three(d, "fma"); };
  t["mad"] = [](Decode& d) { three(d, "mad"); };
  t["div"] = [](Decode& d) {
    const int approx = d.choose({"approx", "full"});
    modes(d);
    const Type x = d.type();
    if (x == Type::f32) {
      d.in.c = approx == 0;
      d.in.run = approx >= 0 ? &map_with<FDivApprox, float, float, float> : &map_with<FDiv, float, float, float>;
    } else if (x == Type::f64) d.in.run = &map_with<DOp<ddiv>, double, double, double>;
    else return integer_div(d, x);
    operands(d, x, 2);
  };
  t["rcp"] = [](Decode& d) { one<FRcp, DRcp>(d, "rcp", true); };
  t["sqrt"] = [](Decode& d) { one<FSqrt, DOp<dsqrt>>(d, "sqrt", true); };
  t["rsqrt"] = [](Decode& d) { one<FRsqrt, DRsqrt>(d, "rsqrt", true); };
  t["ex2"] = [](Decode& d) { one<FEx2, void>(d, "ex2", true); };
  t["lg2"] = [](Decode& d) { one<FLg2, void>(d, "lg2", true); };
  t["sin"] = [](Decode& d) { one<FSin, void>(d, "sin", true); };
  t["cos"] = [](Decode& d) { one<FCos, void>(d, "cos", true); };
  t["tanh"] = [](Decode& d) { one<FTanh, void>(d, "tanh", true); };
  t["abs"] = [](Decode& d) { sign<FAbs, DAbs, integer_abs>(d, "abs"); };
  t["neg"] = [](Decode& d) { sign<FNeg, DNeg, integer_neg>(d, "neg"); };
  t["min"] = [](Decode& d) { min_max(d, false); };
  t["max"] = [](Decode& d) { min_max(d, true); };
  t["copysign"] = [](Decode& d) {
    const Type x = d.type();
    if (x != Type::f32 && x != Type::f64) unknown(d, x);
    d.in.run = x == Type::f32 ? &map<FCopysign, float, float, float> : &map<DCopysign, double, double, double>;
    operands(d, x, 2);
  };
  (void)no_integer;
}

}  // namespace dsv4::sim
