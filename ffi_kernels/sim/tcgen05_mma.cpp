// tcgen05.mma. PTX ISA 9.7.16.2 to .4, .10. Dense products of kinds f16, tf32, f8f6f4, i8, mxf8f6f4, mxf4 and mxf4nvf4, of
// one CTA (M 64, 128; .ws: 32, 64, 128) or a pair (M 128 without scales, 256).
// Rows of D: M 128 and 256 one lane each; M 64 lanes 32 (r / 16) + r % 16; a pair's M 128 and M 64 of .ws: lanes 0-63 hold
// the first half of the columns, 64-127 the second; M 32 of .ws: a quarter of the columns each. A in tensor memory is read
// by each part of the lanes for its own columns, so that it must stand in all of them. Scale factors of row r: lane r % 32 of every quarter, column r / 32, byte by block.
#include "formats.h"
#include "layout.h"
#include "tcgen05.h"

namespace dsv4::sim {

float matrix_element(Type t, uint32_t word, int e);  // matrix.cpp

namespace {
enum Kind { f16, tf32, f8f6f4, i8, mxf8f6f4, mxf4, mxf4nvf4 };
struct Mma {
  Kind kind;
  int group = 1, vec = 0;  // scale factors per row and step
  bool a_in_tensor = false, ws = false, zero_columns = false;
  int masks = 0;           // words of the mask of lanes of D that are not written
  int down = 0;            // D is scaled by 2^-down before it is added
};
struct Product {  // an instruction with its descriptors read
  int m, n, k;
  Type a, b, d;
  bool negate_a, negate_b, mn_a, mn_b, saturate, add;
  bool padded;  // 6- and 4-bit elements lie 16 to 16 bytes of shared memory, packed, then padding
  int vec, sfa, sfb;  // scale factors; their ids
  bool ue4m3;
  uint32_t to, a_tensor, scale_a, scale_b;
  bool a_in_tensor;
  int group, down, parts;  // parts: of the columns, each in lanes of its own
  uint32_t off[4];  // lanes of D that are not written
  MatrixLayout la, lb;
};

Product read(const Mma& x, uint32_t i) {
  static const Type narrow[] = {Type::e4m3, Type::e5m2, Type::none, Type::e2m3, Type::e3m2, Type::e2m1, Type::none, Type::none};
  Product p{};
  const int a = i >> 7 & 7, b = i >> 10 & (x.kind >= mxf4 ? 3 : 7), d = i >> 4 & 3;
  if (i >> 2 & 1) fail("sparse products are not modelled");
  p.negate_a = i >> 13 & 1; p.negate_b = i >> 14 & 1; p.mn_a = i >> 15 & 1; p.mn_b = i >> 16 & 1;
  p.n = static_cast<int>(i >> 17 & 63) * 8;
  p.d = Type::f32;
  p.vec = x.vec;
  p.group = x.group;
  p.a_in_tensor = x.a_in_tensor;
  p.down = x.down;
  if (x.kind >= mxf8f6f4) {
    p.m = static_cast<int>(i >> 27 & 3) * 128;
    p.sfb = i >> 4 & 3;
    p.sfa = i >> 29 & 3;
    p.ue4m3 = !(i >> 23 & 1);
    if (i >> 31) fail("K = 96 is not modelled");
    if (p.ue4m3 && x.kind != mxf4nvf4) fail("scale factors of this kind are ue8m0; the instruction descriptor says ue4m3");
    if (p.ue4m3 && x.vec != 4) fail("scale factors of type ue4m3 go with blocks of 16");
    if (x.vec == 2 && (p.sfa & 1 || p.sfb & 1)) fail("scale factor ids %d and %d; they must be 0 or 2", p.sfa, p.sfb);
    if (x.vec == 4 && (p.sfa || p.sfb)) fail("scale factor ids %d and %d; they must be 0", p.sfa, p.sfb);
  } else {
    p.m = static_cast<int>(i >> 24 & 31) * 16;
    p.saturate = i >> 3 & 1;
    if (i >> 30) fail("a shift for reuse of B belongs to .ws");
    if (x.kind == i8 ? d != 2 : d != 1 && !(d == 0 && (x.kind == f16 || x.kind == f8f6f4))) fail("the instruction descriptor names D type %d", d);
    p.d = x.kind == i8 ? Type::s32 : d == 0 ? Type::f16 : Type::f32;
  }
  switch (x.kind) {
    case f16: p.a = a ? Type::bf16 : Type::f16; p.b = b ? Type::bf16 : Type::f16; p.k = 16; if (a != b || a > 1) fail("the types of A and B differ"); break;
    case tf32: p.a = p.b = Type::tf32; p.k = 8; if (a != 2 || b != 2) fail("the descriptor does not say tf32"); break;
    case i8: p.a = a ? Type::s8 : Type::u8; p.b = b ? Type::s8 : Type::u8; p.k = 32; break;
    case f8f6f4: case mxf8f6f4: p.a = narrow[a]; p.b = narrow[b]; p.k = 32; break;
    default: p.a = p.b = Type::e2m1; p.k = 64; if (a != 1 || b != 1) fail("the instruction descriptor does not say e2m1"); break;
  }
  if (x.kind == f8f6f4 || x.kind == mxf8f6f4) {
    if (p.a == Type::none || p.b == Type::none) fail("the instruction descriptor names types %d and %d", a, b);
    if (p.a_in_tensor && bits_of(p.a) < 8) fail("6- and 4-bit elements of A in tensor memory are not modelled in this kind");
    p.padded = true;
  }
  const bool scaled = x.kind >= mxf8f6f4;
  const bool good = x.ws ? (p.m == 32 || p.m == 64 || p.m == 128) && (p.n == 64 || p.n == 128 || p.n == 256)
                    : x.group == 1 ? p.m == 128 || (p.m == 64 && !scaled) : p.m == 256 || (p.m == 128 && !scaled);
  const int step = x.group == 1 ? 8 : 16;
  p.parts = x.ws ? 128 / p.m : x.group == 2 && p.m == 128 ? 2 : 1;
  if (!good || p.n < step || p.n > 256 || p.n % step) fail("a product of shape %dx%dx%d for %d CTA%s is not modelled", p.m, p.n, p.k, x.group, x.group > 1 ? "s" : "");
  if ((p.mn_a || p.mn_b) && (x.kind == tf32 || x.kind >= mxf4)) fail("this kind cannot be transposed, or that is not modelled");
  return p;
}

int cells_of(Type t) { return t == Type::e2m1 ? 4 : bits_of(t); }  // bits of an element in memory

// [row][k] from shared memory of `cta`.
void gather(Ctx& c, Cta& cta, const MatrixLayout& m, Type t, bool padded, int rows, int k, bool negate, float* to, const JobEntity* job) {
  const int narrow = bits_of(t), bits = padded ? 8 : cells_of(t), outer = m.k_major ? rows : k, inner = (m.k_major ? k : rows) * bits / 8, per = 32 / bits;
  for (int o = 0; o < outer; ++o) {
    for (int b = 0; b < inner; b += 16) {
      const uint32_t at = cta.rank << 24 | m.at(static_cast<uint32_t>(o), static_cast<uint32_t>(b));
      const uint8_t* p = shared_at(c, at, 16, 16, Access::read, Space::cluster);
      if (job) { watch_of(*c.cta)->job_touch(c, *job, cta, (at & 0xFFFFFF) - kSharedBase, 16, false, true); continue; }
      uint8_t spread[16];
      if (narrow < bits) {
        for (int e = 0; e < 16; ++e) {
          const int bit = e * narrow;
          spread[e] = static_cast<uint8_t>((p[bit / 8] | p[bit / 8 + 1] << 8) >> bit % 8 & ((1 << narrow) - 1));
        }
        p = spread;
      }
      for (int w = 0; w < 4; ++w) {
        uint32_t word;
        std::memcpy(&word, p + 4 * w, 4);
        for (int e = 0; e < per; ++e) {
          const int i = (b + 4 * w) * 8 / bits + e;
          float v = t == Type::e2m1 && !padded ? decode(word >> (4 * e) & 15, kE2m1) : matrix_element(t, word, e);
          if (negate) v = -v;
          to[m.k_major ? o * k + i : i * k + o] = v;
        }
      }
    }
  }
}

float scale_of(uint8_t code, bool ue4m3) { return ue4m3 ? decode(code & 0x7F, kE4m3) : code == 255 ? NAN : std::ldexp(1.0f, code - 127); }

// Scale factors of `rows` rows: lane r % 32 of the four quarters alike.
void scales(Cta& cta, uint32_t column, int rows, int vec, int id, bool ue4m3, std::vector<float>& to) {
  TensorMemory& t = tensor_of(cta);
  to.resize(static_cast<size_t>(rows * vec));
  for (int r = 0; r < rows; ++r) {
    const auto lane = static_cast<uint32_t>(r % 32), at = column + static_cast<uint32_t>(r / 32);
    const uint32_t word = t.at(lane, at);
    for (uint32_t q = 1; q < 4; ++q) {
      if (t.at(lane + 32 * q, at) != word) fail("the scale factors in column %u differ between the quarters of tensor memory (lane %u); they must be replicated", at, lane);
    }
    for (int v = 0; v < vec; ++v) to[static_cast<size_t>(r * vec + v)] = scale_of(static_cast<uint8_t>(word >> (8 * (id + v))), ue4m3);
  }
}

// The rows of D that `cta` holds.
template <class Sum> void multiply(Ctx& c, const Product& p, Cta& cta, Cta* other, int rows) {
  const int n = p.n, k = p.k, copies = p.a_in_tensor ? p.parts : 1;
  std::vector<float> a(static_cast<size_t>(copies * rows * k)), b(static_cast<size_t>(n * k)), sa, sb;
  TensorMemory& t = tensor_of(cta);
  const auto lane_of = [&](int r, int part = 0) { return static_cast<uint32_t>(p.parts == 1 && p.group == 1 && p.m == 64 ? r / 16 * 32 + r % 16 : r + 128 / p.parts * part); };
  if (p.a_in_tensor) {
    const int per = 32 / cells_of(p.a);
    for (int x = 0; x < copies * rows; ++x) for (int i = 0; i < k; ++i) {
      const uint32_t word = t.at(lane_of(x % rows, x / rows), p.a_tensor + static_cast<uint32_t>(i / per));
      const float v = p.a == Type::e2m1 ? decode(word >> (4 * (i % per)) & 15, kE2m1) : matrix_element(p.a, word, i % per);
      a[static_cast<size_t>(x * k + i)] = p.negate_a ? -v : v;
    }
  } else gather(c, cta, p.la, p.a, p.padded, rows, k, p.negate_a, a.data(), nullptr);
  if (!other) gather(c, cta, p.lb, p.b, p.padded, n, k, p.negate_b, b.data(), nullptr);
  else {  // each CTA of the pair holds half of B
    Cta& even = cta.rank % 2 ? *other : cta;
    Cta& odd = cta.rank % 2 ? cta : *other;
    gather(c, even, p.lb, p.b, p.padded, n / 2, k, p.negate_b, b.data(), nullptr);
    gather(c, odd, p.lb, p.b, p.padded, n / 2, k, p.negate_b, b.data() + n / 2 * k, nullptr);
  }
  if (p.vec) {
    scales(cta, p.scale_a, rows, p.vec, p.sfa, p.ue4m3, sa);
    scales(cta, p.scale_b, n, p.vec, p.sfb, p.ue4m3, sb);
    const int block = k / p.vec;  // products of elements and scales stay exact in double, but not in float
    std::vector<double> wide(static_cast<size_t>(n * k));
    for (int j = 0; j < n; ++j) for (int i = 0; i < k; ++i) wide[static_cast<size_t>(i * n + j)] = static_cast<double>(b[static_cast<size_t>(j * k + i)]) * sb[static_cast<size_t>(j * p.vec + i / block)];
    for (int r = 0; r < rows; ++r) {
      std::vector<double> sum(static_cast<size_t>(n), 0.0);
      for (int j = 0; p.add && j < n; ++j) sum[static_cast<size_t>(j)] = bit_cast<float>(t.at(lane_of(r), p.to + static_cast<uint32_t>(j)));
      for (int i = 0; i < k; ++i) {
        const double v = static_cast<double>(a[static_cast<size_t>(r * k + i)]) * sa[static_cast<size_t>(r * p.vec + i / block)];
        const double* from = &wide[static_cast<size_t>(i * n)];
        for (int j = 0; j < n; ++j) sum[static_cast<size_t>(j)] += v * from[j];
      }
      for (int j = 0; j < n; ++j) t.at(lane_of(r), p.to + static_cast<uint32_t>(j)) = bit_cast<uint32_t>(canonical(static_cast<float>(sum[static_cast<size_t>(j)])));
    }
    return;
  }
  std::vector<Sum> wide(static_cast<size_t>(n * k)), sum(static_cast<size_t>(n / p.parts));
  for (int j = 0; j < n; ++j) for (int i = 0; i < k; ++i) wide[static_cast<size_t>(i * n + j)] = static_cast<Sum>(b[static_cast<size_t>(j * k + i)]);
  const int width = n / p.parts;
  for (int x = 0; x < p.parts * rows; ++x) {
    const int r = x % rows, part = x / rows;
    const uint32_t lane = lane_of(r, part);
    if (p.off[lane / 32] >> lane % 32 & 1) continue;
    const auto word = [&](int j) -> uint32_t& { return t.at(lane, p.to + static_cast<uint32_t>(j)); };
    for (int j = 0; j < width; ++j) {
      const uint32_t w = p.add ? word(j) : 0;
      sum[static_cast<size_t>(j)] = p.d == Type::s32 ? static_cast<Sum>(static_cast<int32_t>(w)) : p.d == Type::f16 ? static_cast<Sum>(value_of(Half{static_cast<uint16_t>(w)})) : static_cast<Sum>(bit_cast<float>(w));
    }
    if (p.down) for (Sum& s : sum) s = static_cast<Sum>(std::ldexp(static_cast<double>(s), -p.down));
    for (int i = 0; i < k; ++i) {
      const Sum v = static_cast<Sum>(a[static_cast<size_t>(((copies > 1 ? part : 0) * rows + r) * k + i)]);
      const Sum* from = &wide[static_cast<size_t>(i * n + part * width)];
      for (int j = 0; j < width; ++j) sum[static_cast<size_t>(j)] += v * from[j];
    }
    for (int j = 0; j < width; ++j) {
      const Sum s = sum[static_cast<size_t>(j)];
      if constexpr (std::is_same_v<Sum, int64_t>) word(j) = static_cast<uint32_t>(!p.saturate ? s : s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : s);
      else word(j) = p.d == Type::f16 ? half_bits(static_cast<double>(s)) : bit_cast<uint32_t>(canonical(static_cast<float>(s)));
    }
  }
}

// Slots: d, a (descriptor or tensor address), b, instruction descriptor, [scale a, scale b], [words of the mask], add, [.ws: mask of columns].
Step mma(Ctx& c, const Instr& in) {
  const Mma& x = *static_cast<const Mma*>(in.extra);
  note(c, in);
  same_group(c, x.group);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    Product p = read(x, src<uint32_t>(c, in, 3)[l]);
    const int after = x.vec ? 6 : 4 + x.masks;
    for (int i = 0; i < x.masks; ++i) {
      const uint32_t off = src<uint32_t>(c, in, 4 + i)[l];
      if (off && x.masks > 4) fail("lanes of D are disabled in a product of a pair of CTAs, which is not modelled");
      p.off[i % 4] = off;
    }
    p.to = src<uint32_t>(c, in, 0)[l] + static_cast<uint32_t>(in.imm);
    p.add = pred(c, in, after) >> l & 1;
    if (x.a_in_tensor) p.a_tensor = src<uint32_t>(c, in, 1)[l];
    else p.la = tensor_layout_of(src<uint64_t>(c, in, 1)[l], !p.mn_a);
    p.lb = tensor_layout_of(src<uint64_t>(c, in, 2)[l], !p.mn_b);
    const uint32_t used = c.machine->options.strict ? ~0u : 0x3FFFFFFFu;  // devices ignore bits 30 and 31 of these addresses
    if (x.vec) { p.scale_a = src<uint32_t>(c, in, 4)[l] & used; p.scale_b = src<uint32_t>(c, in, 5)[l] & used; }
    if (p.to >> 16 || p.a_tensor >> 16 || p.scale_a >> 16 || p.scale_b >> 16) fail("an operand in tensor memory starts at a lane other than 0, which is not modelled");
    Cta* other = x.group == 2 ? &peer_of(c) : nullptr;
    const int rows = x.group == 2 ? p.m / 2 : p.m;
    const JobEntity job = next_tensor_entity(c);
    const auto columns = static_cast<uint32_t>(p.n / p.parts);
    if (x.zero_columns && src<uint64_t>(c, in, after + 1)[l]) fail("a mask of columns of B, which is not modelled");
    for (Cta* cta : {c.cta, other}) {
      if (!cta) continue;
      check_columns(*cta, p.to, columns, "D");
      if (x.a_in_tensor) check_columns(*cta, p.a_tensor, static_cast<uint32_t>(p.k * cells_of(p.a) / 32), "A");
      if (x.vec) {
        check_columns(*cta, p.scale_a, static_cast<uint32_t>((rows + 31) / 32), "the scale factors of A");
        check_columns(*cta, p.scale_b, static_cast<uint32_t>((p.n + 31) / 32), "the scale factors of B");
      }
      if (!watch_of(*c.cta)) continue;
      touch_tensor(c, *cta, 0, 128, p.to, columns, true, &job);
      if (x.a_in_tensor) touch_tensor(c, *cta, 0, 128, p.a_tensor, static_cast<uint32_t>(p.k * cells_of(p.a) / 32), false, &job);
      else gather(c, *cta, p.la, p.a, p.padded, rows, p.k, false, nullptr, &job);
      gather(c, *cta, p.lb, p.b, p.padded, other ? p.n / 2 : p.n, p.k, false, nullptr, &job);
      if (x.vec) {
        touch_tensor(c, *cta, 0, 128, p.scale_a, static_cast<uint32_t>((rows + 31) / 32), false, &job);
        touch_tensor(c, *cta, 0, 128, p.scale_b, static_cast<uint32_t>((p.n + 31) / 32), false, &job);
      }
    }
    issue_tensor_op(c, [p, other, rows](Ctx& later) {
      for (int i = 0; i < (other ? 2 : 1); ++i) {
        Cta& cta = i ? *other : *later.cta;
        Cta* peer = other ? (i ? later.cta : other) : nullptr;
        if (p.d == Type::s32) multiply<int64_t>(later, p, cta, peer, rows);
        else multiply<double>(later, p, cta, peer, rows);
      }
    });
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}
}  // namespace

void decode_tensor_mma(Decode& d) {
  Mma x{};
  x.ws = d.take("ws");
  x.group = decode_cta_group(d);
  x.kind = static_cast<Kind>(d.must({"kind::f16", "kind::tf32", "kind::f8f6f4", "kind::i8", "kind::mxf8f6f4", "kind::mxf4", "kind::mxf4nvf4"}));
  if (x.kind >= mxf8f6f4) {
    if (!d.take("block_scale")) d.wrong("needs .block_scale");
    const int size = d.choose({"scale_vec::1X", "scale_vec::2X", "scale_vec::4X", "block16", "block32"});
    const int fitting = x.kind == mxf8f6f4 ? 1 : 2;
    x.vec = size < 0 || size == 4 ? fitting : size == 3 ? 4 : 1 << size;
    if (size < 0 && x.kind == mxf4nvf4) d.wrong("needs a scale vector size");
    if (x.kind == mxf8f6f4 ? x.vec != 1 : x.kind == mxf4 ? x.vec != 2 : x.vec != 2 && x.vec != 4) d.wrong("this scale vector size does not go with this kind");
  }
  if (x.ws && (x.group == 2 || x.kind >= mxf8f6f4)) d.wrong(".ws is for one CTA, without scale factors");
  for (const char* buffer : {"a", "b0", "b1", "b2", "b3"}) {
    for (const char* use : {"fill", "use", "lastuse", "discard"}) if ((*buffer == 'b') == x.ws) d.take(std::string("collector::") + buffer + "::" + use);
  }
  const auto tensor = [&](size_t i) {
    if (d.memory(i)) d.wrong("an address in tensor memory has 32 bits");
    const int64_t offset = d.in.imm;
    d.in.imm = 0;
    return offset;
  };
  const int64_t to = tensor(0);
  x.a_in_tensor = d.arg(1).kind == Arg::memory;
  if (x.a_in_tensor) { if (tensor(1)) d.wrong("an offset of A is not modelled"); }
  else d.src(1, Type::b64);
  d.src(2, Type::b64);
  d.src(3, Type::b32);
  size_t i = 4;
  if (x.vec) {
    if (tensor(4) || tensor(5)) d.wrong("an offset of scale factors is not modelled");
    i = 6;
  }
  if (d.arg(i).kind == Arg::vector) {
    const Arg& mask = d.arg(i++);
    x.masks = 4 * x.group;
    if (x.vec || mask.parts.size() != static_cast<size_t>(x.masks)) d.wrong("needs " + std::to_string(x.masks) + " words of disabled lanes, and no scale factors");
    for (const Arg& word : mask.parts) d.src(word, Type::b32);
  }
  d.src(i++, Type::pred);
  x.zero_columns = x.ws && i < d.args();
  if (x.zero_columns) d.src(i, Type::b64);
  else if (i < d.args()) {
    const Arg& down = d.arg(i);
    if (down.kind != Arg::integer || down.value > 15 || x.kind > tf32) d.wrong("scale-input-d is an immediate of 0 to 15, of kinds f16 and tf32");
    x.down = static_cast<int>(down.value);
  }
  d.in.imm = to;
  *d.extra<Mma>() = x;
  d.in.run = mma;
}

}  // namespace dsv4::sim
