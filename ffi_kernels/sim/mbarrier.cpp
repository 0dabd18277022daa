// mbarrier objects: phases, pending arrivals, transaction counts. PTX ISA 9.7.13.15.
#include "decode.h"

namespace dsv4::sim {
namespace {
constexpr uint32_t kMost = (1u << 20) - 1;
uint64_t mark(uint32_t address) { return 0xB1A5ED0000000000ull | address; }

void settle(Machine& m, Mbarrier& b) {
  if (b.pending || b.tx) return;
  ++b.phase;
  b.done.join(b.next);
  b.next.clear();
  b.pending = b.expected;
  m.event();
}
constexpr uint64_t kCounted = uint64_t{1} << 63;  // a state of .noComplete, which alone may be asked for its count
uint64_t token(const Mbarrier& b) { return b.phase << 20 | b.pending; }
}  // namespace

uint32_t shared_offset(uint64_t a) {
  const uint64_t window = a & kWindowMask;
  if (window != 0 && window != kSharedWindow) fail("address 0x%llx is not in shared memory", (unsigned long long)a);
  a &= ~kWindowMask;
  if (a >> 32) fail("address 0x%llx is not in shared memory", (unsigned long long)a);
  return static_cast<uint32_t>(a);
}

Mbarrier& mbarrier_at(Ctx& c, uint64_t a, Space space) {
  const uint32_t at = shared_offset(a);
  const uint8_t* p = shared_at(c, at, 8, 8, Access::both, space == Space::generic ? Space::shared : space);
  Cta& cta = cta_of(c, at);
  const auto it = cta.mbarriers.find(at & 0xFFFFFF);
  if (it == cta.mbarriers.end()) fail("no mbarrier was initialised at shared address 0x%x", at);
  uint64_t v;
  std::memcpy(&v, p, 8);
  if (v != mark(at & 0xFFFFFF)) fail("the mbarrier at shared address 0x%x was overwritten by a store", at);
  const Mbarrier& b = it->second;
  const Watch* watch = watch_of(*c.cta);
  if (watch && c.mask && !watch->initialised(*c.warp, b.maker, b.made)) {
    fail("hazard in shared memory: the mbarrier at shared address 0x%x is used with no synchronisation after its mbarrier.init by another warp", at);
  }
  return it->second;
}

void mbarrier_arrive(Machine& m, Mbarrier& b, uint32_t count) {
  if (count > b.pending) fail("an arrival of %u on an mbarrier that expects only %u more in phase %llu (of %u)", count, b.pending, (unsigned long long)b.phase, b.expected);
  b.pending -= count;
  m.progress = m.instructions;
  settle(m, b);
}

void mbarrier_tx(Machine& m, Mbarrier& b, int64_t bytes) {
  b.tx += bytes;
  if (b.tx > int64_t{kMost} || b.tx < -int64_t{kMost}) fail("the transaction count of an mbarrier leaves its range: %lld bytes", (long long)b.tx);
  m.progress = m.instructions;
  settle(m, b);
}

namespace {
uint64_t barrier_at(Ctx& c, const Instr& in, int slot, int lane) { return where(c, in, slot, in.c & 1, in.imm, lane); }
template <class F> Step each(Ctx& c, F f) {
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) f(l);
  return Step::next;
}
// in.b: space; in.c: bit 0 wide address.
Step init(Ctx& c, const Instr& in) {
  const uint32_t* count = src<uint32_t>(c, in, 0);
  return each(c, [&](int l) {
    const uint32_t at = shared_offset(barrier_at(c, in, 1, l));
    uint8_t* p = shared_at(c, at, 8, 8, Access::write, Space::shared);
    if (count[l] < 1 || count[l] > kMost) fail("an mbarrier for %u arrivals; the count must lie in 1..%u", count[l], kMost);
    const uint32_t key = at & 0xFFFFFF;
    uint64_t v;
    std::memcpy(&v, p, 8);
    const auto old = c.cta->mbarriers.find(key);
    if (old != c.cta->mbarriers.end() && v == mark(key)) fail("an mbarrier is initialised again at shared address 0x%x without mbarrier.inval", at);
    const uint64_t m = mark(key);
    std::memcpy(p, &m, 8);
    Mbarrier& b = c.cta->mbarriers[key] = Mbarrier();
    b.expected = b.pending = count[l];
    if (Watch* watch = watch_of(*c.cta)) { b.maker = watch->entity_of(*c.warp); b.made = watch->clock_of(*c.warp); }
    c.machine->event();
  });
}
Step inval(Ctx& c, const Instr& in) {
  return each(c, [&](int l) {
    const uint64_t a = barrier_at(c, in, 0, l);
    mbarrier_at(c, a, Space::shared);
    const uint32_t key = shared_offset(a) & 0xFFFFFF;
    c.cta->mbarriers.erase(key);
    std::memset(shared_at(c, shared_offset(a), 8, 8, Access::write, Space::shared), kPoison, 8);
  });
}
// Slots: state, [count or bytes], address. in.a: bit 0 expect_tx, bit 1 drop, bit 2 count given, bit 3 relaxed, bit 4 noComplete.
Step arrive(Ctx& c, const Instr& in) {
  note(c, in);
  const bool operand = in.a & 5;
  Watch* watch = watch_of(*c.cta);
  const auto release = [&](uint32_t lanes, Mbarrier& b) { in.a & 8 ? watch->release_relaxed(*c.warp, b.next) : watch->release(*c.warp, lanes, b.next); };
  bool together = watch && !(in.a & 4);  // all lanes arrive, once each, in the same phase of the same barrier
  const uint64_t first = barrier_at(c, in, operand ? 2 : 1, __builtin_ctz(c.mask));
  for (int l = 0; l < 32; ++l) together = together && (!(c.mask >> l & 1) || barrier_at(c, in, operand ? 2 : 1, l) == first);
  if (together) {
    Mbarrier& b = mbarrier_at(c, first, static_cast<Space>(in.b));
    together = b.pending >= static_cast<uint32_t>(__builtin_popcount(c.mask));
    if (together) release(c.mask, b);
  }
  return each(c, [&](int l) {
    const uint64_t at = barrier_at(c, in, operand ? 2 : 1, l);
    Mbarrier& b = mbarrier_at(c, at, static_cast<Space>(in.b));
    const uint32_t v = operand ? src<uint32_t>(c, in, 1)[l] : 1;
    if (in.a & 1) {
      if (v > kMost) fail("expects %u bytes; the limit is %u", v, kMost);
      b.tx += v;
    }
    const uint32_t count = in.a & 4 ? v : 1;
    if (count < 1 || count > kMost) fail("an arrival of %u", count);
    if (in.a & 16 && count >= b.pending) fail("an arrival of %u with .noComplete completes the phase, of which %u arrivals are pending", count, b.pending);
    out<uint64_t>(c, in, 0)[l] = token(b) | (in.a & 16 ? kCounted : 0);
    if (in.a & 2) {
      if (b.expected < count) fail("drops %u arrivals of an mbarrier that expects %u", count, b.expected);
      b.expected -= count;
    }
    if (watch && &cta_of(c, shared_offset(at)) != c.cta) watch->remote_arrival(c, cta_of(c, shared_offset(at)), b.next);
    if (watch && !together) release(1u << l, b);
    mbarrier_arrive(*c.machine, b, count);
  });
}
Step tx(Ctx& c, const Instr& in) {  // in.a: 1 complete
  return each(c, [&](int l) {
    const int64_t n = src<uint32_t>(c, in, 0)[l];
    mbarrier_tx(*c.machine, mbarrier_at(c, barrier_at(c, in, 1, l), static_cast<Space>(in.b)), in.a ? -n : n);
  });
}
// Slots: p, state or parity, address, [hint]. in.a: bit 0 parity, bit 1 may block, bit 2 relaxed
Step wait(Ctx& c, const Instr& in) {
  uint32_t done = 0, acquired = 0;
  Watch* watch = in.a & 4 ? nullptr : watch_of(*c.cta);
  const Mbarrier* last = nullptr;  // that lanes `acquired` found complete
  const auto acquire = [&] { if (acquired) watch->acquire(*c.warp, acquired, last->done); };
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    Mbarrier& b = mbarrier_at(c, barrier_at(c, in, 2, l), Space::shared);
    bool complete;
    if (in.a & 1) {
      const uint32_t parity = src<uint32_t>(c, in, 1)[l];
      if (parity > 1) fail("waits for the phase parity %u; it must be 0 or 1", parity);
      complete = (b.phase & 1) != parity;
    } else {
      const uint64_t phase = (src<uint64_t>(c, in, 1)[l] & ~kCounted) >> 20;
      if (phase > b.phase || phase + 1 < b.phase) fail("waits with the state of phase %llu on an mbarrier in phase %llu", (unsigned long long)phase, (unsigned long long)b.phase);
      complete = b.phase > phase;
    }
    done |= static_cast<uint32_t>(complete) << l;
    if (!complete || !watch) continue;
    if (last != &b) {
      acquire();
      last = &b;
      acquired = 0;
    }
    acquired |= 1u << l;
  }
  acquire();
  const uint32_t open = c.mask & ~done;
  if (!open || c.machine->expire) { put_pred(c, in, 0, done); return Step::next; }
  const bool impatient = c.machine->options.schedule == Options::random && c.machine->random() % 4 == 0;  // the time limit is nobody's
  if (in.a & 2 && !impatient) {
    const uint32_t all = c.mask;
    c.mask = done;
    put_pred(c, in, 0, done);
    c.mask = all;
    c.blocked = open;
    c.why = "an mbarrier's phase";
    return Step::block;
  }
  put_pred(c, in, 0, done);
  return Step::yield;
}
Step pending_count(Ctx& c, const Instr& in) {
  return each(c, [&](int l) {
    const uint64_t state = src<uint64_t>(c, in, 1)[l];
    if (!(state & kCounted)) fail("mbarrier.pending_count of a state that no arrival with .noComplete gave");
    out<uint32_t>(c, in, 0)[l] = static_cast<uint32_t>(state) & kMost;
  });
}

