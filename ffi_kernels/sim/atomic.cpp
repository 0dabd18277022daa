// atom and red on every space, vectors of floats among them. PTX ISA 9.7.13.5 and 9.7.13.6.
#include "atomic.h"

#include "formats.h"

namespace dsv4::sim {

namespace {
template <class T> uint64_t ordered(AtomicOp op, uint64_t old, uint64_t b) {
  const T x = static_cast<T>(old), y = static_cast<T>(b);
  return static_cast<uint64_t>(op == AtomicOp::min ? (x < y ? x : y) : (x > y ? x : y));
}
template <class H> uint16_t add_halves(uint32_t a, uint32_t b, const Format& f) {
  return static_cast<uint16_t>(encode(odd_add(value_of(H{static_cast<uint16_t>(a)}), value_of(H{static_cast<uint16_t>(b)})), f, Round::rn, false));
}
template <class H> uint16_t choose_halves(AtomicOp op, uint16_t a, uint16_t b) {
  const float x = value_of(H{a}), y = value_of(H{b});
  if (x != x) return y != y ? 0x7FFF : b;
  if (y != y) return a;
  return (x < y || (x == y && a & 0x8000)) == (op == AtomicOp::min) ? a : b;
}
template <class H> uint16_t halves(AtomicOp op, uint32_t a, uint32_t b, const Format& f) {
  return op == AtomicOp::add ? add_halves<H>(a, b, f) : choose_halves<H>(op, static_cast<uint16_t>(a), static_cast<uint16_t>(b));
}
}  // namespace

uint64_t apply_atomic(AtomicOp op, Type t, uint64_t old, uint64_t b, uint64_t c, bool flush_subnormals) {
  const bool wide = bits_of(t) == 64;
  switch (op) {
    case AtomicOp::exch: return b;
    case AtomicOp::cas: return old == b ? c : old;
    case AtomicOp::bit_and: return old & b;
    case AtomicOp::bit_or: return old | b;
    case AtomicOp::bit_xor: return old ^ b;
    case AtomicOp::inc: return static_cast<uint32_t>(old) >= static_cast<uint32_t>(b) ? 0 : old + 1;
    case AtomicOp::dec: return old == 0 || static_cast<uint32_t>(old) > static_cast<uint32_t>(b) ? b : old - 1;
    default: break;
  }
  switch (t) {
    case Type::f16: return halves<Half>(op, static_cast<uint32_t>(old), static_cast<uint32_t>(b), kF16);
    case Type::bf16: return halves<Bf16>(op, static_cast<uint32_t>(old), static_cast<uint32_t>(b), kBf16);
    case Type::f16x2: case Type::bf16x2: {
      const Type half = t == Type::f16x2 ? Type::f16 : Type::bf16;
      return apply_atomic(op, half, old & 0xFFFF, b & 0xFFFF, 0, false) | apply_atomic(op, half, old >> 16 & 0xFFFF, b >> 16 & 0xFFFF, 0, false) << 16;
    }
    case Type::f32: {
      float x = bit_cast<float>(static_cast<uint32_t>(old)), y = bit_cast<float>(static_cast<uint32_t>(b));
      if (flush_subnormals) { x = flush(x); y = flush(y); }
      const float s = canonical(x + y);
      return bit_cast<uint32_t>(flush_subnormals ? flush(s) : s);
    }
    case Type::f64: return bit_cast<uint64_t>(bit_cast<double>(old) + bit_cast<double>(b));
    default: break;
  }
  if (op == AtomicOp::add) return wide ? old + b : static_cast<uint32_t>(old + b);
  if (t == Type::s32) return static_cast<uint32_t>(ordered<int32_t>(op, old, b));
  if (t == Type::s64) return ordered<int64_t>(op, old, b);
  return wide ? ordered<uint64_t>(op, old, b) : ordered<uint32_t>(op, old, b);
}

AtomicOp atomic_op(Decode& d) {
  return static_cast<AtomicOp>(d.must({"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"}));
}

void check_atomic(Decode& d, AtomicOp op, Type t) {
  const bool half = t == Type::f16 || t == Type::f16x2 || t == Type::bf16 || t == Type::bf16x2;
  const bool real = t == Type::f32 || t == Type::f64;
  bool good;
  switch (op) {
    case AtomicOp::add: good = is_integer(t) || real || half; break;
    case AtomicOp::min: case AtomicOp::max: good = is_integer(t) || half; break;
    case AtomicOp::inc: case AtomicOp::dec: good = t == Type::u32; break;
    case AtomicOp::exch: case AtomicOp::cas: good = is_bits(t); break;
    default: good = is_bits(t);
  }
  if (!good || (bits_of(t) < 32 && !half && !(op == AtomicOp::cas && bits_of(t) == 16)) || bits_of(t) > 64) d.wrong(std::string("is not modelled for .") + name_of(t));
}

namespace {
// Slots: results (atom), values, second value (cas), address last. in.a: elements; in.c: bit 0 wide address, bit 1 atom.
struct Form { AtomicOp op; Type type; Space space; bool release, acquire; };

Step atomic(Ctx& c, const Instr& in) {
  const Form& f = *static_cast<const Form*>(in.extra);
  const bool result = in.c & 2, wide = bits_of(f.type) == 64;
  const int n = in.a, value = result ? n : 0, other = value + n, at = other + (f.op == AtomicOp::cas);
  const uint64_t size = static_cast<uint64_t>(bits_of(f.type)) / 8;
  Watch* watch = watch_of(*c.cta);
  if (watch && f.release) fence_all(c);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t a = address(c, in, at, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    if (!(in.c & 1)) a = static_cast<uint32_t>(a);
    uint8_t* p = resolve(c, f.space, a, size * static_cast<uint64_t>(n), size * static_cast<uint64_t>(n), Access::both, l);
    if (watch) touch_memory(c, in, f.space, a, size * static_cast<uint64_t>(n), Touch::atomic, Lanes::one(l));
    const bool global = f.space == Space::global || (f.space == Space::generic && !(a & kWindowMask));
    for (int v = 0; v < n; ++v) {
      uint64_t old = 0;
      std::memcpy(&old, p + size * static_cast<uint64_t>(v), size);
      const auto get = [&](int i) { return wide ? src<uint64_t>(c, in, i)[l] : src<uint32_t>(c, in, i)[l]; };
      const uint64_t mask = size == 2 ? 0xFFFF : ~uint64_t{0};
      const uint64_t r = apply_atomic(f.op, f.type, old, get(value + v) & mask, f.op == AtomicOp::cas ? get(other) & mask : 0, global);
      std::memcpy(p + size * static_cast<uint64_t>(v), &r, size);
      if (!result) continue;
      if (wide) out<uint64_t>(c, in, v)[l] = old;
      else out<uint32_t>(c, in, v)[l] = static_cast<uint32_t>(old);
    }
  }
  if (watch && f.acquire) fence_all(c);
  c.machine->progress = c.machine->instructions;
  return Step::next;
}

void decode_atomic(Decode& d, bool result) {
  if (!result && d.take("async")) return reduce_async(d);
  Form f{};
  for (const std::string& m : d.raw.mods) {
    f.release |= m == "release" || m == "acq_rel";
    f.acquire |= m == "acquire" || m == "acq_rel";
  }
  f.space = space_of(d);
  f.op = atomic_op(d);
  d.take("noftz");
  const bool hint = d.take("L2::cache_hint");
  const int vec = d.choose({"v2", "v4", "v8"});
  const int n = vec < 0 ? 1 : 2 << vec;
  f.type = d.type();
  check_atomic(d, f.op, f.type);
  if (f.space == Space::local || f.space == Space::param || f.space == Space::constant) d.wrong("works on global and shared memory");
  const Type held = bits_of(f.type) == 64 ? Type::b64 : Type::b32;
  size_t i = 0;
  const auto each = [&](const Arg& a, bool write) {
    if (vec >= 0 && (a.kind != Arg::vector || a.parts.size() != static_cast<size_t>(n))) d.wrong("needs vectors of " + std::to_string(n));
    for (int v = 0; v < n; ++v) {
      const Arg& one = vec < 0 ? a : a.parts[static_cast<size_t>(v)];
      write ? d.dst(one, held) : one.kind == Arg::real ? d.src(one, f.type) : d.src(one, held);
    }
  };
  if (result) each(d.arg(i++), true);
  const size_t where = i++;
  each(d.arg(i++), false);
  if (f.op == AtomicOp::cas) d.src(i++, held);
  const bool wide = d.memory(where);
  if (hint) d.src(i++, Type::b64);
  d.in.a = static_cast<uint16_t>(n);
  d.in.c = static_cast<uint16_t>(wide | (result ? 2 : 0));
  *d.extra<Form>() = f;
  d.in.run = atomic;
}
}  // namespace

void add_atomic(Decoders& t) {
  t["atom"] = [](Decode& d) { decode_atomic(d, true); };
  t["red"] = [](Decode& d) { decode_atomic(d, false); };
}

}  // namespace dsv4::sim
