// ld, st and their kin: every space, vectors, cache hints (which change nothing); cvta, isspacep, prefetch.
// PTX ISA 9.7.9.8 to 9.7.9.20.
#include "decode.h"

namespace dsv4::sim {
namespace {


// T in memory, S in a register (sign or zero extended).
template <class T, class S> Step load(Ctx& c, const Instr& in) {
  const int n = in.a;
  const auto space = static_cast<Space>(in.b);
  const uint64_t bytes = sizeof(T) * static_cast<uint64_t>(n);
  const bool watched = watch_of(*c.cta) && (space == Space::global ? c.machine->global_watch != nullptr : space <= Space::cluster);
  if (in.c & 4 && watched) fence_all(c);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t at = address(c, in, n, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    const uint8_t* p = resolve(c, space, in.c & 1 ? at : static_cast<uint32_t>(at), bytes, bytes, Access::read, l);
    if (watched) touch_memory(c, in, space, in.c & 1 ? at : static_cast<uint32_t>(at), bytes, in.c & 2 ? Touch::strong_read : Touch::read, Lanes::one(l));
    for (int v = 0; v < n; ++v) {
      T x;
      std::memcpy(&x, p + sizeof(T) * static_cast<size_t>(v), sizeof(T));
      out<S>(c, in, v)[l] = static_cast<S>(x);
    }
  }
  if (in.c & 8 && watched) fence_all(c);
  return Step::next;
}
template <class T, class S> Step store(Ctx& c, const Instr& in) {
  const int n = in.a;
  const auto space = static_cast<Space>(in.b);
  const uint64_t bytes = sizeof(T) * static_cast<uint64_t>(n);
  const bool watched = watch_of(*c.cta) && (space == Space::global ? c.machine->global_watch != nullptr : space <= Space::cluster);
  if (in.c & 4 && watched) fence_all(c);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t at = address(c, in, n, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    uint8_t* p = resolve(c, space, in.c & 1 ? at : static_cast<uint32_t>(at), bytes, bytes, Access::write, l);
    T value[8];
    for (int v = 0; v < n; ++v) value[v] = static_cast<T>(src<S>(c, in, v)[l]);
    if (watched) touch_memory(c, in, space, in.c & 1 ? at : static_cast<uint32_t>(at), bytes, in.c & 2 ? Touch::strong_write : Touch::write, Lanes::one(l), value);
    std::memcpy(p, value, bytes);
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}
template <bool Write> Step move128(Ctx& c, const Instr& in) {
  const auto space = static_cast<Space>(in.b);
  const bool watched = watch_of(*c.cta) != nullptr;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t at = address(c, in, 1, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    uint8_t* p = resolve(c, space, in.c & 1 ? at : static_cast<uint32_t>(at), 16, 16, Write ? Access::write : Access::read, l);
    if (watched) touch_memory(c, in, space, in.c & 1 ? at : static_cast<uint32_t>(at), 16, Write ? Touch::write : Touch::read, Lanes::one(l));
    if (Write) std::memcpy(p, src<uint8_t>(c, in, 0) + 16 * l, 16);
    else std::memcpy(c.regs + in.op[0] + 16 * l, p, 16);
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}

Handler load_of(Type t, bool wide) {
  const bool sign = is_signed(t);
  switch (bits_of(t)) {
    case 8: return wide ? (sign ? &load<int8_t, uint64_t> : &load<uint8_t, uint64_t>) : (sign ? &load<int8_t, uint32_t> : &load<uint8_t, uint32_t>);
    case 16: return wide ? (sign ? &load<int16_t, uint64_t> : &load<uint16_t, uint64_t>) : (sign ? &load<int16_t, uint32_t> : &load<uint16_t, uint32_t>);
    case 32: return wide ? (sign ? &load<int32_t, uint64_t> : &load<uint32_t, uint64_t>) : &load<uint32_t, uint32_t>;
    default: return &load<uint64_t, uint64_t>;
  }
}
Handler store_of(Type t, bool wide) {
  switch (bits_of(t)) {
    case 8: return wide ? &store<uint8_t, uint64_t> : &store<uint8_t, uint32_t>;
    case 16: return wide ? &store<uint16_t, uint64_t> : &store<uint16_t, uint32_t>;
    case 32: return wide ? &store<uint32_t, uint64_t> : &store<uint32_t, uint32_t>;
    default: return &store<uint64_t, uint64_t>;
  }
}

}  // namespace

Space space_of(Decode& d) {  // consumes .global, .shared::cta, ..., and the order, scope and cache modifiers around them
  d.ignore({"weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio", "cta", "cluster", "gpu", "sys", "ca", "cg", "cs", "lu", "cv", "wb",
            "wt", "nc", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_normal",
            "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B", "L2::256B", "unified"});
  static const struct { const char* name; Space space; } names[] = {
      {"global", Space::global}, {"shared", Space::shared}, {"shared::cta", Space::shared}, {"shared::cluster", Space::cluster},
      {"local", Space::local}, {"param", Space::param}, {"param::entry", Space::param}, {"param::func", Space::param}, {"const", Space::constant}};
  for (const auto& n : names) if (d.take(n.name)) return n.space;
  return Space::generic;
}

namespace {
void move(Decode& d, bool write) {
  const Space space = space_of(d);
  const bool hint = d.take("L2::cache_hint");
  const int vec = d.choose({"v2", "v4", "v8"});
  const int n = vec < 0 ? 1 : 2 << vec;
  const Type t = d.type();
  if (t == Type::pred || bits_of(t) < 8) d.wrong("this type cannot stand in memory");
  if (n * bits_of(t) > 256) d.wrong("moves at most 32 bytes");
  const Arg& value = d.arg(write ? 1 : 0);
  if (vec >= 0 && (value.kind != Arg::vector || value.parts.size() != static_cast<size_t>(n))) d.wrong("needs a vector of " + std::to_string(n) + " registers");
  if (bits_of(t) == 128 && vec >= 0) d.wrong("vectors of 128-bit elements are not modelled");
  // Elements may be held in wider registers; all elements alike.
  bool wide = wide_type(t);
  const Arg& one = vec < 0 ? value : value.parts[0];
  if (one.kind == Arg::reg && bits_of(d.f.registers[one.reg_index].type) == 64 && bits_of(t) <= 64) wide = true;
  for (int i = 0; i < n; ++i) {
    const Arg& a = vec < 0 ? value : value.parts[static_cast<size_t>(i)];
    const Type held = bits_of(t) == 128 ? Type::b128 : wide ? Type::b64 : Type::b32;
    if (write && a.kind == Arg::real) d.src(a, t);
    else write ? d.src(a, held) : d.dst(a, held);
  }
  const bool wide_address = d.memory(write ? 0 : 1);
  if (hint) d.src(2, Type::b64);
  d.in.a = static_cast<uint16_t>(n);
  d.in.b = static_cast<uint16_t>(space);
  // Bits: 1 wide address, 2 strong, 4 releases before, 8 acquires after.
  const auto has = [&](const char* m) { for (const std::string& x : d.raw.mods) if (x == m) return true; return false; };
  const bool strong = has("volatile") || has("relaxed") || has("mmio") || has("acquire") || has("release");
  d.in.c = static_cast<uint16_t>(wide_address | (strong ? 2 : 0) | (has("release") ? 4 : 0) | (has("acquire") ? 8 : 0));
  if (space == Space::generic && !wide_address) d.wrong("a generic address has 64 bits");
  if (bits_of(t) == 128) d.in.run = write ? &move128<true> : &move128<false>;
  else d.in.run = write ? store_of(t, wide) : load_of(t, wide);
}

// cvta: in.a the window bits, in.b 1 to a space; 32-bit registers keep addresses of shared memory.
Step cvta(Ctx& c, const Instr& in) {
  const uint64_t window = in.a == 1 ? kSharedWindow : in.a == 2 ? kLocalWindow : in.a == 3 ? kParamWindow : 0;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t v = src<uint64_t>(c, in, 1)[l];
    out<uint64_t>(c, in, 0)[l] = !window ? v : in.b ? v & ~kWindowMask : v | window;
  }
  return Step::next;
}
Step isspacep(Ctx& c, const Instr& in) {
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) {
    const uint64_t v = src<uint64_t>(c, in, 1)[l], w = v & kWindowMask;
    const bool own = w == kSharedWindow && (v & 0xFFFFFFFF) >> 24 == c.cta->rank;
    const auto space = static_cast<Space>(in.a);
    const bool yes = space == Space::shared ? own : space == Space::cluster ? w == kSharedWindow : space == Space::local ? w == kLocalWindow
                     : space == Space::param ? w == kParamWindow : w == 0;
    r |= static_cast<uint32_t>(yes) << l;
  }
  put_pred(c, in, 0, r);
  return Step::next;
}
Step nothing(Ctx&, const Instr&) { return Step::next; }
}  // namespace

void add_memory(Decoders& t) {
  t["ld"] = [](Decode& d) { move(d, false); };
  t["ldu"] = [](Decode& d) { move(d, false); };
  t["st"] = [](Decode& d) {
    if (d.take("async")) return store_async(d);
    move(d, true);
  };
  t["cvta"] = [](Decode& d) {
    d.in.b = d.take("to");
    const Space s = space_of(d);
    if (s == Space::generic) d.wrong("names no space");
    const Type x = d.type();
    if (bits_of(x) != 64) d.wrong("addresses have 64 bits");
    d.in.a = s == Space::shared || s == Space::cluster ? 1 : s == Space::local ? 2 : s == Space::param ? 3 : 0;
    d.dst(0, x); d.src(1, x);
    d.in.run = cvta;
  };
  t["isspacep"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(space_of(d));
    d.dst(0, Type::pred); d.src(1, Type::b64);
    d.in.run = isspacep;
  };
  t["prefetch"] = [](Decode& d) {
    space_of(d);
    d.ignore({"L1", "L2", "tensormap"});
    d.memory(0);
    d.in.run = nothing;
  };
  t["prefetchu"] = [](Decode& d) { d.ignore({"L1"}); d.memory(0); d.in.run = nothing; };
  t["applypriority"] = [](Decode& d) { space_of(d); d.memory(0); d.arg(1); d.in.run = nothing; };
  t["discard"] = [](Decode& d) { d.wrong("discard makes contents undefined and is not modelled"); };
  t["createpolicy"] = [](Decode& d) {  // a cache policy means nothing here
    d.ignore({"fractional", "range", "global", "L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::evict_unchanged"});
    while (d.choose({"L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::evict_unchanged"}) >= 0) {}
    d.take("b64");
    d.dst(0, Type::b64);
    for (size_t i = 1; i < d.args(); ++i) d.arg(i);
    d.in.run = [](Ctx& c, const Instr& in) {
      for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) out<uint64_t>(c, in, 0)[l] = 0x14F0000000000000;
      return Step::next;
    };
  };
}

}  // namespace dsv4::sim