void finish(Decode& d, size_t memory, Handler run) {
  const bool wide = d.memory(memory);
  d.in.c = wide;
  d.in.run = run;
  d.take("b64");
}
Space shared_space(Decode& d) {
  const Space s = space_of(d);
  if (s != Space::generic && s != Space::shared && s != Space::cluster) d.wrong("an mbarrier lies in shared memory");
  return s;
}

void decode_arrive(Decode& d, bool drop) {
  const bool expect = d.take("expect_tx");
  const bool part = d.take("noComplete");
  const Space space = shared_space(d);
  const bool counted = d.args() == 3 && !expect;
  if (expect && d.args() < 3) d.wrong("needs a number of bytes");
  if (part && (!counted || space == Space::cluster)) d.wrong(".noComplete is for arrivals with a count on an mbarrier of this CTA");
  if (space == Space::cluster && d.arg(0).kind != Arg::sink) d.wrong("a remote arrival gives no state: write _");
  d.dst(0, Type::b64);
  if (d.args() == 3) d.src(2, Type::b32);
  bool relaxed = false;
  for (const std::string& m : d.raw.mods) relaxed |= m == "relaxed";
  d.in.a = static_cast<uint16_t>(expect | drop << 1 | counted << 2 | relaxed << 3 | part << 4);
  d.in.b = static_cast<uint16_t>(space);
  finish(d, 1, arrive);
}
}  // namespace

