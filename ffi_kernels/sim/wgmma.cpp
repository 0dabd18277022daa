// wgmma: products of a warpgroup from shared memory, asynchronous until wgmma.wait_group. PTX ISA 9.7.15.
// Each warp computes its own 16 rows when it executes the instruction; wgmma.wait_group waits for the rows of all four.
// Sums as in matrix.cpp.
#include <algorithm>

#include "formats.h"
#include "layout.h"
#include "decode.h"

namespace dsv4::sim {

float matrix_element(Type t, uint32_t word, int e);  // matrix.cpp

namespace {
struct Wgmma {
  int n, k;
  Type a, b, d;
  int d_regs;
  bool a_in_registers;
  bool negate_a = false, negate_b = false, mn_a = false, mn_b = false, saturate = false;
};

MatrixLayout layout_of(uint64_t d, bool k_major) {
  static const uint32_t widths[] = {0, 128, 64, 32};
  if (d >> 49 & 7) fail("a matrix descriptor with base offset %u; only 0 is modelled (align the pattern)", static_cast<unsigned>(d >> 49 & 7));
  return {descriptor_field(d, 0), descriptor_field(d, 16), descriptor_field(d, 32), widths[d >> 62], k_major};
}

// rows x k elements as floats, [row][k]. Touches what it reads when a watch is on and `job` is given.
void gather(Ctx& c, const MatrixLayout& m, Type t, int first_row, int rows, int k, bool negate, float* out_, const JobEntity* job) {
  const int bytes = bits_of(t) / 8, outer = m.k_major ? rows : k, inner = (m.k_major ? k : rows) * bytes;
  const uint32_t base = c.cta->rank << 24;
  const int first = m.k_major ? 0 : first_row * bytes;
  for (int o = 0; o < outer; ++o) {
    for (int b = 0; b < inner; b += 16) {
      const uint32_t at = base | m.at(static_cast<uint32_t>(o + (m.k_major ? first_row : 0)), static_cast<uint32_t>(b + first));
      const uint8_t* p = shared_at(c, at, 16, 16, Access::read, Space::shared);
      if (job) { watch_of(*c.cta)->job_touch(c, *job, *c.cta, (at & 0xFFFFFF) - kSharedBase, 16, false, true); continue; }
      for (int w = 0; w < 4; ++w) {
        uint32_t word;
        std::memcpy(&word, p + 4 * w, 4);
        for (int e = 0; e < 4 / bytes; ++e) {
          const int i = (b + 4 * w) / bytes + e;
          const float v = matrix_element(t, word, e);
          out_[m.k_major ? o * k + i : i * k + o] = negate ? -v : v;
        }
      }
    }
  }
}

template <class Sum> void product(Ctx& c, const Wgmma& x, const int32_t* slots, uint8_t* regs, const MatrixLayout& la, const MatrixLayout& lb, bool add) {
  const int warp = static_cast<int>(c.warp->id % 4), n = x.n, k = x.k;
  std::vector<float> a(static_cast<size_t>(16 * k)), bt(static_cast<size_t>(n * k));
  if (x.a_in_registers) {
    const int per = 32 / bits_of(x.a);
    for (int r = 0; r < 4; ++r) {
      const auto* w = reinterpret_cast<const uint32_t*>(regs + slots[x.d_regs + r]);
      for (int l = 0; l < 32; ++l) {
        for (int e = 0; e < per; ++e) {
          const float v = matrix_element(x.a, w[l], e);
          a[static_cast<size_t>((l / 4 + 8 * (r & 1)) * k + (l % 4 + 4 * (r >> 1)) * per + e)] = x.negate_a ? -v : v;
        }
      }
    }
  } else gather(c, la, x.a, 16 * warp, 16, k, x.negate_a, a.data(), nullptr);
  gather(c, lb, x.b, 0, n, k, x.negate_b, bt.data(), nullptr);
  std::vector<Sum> b(static_cast<size_t>(k * n)), sum(static_cast<size_t>(16 * n), Sum(0));
  for (int j = 0; j < n; ++j) for (int i = 0; i < k; ++i) b[static_cast<size_t>(i * n + j)] = static_cast<Sum>(bt[static_cast<size_t>(j * k + i)]);
  const auto reg = [&](int r) { return reinterpret_cast<uint32_t*>(regs + slots[r]); };
  const bool half = x.d == Type::f16;
  for (int r = 0; add && r < x.d_regs; ++r) {
    for (int l = 0; l < 32; ++l) {
      const uint32_t w = reg(r)[l];
      if (half) {
        Sum* to = &sum[static_cast<size_t>((l / 4 + 8 * (r & 1)) * n + r / 2 * 8 + l % 4 * 2)];
        for (int e = 0; e < 2; ++e) to[e] = static_cast<Sum>(value_of(Half{static_cast<uint16_t>(w >> (16 * e))}));
      } else sum[static_cast<size_t>((l / 4 + 8 * (r / 2 & 1)) * n + r / 4 * 8 + l % 4 * 2 + (r & 1))] = x.d == Type::s32 ? static_cast<Sum>(static_cast<int32_t>(w)) : static_cast<Sum>(bit_cast<float>(w));
    }
  }
  for (int i = 0; i < 16; ++i) {
    Sum* row = &sum[static_cast<size_t>(i * n)];
    for (int q = 0; q < k; ++q) {
      const Sum v = static_cast<Sum>(a[static_cast<size_t>(i * k + q)]);
      const Sum* from = &b[static_cast<size_t>(q * n)];
      for (int j = 0; j < n; ++j) row[j] += v * from[j];
    }
  }
  for (int r = 0; r < x.d_regs; ++r) {
    for (int l = 0; l < 32; ++l) {
      if (half) {
        const Sum* s = &sum[static_cast<size_t>((l / 4 + 8 * (r & 1)) * n + r / 2 * 8 + l % 4 * 2)];
        reg(r)[l] = half_bits(static_cast<double>(s[0])) | uint32_t{half_bits(static_cast<double>(s[1]))} << 16;
        continue;
      }
      const Sum s = sum[static_cast<size_t>((l / 4 + 8 * (r / 2 & 1)) * n + r / 4 * 8 + l % 4 * 2 + (r & 1))];
      if constexpr (std::is_same_v<Sum, int64_t>) reg(r)[l] = static_cast<uint32_t>(!x.saturate ? s : s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : s);
      else reg(r)[l] = bit_cast<uint32_t>(canonical(static_cast<float>(s)));
    }
  }
}

// Slots: d, [a registers | a descriptor], b descriptor, scale-d.
Step multiply(Ctx& c, const Instr& in) {
  if (c.mask != kAll && !gathered(c, kAll)) return Step::block;
  const Wgmma& x = *static_cast<const Wgmma*>(in.extra);
  note(c, in);
  const int after = x.d_regs + (x.a_in_registers ? 4 : 1);
  const auto uniform = [&](int slot) {
    const uint64_t* v = src<uint64_t>(c, in, slot);
    for (int l = 1; l < 32; ++l) if (v[l] != v[0]) fail("a matrix descriptor differs between lanes");
    return v[0];
  };
  const MatrixLayout la = x.a_in_registers ? MatrixLayout{} : layout_of(uniform(x.d_regs), !x.mn_a), lb = layout_of(uniform(after), !x.mn_b);
  const uint32_t scale = pred(c, in, after + 1);
  if (scale != 0 && scale != kAll) fail("scale-d differs between lanes");
  // The four warps' parts are one operation: who waits for it waits for all of them.
  std::shared_ptr<Product>& entry = c.cta->products[{c.warp->id / 4, c.warp->product_count++}];
  if (!entry) {
    entry = std::make_shared<Product>();
    entry->left = std::min<int>(4, static_cast<int>(c.cta->warps.size() - c.warp->id / 4 * 4));
    entry->unissued = entry->left;
    if (Watch* watch = watch_of(*c.cta)) entry->entity = watch->begin(c);
  }
  const std::shared_ptr<Product> whole = entry;
  if (--whole->unissued == 0) c.cta->products.erase({c.warp->id / 4, c.warp->product_count - 1});
  const bool alone = c.machine->options.strict;  // a warp's part may begin before the other warps come to theirs
  if (Watch* watch = watch_of(*c.cta)) {
    if (!alone) {
      watch->release(*c.warp, whole->met);
      if (!whole->unissued) watch->acquire(*c.warp, whole->met);
    }
    if (alone || !whole->unissued) {
      if (!x.a_in_registers) gather(c, la, x.a, alone ? 16 * static_cast<int>(c.warp->id % 4) : 0, alone ? 16 : 64, x.k, false, nullptr, &whole->entity);
      gather(c, lb, x.b, 0, x.n, x.k, false, nullptr, &whole->entity);
    }
  }
  auto job = std::make_shared<JobState>();
  const std::shared_ptr<JobState> before = c.warp->last_product;  // products of a warp follow each other
  c.warp->last_product = job;
  c.warp->products[0].open.push_back(whole);
  c.warp->flights.push_back({c.regs, &in, x.d_regs, x.a_in_registers ? 4 : 0, job, {}});
  const auto ready = [before, alone, whole] { return (!before || before->done) && (alone || !whole->unissued); };
  submit(c, job, [&x, slots = in.op, regs = c.regs, la, lb, add = scale != 0, whole](Ctx& later) {
    if (x.d == Type::s32) product<int64_t>(later, x, slots, regs, la, lb, add);
    else product<double>(later, x, slots, regs, la, lb, add);
    if (--whole->left) return;
    whole->done = true;
    if (Watch* watch = watch_of(*later.cta)) watch->finish(whole->entity);
    later.machine->event();
  }, ready);
  return Step::next;
}

Step fence(Ctx& c, const Instr&) { return c.mask == kAll || gathered(c, kAll) ? Step::next : Step::block; }
Step commit(Ctx& c, const Instr&) {
  if (c.mask != kAll && !gathered(c, kAll)) return Step::block;
  Groups& g = c.warp->products[0];
  g.committed.push_back(std::move(g.open));
  g.open.clear();
  return Step::next;
}
Step wait(Ctx& c, const Instr& in) {
  if (c.mask != kAll && !gathered(c, kAll)) return Step::block;
  Groups& g = c.warp->products[0];
  for (size_t i = 0; i + in.a < g.committed.size(); ++i) {
    for (const auto& job : g.committed[i]) {
      if (job->done) continue;
      c.blocked = c.mask;
      c.why = "its groups of wgmma products (all four warps must execute them)";
      return Step::block;
    }
  }
  while (g.committed.size() > in.a) {
    if (Watch* watch = watch_of(*c.cta)) for (const auto& job : g.committed.front()) watch->acquire(*c.warp, job->entity);
    c.warp->flights.erase(c.warp->flights.begin(), c.warp->flights.begin() + static_cast<long>(g.committed.front().size()));
    g.committed.pop_front();
  }
  return Step::next;
}

// Runs before an instruction that touches registers of products. Slots: those of the instruction; in.a: it copies registers.
// The compiler moves copies of D up to the product, and assigns registers so that this does no harm: a copy waits for the
// product and is D from then on. Anything else must come after wgmma.wait_group.
Step before_access(Ctx& c, const Instr& in) {
  for (Flight& f : c.warp->flights) {
    if (f.regs != c.regs) continue;
    const int32_t *d = f.in->op, *a = d + f.d_regs;
    bool of_d = false, touched = false;
    for (int i = 0; i < in.count; ++i) {
      const int32_t s = in.op[i];
      of_d |= std::find(d, a, s) != a || std::find(f.copies.begin(), f.copies.end(), s) != f.copies.end();
      touched |= std::find(a, a + f.a_regs, s) != a + f.a_regs;
    }
    if (!of_d && !touched) continue;
    if (of_d && !in.a && c.machine->options.strict) {
      const Raw& product = c.raw(*f.in);
      fail("hazard in registers: a result of the product at PTX line %u (%s) is used, and no wgmma.wait_group lies between", product.line, source_of(c.machine->module, product).c_str());
    }
    if (!f.job->done) {
      c.blocked = c.mask;
      c.why = "a wgmma product whose registers it uses";
      return Step::block;
    }
    if (of_d && in.a) f.copies.push_back(in.op[0]);
  }
  return Step::next;
}

void decode_product(Decode& d) {
  Wgmma x{};
  int m = 0;
  const std::string shape = d.first();
  if (std::sscanf(shape.c_str(), "m%dn%dk%d", &m, &x.n, &x.k) != 3) d.wrong("needs a shape");
  d.take(shape);
  x.saturate = d.take("satfinite");
  x.d = d.type();
  x.a = d.type();
  x.b = d.type();
  const bool half = x.a == Type::f16 || x.a == Type::bf16, byte = x.a == Type::s8 || x.a == Type::u8, fp8 = x.a == Type::e4m3 || x.a == Type::e5m2;
  const bool pairs = half || x.a == Type::tf32 ? x.a == x.b : byte ? x.b == Type::s8 || x.b == Type::u8 : fp8 && (x.b == Type::e4m3 || x.b == Type::e5m2);
  const bool sums = byte ? x.d == Type::s32 : x.d == Type::f32 || (x.d == Type::f16 && (x.a == Type::f16 || fp8));
  if (!pairs || !sums || m != 64 || x.n < 8 || x.n > 256 || x.n % 8 || x.k * bits_of(x.a) != 256) d.wrong("this shape with these types is not modelled");
  x.d_regs = x.d == Type::f16 ? x.n / 4 : x.n / 2;
  const Arg& to = d.arg(0);
  if (to.kind != Arg::vector || to.parts.size() != static_cast<size_t>(x.d_regs)) d.wrong("D must have " + std::to_string(x.d_regs) + " registers");
  for (const Arg& a : to.parts) { d.dst(a, Type::b32); }
  const Arg& a = d.arg(1);
  x.a_in_registers = a.kind == Arg::vector;
  if (x.a_in_registers) {
    if (a.parts.size() != 4) d.wrong("A must have 4 registers");
    for (const Arg& r : a.parts) d.src(r, Type::b32);
    for (int r = 0; r < 4; ++r) if (d.slots[d.slots.size() - 1 - static_cast<size_t>(r)] < 0) d.wrong("A must be registers");
  } else d.src(a, Type::b64);
  d.src(2, Type::b64);
  d.src(3, Type::pred);
  const auto flag = [&](size_t i, int64_t off, int64_t on) {
    const Arg& v = d.arg(i);
    if (v.kind != Arg::integer || (static_cast<int64_t>(v.value) != off && static_cast<int64_t>(v.value) != on)) d.wrong("an immediate has no value that exists");
    return static_cast<int64_t>(v.value) == on;
  };
  size_t i = 4;
  if (!byte) { x.negate_a = flag(i++, 1, -1); x.negate_b = flag(i++, 1, -1); }
  if (half) {
    if (!x.a_in_registers) x.mn_a = flag(i++, 0, 1);
    x.mn_b = flag(i++, 0, 1);
  }
  *d.extra<Wgmma>() = x;
  d.in.run = multiply;
}
}  // namespace

std::vector<bool> product_registers(const Function& f) {
  std::vector<bool> marked;
  const auto each = [&](const Arg& a, const auto& visit) {
    if (a.kind == Arg::reg) visit(a);
    for (const Arg& part : a.parts) if (part.kind == Arg::reg) visit(part);
  };
  for (const Raw& raw : f.statements) {
    if (raw.op != "wgmma" || raw.args.size() < 2 || raw.mods.empty() || raw.mods[0] != "mma_async") continue;
    marked.resize(f.registers.size(), false);
    for (size_t i = 0; i < 2; ++i) each(raw.args[i], [&](const Arg& a) { marked[static_cast<size_t>(a.reg_index)] = true; });
  }
  bool grew = !marked.empty();
  while (grew) {  // copies of copies
    grew = false;
    for (const Raw& raw : f.statements) {
      if (raw.op != "mov" || raw.args.size() != 2) continue;
      bool from = false;
      each(raw.args[1], [&](const Arg& a) { from |= marked[static_cast<size_t>(a.reg_index)]; });
      if (from) each(raw.args[0], [&](const Arg& a) { auto&& m = marked[static_cast<size_t>(a.reg_index)]; grew |= !m; m = true; });
    }
  }
  return marked;
}

void guard_products(Decode& d, const std::vector<bool>& registers) {
  if (d.raw.op == "wgmma") return;
  bool touches = false;
  for (const Arg& a : d.raw.args) {
    if (a.kind == Arg::reg) touches |= registers[static_cast<size_t>(a.reg_index)];
    for (const Arg& part : a.parts) if (part.kind == Arg::reg) touches |= registers[static_cast<size_t>(part.reg_index)];
  }
  if (!touches) return;
  Decode::Prelude check{d.in, d.slots};
  check.in.run = before_access;
  check.in.a = d.raw.op == "mov";
  d.before.insert(d.before.begin(), check);
}

void add_wgmma(Decoders& t) {
  t["wgmma"] = [](Decode& d) {
    const int what = d.must({"mma_async", "fence", "commit_group", "wait_group"});
    if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned");
    if (what == 0) return decode_product(d);
    if (what == 3) {
      if (d.arg(0).kind != Arg::integer || d.arg(0).value > 1000) d.wrong("needs a number of groups");
      d.in.a = static_cast<uint16_t>(d.arg(0).value);
    }
    d.in.run = what == 1 ? fence : what == 2 ? commit : wait;
  };
}

}  // namespace dsv4::sim
