// mma.sync, ldmatrix, stmatrix, movmatrix. PTX ISA 9.7.14.5.
// One rule gives every fragment: a register holds E elements; with g = lane / 4 and t = lane % 4, register r of A holds row
// g + 8 (r & 1), columns t E .. and 4 E (r >> 1) further; register r of B holds rows t E + 4 E r .. of column g.
// Sums of products are exact to double and rounded once to the type of D. The device truncates the addends of a block to
// a common exponent instead: results agree where sums are exact, and within a few units of the last place elsewhere.
#include "formats.h"
#include "decode.h"

namespace dsv4::sim {
namespace {

struct Mma {
  int m, n, k;
  Type a, b, c, d;
  int a_regs, b_regs, c_regs;
  bool saturate = false;
};

bool together(Ctx& c) {  // .sync.aligned: the whole warp, or it waits for it
  if (c.mask == kAll) return true;
  return gathered(c, kAll);
}

const float* table_of(const Format& f) {
  static float e4m3[256], e5m2[256];
  static const bool ready = [] {
    for (uint32_t i = 0; i < 256; ++i) { e4m3[i] = decode(i, kE4m3); e5m2[i] = decode(i, kE5m2); }
    return true;
  }();
  (void)ready;
  return f.mantissa_bits == 3 ? e4m3 : e5m2;
}

}  // namespace

float matrix_element(Type t, uint32_t word, int e) {
  switch (t) {
    case Type::f16: return value_of(Half{static_cast<uint16_t>(word >> (16 * e))});
    case Type::bf16: return value_of(Bf16{static_cast<uint16_t>(word >> (16 * e))});
    case Type::tf32: return bit_cast<float>(word & 0xFFFFE000);
    case Type::e4m3: return table_of(kE4m3)[word >> (8 * e) & 255];
    case Type::e5m2: return table_of(kE5m2)[word >> (8 * e) & 255];
    case Type::e2m1: return decode(word >> (8 * e) & 15, kE2m1);
    case Type::e2m3: return decode(word >> (8 * e) & 63, kE2m3);
    case Type::e3m2: return decode(word >> (8 * e) & 63, kE3m2);
    case Type::s8: return static_cast<int8_t>(word >> (8 * e));
    case Type::u8: return static_cast<uint8_t>(word >> (8 * e));
    case Type::s4: return static_cast<float>(static_cast<int32_t>(word << (28 - 4 * e)) >> 28);
    case Type::u4: return static_cast<float>(word >> (4 * e) & 15);
    default: return 0;
  }
}

namespace {
template <class Sum> void multiply(const float* a, const float* b, Sum* sum, int k) {  // a [16][k], b [k][8]
  for (int i = 0; i < 16; ++i) {
    Sum row[8];
    for (int j = 0; j < 8; ++j) row[j] = sum[8 * i + j];
    for (int x = 0; x < k; ++x) {
      const Sum v = static_cast<Sum>(a[i * k + x]);
      for (int j = 0; j < 8; ++j) row[j] += v * static_cast<Sum>(b[8 * x + j]);
    }
    for (int j = 0; j < 8; ++j) sum[8 * i + j] = row[j];
  }
}

template <class Sum> Step mma(Ctx& c, const Instr& in) {  // slots: d, a, b, c
  if (!together(c)) return Step::block;
  const Mma& x = *static_cast<const Mma*>(in.extra);
  float a[16 * 64], b[64 * 8];
  const int per_a = 32 / bits_of(x.a), per_b = 32 / bits_of(x.b);
  int slot = x.c_regs;
  for (int r = 0; r < x.a_regs; ++r, ++slot) {
    const uint32_t* w = src<uint32_t>(c, in, slot);
    for (int l = 0; l < 32; ++l) {
      float* to = a + (l / 4 + 8 * (r & 1)) * x.k + (l % 4 + 4 * (r >> 1)) * per_a;
      for (int e = 0; e < per_a; ++e) to[e] = matrix_element(x.a, w[l], e);
    }
  }
  for (int r = 0; r < x.b_regs; ++r, ++slot) {
    const uint32_t* w = src<uint32_t>(c, in, slot);
    for (int l = 0; l < 32; ++l) {
      float* to = b + (l % 4 + 4 * r) * per_b * 8 + l / 4;
      for (int e = 0; e < per_b; ++e) to[8 * e] = matrix_element(x.b, w[l], e);
    }
  }
  Sum sum[16 * 8];
  const auto at = [](int lane, int r, int e) { return (lane / 4 + 8 * r) * 8 + lane % 4 * 2 + e; };
  for (int r = 0; r < x.c_regs; ++r) {
    const uint32_t* w = src<uint32_t>(c, in, slot + r);
    for (int l = 0; l < 32; ++l) {
      if (x.c == Type::f16) for (int e = 0; e < 2; ++e) sum[at(l, r, e)] = static_cast<Sum>(value_of(Half{static_cast<uint16_t>(w[l] >> (16 * e))}));
      else sum[at(l, r / 2, r % 2)] = x.c == Type::f32 ? static_cast<Sum>(bit_cast<float>(w[l])) : static_cast<Sum>(static_cast<int32_t>(w[l]));
    }
  }
  multiply(a, b, sum, x.k);
  for (int r = 0; r < x.c_regs; ++r) {
    uint32_t* w = out<uint32_t>(c, in, r);
    for (int l = 0; l < 32; ++l) {
      if (x.d == Type::f16) {
        w[l] = half_bits(static_cast<double>(sum[at(l, r, 0)])) | uint32_t{half_bits(static_cast<double>(sum[at(l, r, 1)]))} << 16;
      } else {
        const Sum v = sum[at(l, r / 2, r % 2)];
        if constexpr (std::is_same_v<Sum, int64_t>) {
          w[l] = static_cast<uint32_t>(!x.saturate ? v : v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v);
        } else w[l] = bit_cast<uint32_t>(canonical(static_cast<float>(v)));
      }
    }
  }
  return Step::next;
}

Step mma_f64(Ctx& c, const Instr& in) {  // m8n8k4 and m16n8k{4,8,16}
  if (!together(c)) return Step::block;
  const Mma& x = *static_cast<const Mma*>(in.extra);
  double a[16][16] = {}, b[16][8], r[4][32];
  const int tall = x.m / 8;
  for (int i = 0; i < x.a_regs; ++i) for (int l = 0; l < 32; ++l) a[l / 4 + 8 * (i % tall)][l % 4 + 4 * (i / tall)] = src<double>(c, in, x.c_regs + i)[l];
  for (int i = 0; i < x.b_regs; ++i) for (int l = 0; l < 32; ++l) b[l % 4 + 4 * i][l / 4] = src<double>(c, in, x.c_regs + x.a_regs + i)[l];
  for (int i = 0; i < x.c_regs; ++i) {
    for (int l = 0; l < 32; ++l) {
      double s = src<double>(c, in, x.c_regs + x.a_regs + x.b_regs + i)[l];
      for (int k = 0; k < x.k; ++k) s = std::fma(a[l / 4 + 8 * (i / 2)][k], b[k][l % 4 * 2 + i % 2], s);
      r[i][l] = s;
    }
  }
  for (int i = 0; i < x.c_regs; ++i) std::memcpy(out<double>(c, in, i), r[i], sizeof r[i]);
  return Step::next;
}

void decode_mma(Decode& d) {
  if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned (.sp is not modelled)");
  Mma x{};
  const std::string shape = d.first();
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &x.m, &x.n, &x.k) != 3) d.wrong("needs a shape");
  d.take(shape);
  if (!d.take("row") || !d.take("col")) d.wrong("needs .row.col");
  x.saturate = d.take("satfinite");
  x.d = d.type();
  x.a = d.type();
  x.b = d.type();
  x.c = d.type();
  const int bits = bits_of(x.a);
  const bool f64 = x.d == Type::f64;
  const bool real = x.a == Type::f16 || x.a == Type::bf16 || x.a == Type::tf32 || x.a == Type::e4m3 || x.a == Type::e5m2;
  const auto is_byte = [](Type t) { return t == Type::s8 || t == Type::u8; };
  const auto is_nibble = [](Type t) { return t == Type::s4 || t == Type::u4; };
  const auto is_fp8 = [](Type t) { return t == Type::e4m3 || t == Type::e5m2; };
  bool good = x.c == x.d;
  if (f64) good = good && x.a == Type::f64 && x.b == Type::f64 && x.n == 8 && ((x.m == 8 && x.k == 4) || (x.m == 16 && (x.k == 4 || x.k == 8 || x.k == 16)));
  else {
    const int narrow = 128 / bits;  // half of the k that fills four registers of A
    good = good && x.m == 16 && x.n == 8 && (x.k == narrow * 2 || x.k == narrow);
    if (real) good = good && (x.a == x.b || (is_fp8(x.a) && is_fp8(x.b))) && (x.d == Type::f32 || (x.d == Type::f16 && (x.a == Type::f16 || is_fp8(x.a)))) && !x.saturate;
    else good = good && x.d == Type::s32 && ((is_byte(x.a) && is_byte(x.b)) || (is_nibble(x.a) && is_nibble(x.b)));
  }
  if (!good) d.wrong("this shape with these types is not modelled");
  const Type held = f64 ? Type::f64 : Type::b32;
  const int unit = f64 ? 32 : 1024 / bits;
  x.a_regs = x.m * x.k / unit;
  x.b_regs = x.n * x.k / unit;
  x.c_regs = f64 ? x.m * x.n / 32 : x.d == Type::f16 ? 2 : 4;
  const auto regs = [&](size_t i, int n, bool write, Type real_type) {
    const Arg& v = d.arg(i);
    if (v.kind == Arg::vector && v.parts.size() != static_cast<size_t>(n)) d.wrong("operand " + std::to_string(i + 1) + " must have " + std::to_string(n) + " registers");
    if (v.kind != Arg::vector && n != 1) d.wrong("operand " + std::to_string(i + 1) + " must be a vector");
    for (int r = 0; r < n; ++r) {
      const Arg& a = v.kind == Arg::vector ? v.parts[static_cast<size_t>(r)] : v;
      write ? d.dst(a, held) : a.kind == Arg::real ? d.src(a, real_type) : d.src(a, held);
    }
  };
  regs(0, x.c_regs, true, held);
  regs(1, x.a_regs, false, held);
  regs(2, x.b_regs, false, held);
  regs(3, x.c_regs, false, f64 ? Type::f64 : Type::f32);
  *d.extra<Mma>() = x;
  d.in.run = f64 ? mma_f64 : x.d == Type::s32 ? &mma<int64_t> : &mma<double>;
}