void add_mbarrier(Decoders& t) {
  t["mbarrier"] = [](Decode& d) {
    switch (d.must({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "pending_count"})) {
      case 0: shared_space(d); d.src(1, Type::b32); return finish(d, 0, init);
      case 1: shared_space(d); return finish(d, 0, inval);
      case 2: return decode_arrive(d, false);
      case 3: return decode_arrive(d, true);
      case 4: d.in.b = static_cast<uint16_t>(shared_space(d)); d.src(1, Type::b32); return finish(d, 0, tx);
      case 5: d.in.a = 1; d.in.b = static_cast<uint16_t>(shared_space(d)); d.src(1, Type::b32); return finish(d, 0, tx);
      case 6: case 7: {
        bool blocking = false;
        for (const std::string& m : d.raw.mods) blocking |= m == "try_wait";
        const bool parity = d.take("parity");
        if (shared_space(d) == Space::cluster) d.wrong("waits on an mbarrier of its own CTA only");
        bool relaxed = false;
        for (const std::string& m : d.raw.mods) relaxed |= m == "relaxed";
        d.in.a = static_cast<uint16_t>(parity | blocking << 1 | relaxed << 2);
        d.dst(0, Type::pred);
        d.src(2, parity ? Type::b32 : Type::b64);
        finish(d, 1, wait);
        if (d.args() == 4) { if (!blocking) d.wrong("has one operand too many"); d.src(3, Type::b32); }
        return;
      }
      default: d.take("b64"); d.dst(0, Type::b32); d.src(1, Type::b64); d.in.run = pending_count;
    }
  };
}

}  // namespace dsv4::sim
