// Comparison and selection: set, setp, selp, slct, testp. PTX ISA 9.7.6 and 9.7.7.
#include <cmath>

#include "formats.h"
#include "lanes.h"

namespace dsv4::sim {
namespace {

enum Cmp { eq, ne, lt, le, gt, ge, lo, ls, hi, hs, equ, neu, ltu, leu, gtu, geu, num, nan };

template <class T> uint32_t compare_all(const Slot<T>* a, const Slot<T>* b, int cmp) {
  uint32_t r = 0;
  const auto loop = [&](auto f) { for (int l = 0; l < 32; ++l) r |= static_cast<uint32_t>(f(value_of(from_slot<T>(a[l])), value_of(from_slot<T>(b[l])))) << l; };
  switch (cmp) {
    case eq: loop([](auto x, auto y) { return x == y; }); break;
    case ne: loop([](auto x, auto y) { return x < y || x > y; }); break;  // false for nan
    case lt: case lo: loop([](auto x, auto y) { return x < y; }); break;
    case le: case ls: loop([](auto x, auto y) { return x <= y; }); break;
    case gt: case hi: loop([](auto x, auto y) { return x > y; }); break;
    case ge: case hs: loop([](auto x, auto y) { return x >= y; }); break;
    case equ: loop([](auto x, auto y) { return !(x < y || x > y); }); break;
    case neu: loop([](auto x, auto y) { return !(x == y); }); break;
    case ltu: loop([](auto x, auto y) { return !(x >= y); }); break;
    case leu: loop([](auto x, auto y) { return !(x > y); }); break;
    case gtu: loop([](auto x, auto y) { return !(x <= y); }); break;
    case geu: loop([](auto x, auto y) { return !(x < y); }); break;
    case num: loop([](auto x, auto y) { return x == x && y == y; }); break;
    case nan: loop([](auto x, auto y) { return !(x == x && y == y); }); break;
  }
  return r;
}
template <class T> uint32_t compare_flush(Ctx& c, const Instr& in, int a, int b, bool flush) {
  const Slot<T>*x = src<Slot<T>>(c, in, a), *y = src<Slot<T>>(c, in, b);
  if constexpr (std::is_same_v<T, float>) {
    if (flush) {
      uint32_t fx[32], fy[32];
      for (int l = 0; l < 32; ++l) { fx[l] = x[l] & 0x7F800000 ? x[l] : x[l] & 0x80000000; fy[l] = y[l] & 0x7F800000 ? y[l] : y[l] & 0x80000000; }
      return compare_all<T>(fx, fy, in.a);
    }
  }
  return compare_all<T>(x, y, in.a);
}

uint32_t combine(uint32_t p, uint32_t q, int op) { return op == 1 ? p & q : op == 2 ? p | q : op == 3 ? p ^ q : p; }

// in.a comparison; in.b combination with predicate c; in.c: bit 0 flush, bit 1 second destination
template <class T> Step setp(Ctx& c, const Instr& in) {
  const uint32_t r = compare_flush<T>(c, in, 2, 3, in.c & 1);
  const uint32_t q = in.b ? pred(c, in, 4) : 0;
  put_pred(c, in, 0, combine(r, q, in.b));
  if (in.c & 2) put_pred(c, in, 1, combine(~r, q, in.b));
  return Step::next;
}
template <class T> Step set(Ctx& c, const Instr& in) {  // in.c: bit 0 flush, bit 1 destination f32
  uint32_t r = compare_flush<T>(c, in, 1, 2, in.c & 1);
  if (in.b) r = combine(r, pred(c, in, 3), in.b);
  uint32_t* d = out<uint32_t>(c, in, 0);
  const uint32_t yes = in.c & 2 ? 0x3F800000 : ~0u;
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) d[l] = r >> l & 1 ? yes : 0;
  return Step::next;
}
// Pairs of halves: two predicates for setp, one register of two results for set.
template <class T> Step setp_pair(Ctx& c, const Instr& in) {
  const uint32_t *a = src<uint32_t>(c, in, 2), *b = src<uint32_t>(c, in, 3);
  for (int h = 0; h < 2; ++h) {
    uint32_t x[32], y[32];
    for (int l = 0; l < 32; ++l) { x[l] = a[l] >> (16 * h) & 0xFFFF; y[l] = b[l] >> (16 * h) & 0xFFFF; }
    put_pred(c, in, h, combine(compare_all<T>(x, y, in.a), in.b ? pred(c, in, 4) : 0, in.b));
  }
  return Step::next;
}
template <class T> Step set_pair(Ctx& c, const Instr& in) {  // in.c: what true is, per half
  const uint32_t *a = src<uint32_t>(c, in, 1), *b = src<uint32_t>(c, in, 2);
  uint32_t r[32] = {};
  for (int h = 0; h < 2; ++h) {
    uint32_t x[32], y[32];
    for (int l = 0; l < 32; ++l) { x[l] = a[l] >> (16 * h) & 0xFFFF; y[l] = b[l] >> (16 * h) & 0xFFFF; }
    const uint32_t p = combine(compare_all<T>(x, y, in.a), in.b ? pred(c, in, 3) : 0, in.b);
    for (int l = 0; l < 32; ++l) r[l] |= (p >> l & 1 ? uint32_t{in.c} : 0) << (16 * h);
  }
  put(out<uint32_t>(c, in, 0), r, c.mask);
  return Step::next;
}
template <class T> Step set_half(Ctx& c, const Instr& in) {
  uint32_t p = compare_all<T>(src<uint32_t>(c, in, 1), src<uint32_t>(c, in, 2), in.a);
  if (in.b) p = combine(p, pred(c, in, 3), in.b);
  uint32_t r[32];
  for (int l = 0; l < 32; ++l) r[l] = p >> l & 1 ? in.c : 0;
  put(out<uint32_t>(c, in, 0), r, c.mask);
  return Step::next;
}

#define BY_TYPE(NAME, t)                                                                                      \
  (t == Type::u16 || t == Type::b16 ? &NAME<uint16_t> : t == Type::s16 ? &NAME<int16_t> : t == Type::u32 || t == Type::b32 ? &NAME<uint32_t> \
   : t == Type::s32 ? &NAME<int32_t> : t == Type::u64 || t == Type::b64 ? &NAME<uint64_t> : t == Type::s64 ? &NAME<int64_t>   \
   : t == Type::f32 ? &NAME<float> : t == Type::f64 ? &NAME<double> : t == Type::f16 ? &NAME<Half> : t == Type::bf16 ? &NAME<Bf16> : nullptr)

void relation(Decode& d) {
  d.in.a = static_cast<uint16_t>(d.must({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}));
  d.in.b = static_cast<uint16_t>(d.choose({"and", "or", "xor"}) + 1);
  if (d.take("ftz")) d.in.c |= 1;
}

bool ordered_integer(Type t) { return is_integer(t) || is_bits(t); }

// For integers `ne` must not rely on an order that nan breaks, and needs none: x < y || x > y holds for them as well.
void decode_setp(Decode& d) {
  relation(d);
  const Type t = d.type();
  const Arg& to = d.arg(0);
  d.dst(to.kind == Arg::pair ? to.parts[0] : to, Type::pred);
  if (to.kind == Arg::pair) { d.in.c |= 2; d.dst(to.parts[1], Type::pred); }
  else d.slot(d.slots[0]);
  const bool half_pair = t == Type::f16x2 || t == Type::bf16x2;
  d.src(1, t); d.src(2, t);
  if (d.in.b) d.src(3, Type::pred);
  if (ordered_integer(t) && d.in.a >= equ) d.wrong("this comparison is for floats");
  if (half_pair) {
    if (to.kind != Arg::pair) d.wrong("needs two predicates");
    d.in.run = t == Type::f16x2 ? &setp_pair<Half> : &setp_pair<Bf16>;
    return;
  }
  d.in.run = BY_TYPE(setp, t);
  if (!d.in.run) d.wrong(std::string("type .") + name_of(t) + " is not modelled here");
}

void decode_set(Decode& d) {
  relation(d);
  const Type to = d.type(), t = d.type();
  d.dst(0, to); d.src(1, t); d.src(2, t);
  if (d.in.b) d.src(3, Type::pred);
  if (t == Type::f16x2 || t == Type::bf16x2) {
    d.in.c = to == t ? (t == Type::f16x2 ? 0x3C00 : 0x3F80) : 0xFFFF;
    d.in.run = t == Type::f16x2 ? &set_pair<Half> : &set_pair<Bf16>;
    return;
  }
  if (bits_of(to) == 16) {
    d.in.c = to == Type::f16 ? 0x3C00 : to == Type::bf16 ? 0x3F80 : 0xFFFF;
    if (t == Type::f16) d.in.run = &set_half<Half>;
    else if (t == Type::bf16) d.in.run = &set_half<Bf16>;
    else d.wrong("a 16-bit result is for halves");
    return;
  }
  if (to == Type::f32) d.in.c |= 2;
  else if (to != Type::u32 && to != Type::s32) d.wrong("the result is .u32, .s32 or .f32");
  d.in.run = BY_TYPE(set, t);
  if (!d.in.run) d.wrong(std::string("type .") + name_of(t) + " is not modelled here");
}

template <class T> Step selp(Ctx& c, const Instr& in) {
  const T *a = src<T>(c, in, 1), *b = src<T>(c, in, 2);
  const uint32_t p = pred(c, in, 3);
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
  put(out<T>(c, in, 0), r, c.mask);
  return Step::next;
}
Step selp_pred(Ctx& c, const Instr& in) {
  const uint32_t p = pred(c, in, 3);
  put_pred(c, in, 0, (pred(c, in, 1) & p) | (pred(c, in, 2) & ~p));
  return Step::next;
}
template <class T, class C> Step slct(Ctx& c, const Instr& in) {  // a where c >= 0
  const T *a = src<T>(c, in, 1), *b = src<T>(c, in, 2);
  const uint32_t* k = src<uint32_t>(c, in, 3);
  alignas(64) T r[32];
  for (int l = 0; l < 32; ++l) r[l] = from_slot<C>(k[l]) >= 0 ? a[l] : b[l];
  put(out<T>(c, in, 0), r, c.mask);
  return Step::next;
}
template <class T> Step testp(Ctx& c, const Instr& in) {  // zero is a normal number
  const Slot<T>* a = src<Slot<T>>(c, in, 1);
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) {
    const int k = std::fpclassify(from_slot<T>(a[l]));
    const bool v = in.a == 0 ? k != FP_INFINITE && k != FP_NAN : in.a == 1 ? k == FP_INFINITE : in.a == 2 ? k != FP_NAN
                   : in.a == 3 ? k == FP_NAN : in.a == 4 ? k == FP_NORMAL || k == FP_ZERO : k == FP_SUBNORMAL;
    r |= static_cast<uint32_t>(v) << l;
  }
  put_pred(c, in, 0, r);
  return Step::next;
}
}  // namespace