// ldmatrix and stmatrix: in.a matrices, in.b transposed, in.c wide address; registers, then the address.
template <bool Store> Step matrix(Ctx& c, const Instr& in) {
  if (!together(c)) return Step::block;
  const int n = in.a;
  for (int i = 0; i < n; ++i) {
    uint16_t rows[8][8];
    uint8_t* where[8];
    for (int r = 0; r < 8; ++r) {
      const uint64_t at = address(c, in, n, in.c, 8 * i + r) + static_cast<uint64_t>(in.imm);
      where[r] = shared_at(c, shared_offset(in.c ? at : static_cast<uint32_t>(at)), 16, 16, Store ? Access::write : Access::read, Space::shared);
      if (!Store) std::memcpy(rows[r], where[r], 16);
      if (watch_of(*c.cta)) touch_memory(c, in, Space::shared, shared_offset(in.c ? at : static_cast<uint32_t>(at)), 16, Store ? Touch::write : Touch::read, 32);
    }
    for (int l = 0; l < 32; ++l) {
      uint16_t* low = in.b ? &rows[l % 4 * 2][l / 4] : &rows[l / 4][l % 4 * 2];
      uint16_t* high = in.b ? &rows[l % 4 * 2 + 1][l / 4] : low + 1;
      if (Store) {
        const uint32_t v = src<uint32_t>(c, in, i)[l];
        *low = static_cast<uint16_t>(v);
        *high = static_cast<uint16_t>(v >> 16);
      } else out<uint32_t>(c, in, i)[l] = *low | uint32_t{*high} << 16;
    }
    if (Store) for (int r = 0; r < 8; ++r) std::memcpy(where[r], rows[r], 16);
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}

void decode_matrix(Decode& d, bool store) {
  if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned");
  if (!d.take("m8n8")) d.wrong("only the shape .m8n8 is modelled");
  const int n = 1 << d.must({"x1", "x2", "x4"});
  d.in.b = d.take("trans");
  d.ignore({"shared", "shared::cta"});
  if (!d.take("b16")) d.wrong("moves .b16");
  const Arg& v = d.arg(store ? 1 : 0);
  if (v.kind == Arg::vector ? v.parts.size() != static_cast<size_t>(n) : n != 1) d.wrong("needs " + std::to_string(n) + " registers");
  for (int i = 0; i < n; ++i) {
    const Arg& a = v.kind == Arg::vector ? v.parts[static_cast<size_t>(i)] : v;
    store ? d.src(a, Type::b32) : d.dst(a, Type::b32);
  }
  d.in.c = d.memory(store ? 0 : 1);
  d.in.a = static_cast<uint16_t>(n);
  d.in.run = store ? &matrix<true> : &matrix<false>;
}

Step movmatrix(Ctx& c, const Instr& in) {
  if (!together(c)) return Step::block;
  const uint32_t* a = src<uint32_t>(c, in, 1);
  uint16_t m[8][8];
  for (int l = 0; l < 32; ++l) for (int e = 0; e < 2; ++e) m[l / 4][l % 4 * 2 + e] = static_cast<uint16_t>(a[l] >> (16 * e));
  uint32_t* r = out<uint32_t>(c, in, 0);
  for (int l = 0; l < 32; ++l) r[l] = m[l % 4 * 2][l / 4] | uint32_t{m[l % 4 * 2 + 1][l / 4]} << 16;
  return Step::next;
}
}  // namespace

void add_matrix(Decoders& t) {
  t["mma"] = decode_mma;
  t["ldmatrix"] = [](Decode& d) { decode_matrix(d, false); };
  t["stmatrix"] = [](Decode& d) { decode_matrix(d, true); };
  t["movmatrix"] = [](Decode& d) {
    if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8") || !d.take("trans") || !d.take("b16")) d.wrong("is written movmatrix.sync.aligned.m8n8.trans.b16");
    d.dst(0, Type::b32); d.src(1, Type::b32);
    d.in.run = movmatrix;
  };
}

}  // namespace dsv4::sim