void add_compare(Decoders& t) {
  t["setp"] = decode_setp;
  t["set"] = decode_set;
  t["selp"] = [](Decode& d) {
    const Type x = d.type();
    d.in.run = x == Type::pred ? selp_pred : wide_type(x) ? &selp<uint64_t> : &selp<uint32_t>;
    if (bits_of(x) > 64) d.wrong("takes up to 64 bits");
    d.dst(0, x); d.src(1, x); d.src(2, x); d.src(3, Type::pred);
  };
  t["slct"] = [](Decode& d) {
    d.take("ftz");
    const Type x = d.type(), k = d.type();
    if (k != Type::s32 && k != Type::f32) d.wrong("selects by .s32 or .f32");
    if (wide_type(x)) d.in.run = k == Type::s32 ? &slct<uint64_t, int32_t> : &slct<uint64_t, float>;
    else d.in.run = k == Type::s32 ? &slct<uint32_t, int32_t> : &slct<uint32_t, float>;
    d.dst(0, x); d.src(1, x); d.src(2, x); d.src(3, k);
  };
  t["testp"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(d.must({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}));
    const Type x = d.type();
    d.in.run = x == Type::f64 ? &testp<double> : &testp<float>;
    d.dst(0, Type::pred); d.src(1, x);
  };
}

}  // namespace dsv4::sim
