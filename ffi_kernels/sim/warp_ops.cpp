// What the lanes of a warp do together: shfl, vote, match, redux, elect, activemask, bar.warp. PTX ISA 9.7.9.6, 9.7.13.9 ff.
// A lane waits until every lane of its member mask has come to the same instruction.
#include <cmath>

#include "formats.h"
#include "decode.h"

namespace dsv4::sim {
namespace {

// Calls f(members) for each group of lanes with one member mask; lanes whose group is incomplete try again.
template <class F> Step by_mask(Ctx& c, const uint32_t* masks, F f) {
  uint32_t left = c.mask, waiting = 0;
  const uint32_t all = c.mask;
  while (left) {
    const int first = __builtin_ctz(left);
    uint32_t group = 0;
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      if (masks[l] == masks[first]) group |= 1u << l;
    }
    const uint32_t mask = c.machine->options.strict ? masks[first] : masks[first] & c.warp->live;  // devices forget lanes that have exited
    left &= ~group;
    if (group & ~mask) fail("lanes 0x%08x execute with the member mask 0x%08x, which does not name them", group & ~mask, mask);
    if (mask & ~c.warp->live) fail("the member mask 0x%08x names lanes 0x%08x, which have exited or do not exist", mask, mask & ~c.warp->live);
    if (mask & ~group) { waiting |= group; continue; }
    c.mask = group;
    f(group);
  }
  c.mask = all;
  if (!waiting) return Step::next;
  c.blocked = waiting;
  c.why = "the other lanes of its member mask";
  return Step::block;
}

Step shfl(Ctx& c, const Instr& in) {  // slots: d, p, a, b, c, mask; in.a mode: 0 up, 1 down, 2 bfly, 3 idx
  const uint32_t *a = src<uint32_t>(c, in, 2), *b = src<uint32_t>(c, in, 3), *k = src<uint32_t>(c, in, 4);
  return by_mask(c, src<uint32_t>(c, in, 5), [&](uint32_t members) {
    uint32_t r[32], valid = 0;
    for (int lane = 0; lane < 32; ++lane) {
      r[lane] = 0;
      if (!(members >> lane & 1)) continue;
      const int bits = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(k[lane] & 31), segment = static_cast<int>(k[lane] >> 8 & 31);
      const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
      int j = lane;
      bool p = false;
      switch (in.a) {
        case 0: j = lane - bits; p = j >= most; break;
        case 1: j = lane + bits; p = j <= most; break;
        case 2: j = lane ^ bits; p = j <= most; break;
        case 3: j = least | (bits & ~segment); p = j <= most; break;
      }
      if (!p) j = lane;
      r[lane] = members >> (j & 31) & 1 ? a[j & 31] : 0xFDFDFDFD;  // from a lane outside the mask: undefined
      valid |= static_cast<uint32_t>(p) << lane;
    }
    put(out<uint32_t>(c, in, 0), r, members);
    put_pred(c, in, 1, valid);
  });
}

Step vote(Ctx& c, const Instr& in) {  // in.a: 0 all, 1 any, 2 uni, 3 ballot
  const uint32_t p = pred(c, in, 1);
  return by_mask(c, src<uint32_t>(c, in, 2), [&](uint32_t members) {
    const uint32_t yes = p & members;
    if (in.a == 3) {
      uint32_t r[32];
      for (uint32_t& v : r) v = yes;
      return put(out<uint32_t>(c, in, 0), r, members);
    }
    const bool v = in.a == 0 ? yes == members : in.a == 1 ? yes != 0 : yes == members || yes == 0;
    put_pred(c, in, 0, v ? kAll : 0);
  });
}

template <class T> Step match(Ctx& c, const Instr& in) {  // slots: d, p, a, mask; in.a: 0 any, 1 all
  const T* a = src<T>(c, in, 2);
  return by_mask(c, src<uint32_t>(c, in, 3), [&](uint32_t members) {
    uint32_t r[32] = {};
    bool all = true;
    const int first = __builtin_ctz(members);
    for (int l = 0; l < 32; ++l) {
      if (!(members >> l & 1)) continue;
      all &= a[l] == a[first];
      for (int k = 0; k < 32; ++k) if (members >> k & 1 && a[k] == a[l]) r[l] |= 1u << k;
    }
    if (in.a) for (uint32_t& v : r) v = all ? members : 0;
    put(out<uint32_t>(c, in, 0), r, members);
    if (in.a) put_pred(c, in, 1, all ? kAll : 0);
  });
}

enum Redux { add, min, max, bit_and, bit_or, bit_xor };
Step redux(Ctx& c, const Instr& in) {  // in.a op; in.b 1 signed, 2 float; in.c: bit 0 abs, bit 1 NaN
  const uint32_t* a = src<uint32_t>(c, in, 1);
  return by_mask(c, src<uint32_t>(c, in, 2), [&](uint32_t members) {
    uint32_t r = 0;
    bool first = true;
    for (uint32_t rest = members; rest; rest &= rest - 1) {
      uint32_t v = a[__builtin_ctz(rest)];
      if (in.c & 1) v &= 0x7FFFFFFF;
      if (first) { r = v; first = false; continue; }
      const bool less = in.b == 1 ? static_cast<int32_t>(v) < static_cast<int32_t>(r) : v < r;
      if (in.b == 2) {
        const float x = bit_cast<float>(r), y = bit_cast<float>(v);
        if (x != x || y != y) r = (in.c & 2) || (x != x && y != y) ? 0x7FFFFFFF : x != x ? v : r;
        else if ((y < x || (y == x && v >> 31)) == (in.a == min)) r = v;
        continue;
      }
      switch (in.a) {
        case add: r += v; break;
        case min: if (less) r = v; break;
        case max: if (!less) r = v; break;
        case bit_and: r &= v; break;
        case bit_or: r |= v; break;
        case bit_xor: r ^= v; break;
      }
    }
    uint32_t all[32];
    for (uint32_t& v : all) v = r;
    put(out<uint32_t>(c, in, 0), all, members);
  });
}

Step elect(Ctx& c, const Instr& in) {  // slots: d, p, mask. Any lane may be elected: which one depends on the seed
  const Options& o = c.machine->options;
  return by_mask(c, src<uint32_t>(c, in, 2), [&](uint32_t members) {
    uint32_t choice = o.seed && o.strict ? static_cast<uint32_t>((o.seed * 0x9E3779B97F4A7C15ull) >> 40) % static_cast<uint32_t>(__builtin_popcount(members)) : 0;
    uint32_t rest = members;
    while (choice--) rest &= rest - 1;
    const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(rest));
    uint32_t all[32];
    for (uint32_t& v : all) v = leader;
    put(out<uint32_t>(c, in, 0), all, members);
    put_pred(c, in, 1, 1u << leader);
  });
}

Step activemask(Ctx& c, const Instr& in) {
  uint32_t all[32];
  for (uint32_t& v : all) v = c.mask;
  put(out<uint32_t>(c, in, 0), all, c.mask);
  return Step::next;
}

Step bar_warp(Ctx& c, const Instr& in) {
  return by_mask(c, src<uint32_t>(c, in, 0), [&](uint32_t) { if (Watch* watch = watch_of(*c.cta)) watch->warp_sync(*c.warp); });
}

void need_sync(Decode& d) { if (!d.take("sync")) d.wrong("only the .sync form exists on these devices"); }
void pair(Decode& d, Type t) {
  const Arg& to = d.arg(0);
  d.dst(to.kind == Arg::pair ? to.parts[0] : to, t);
  if (to.kind == Arg::pair) d.dst(to.parts[1], Type::pred);
  else d.slot(d.hidden(Type::pred));
}
}  // namespace

void warp_barrier(Decode& d) {
  need_sync(d);
  d.src(0, Type::b32);
  d.in.run = bar_warp;
}

void add_warp_ops(Decoders& t) {
  t["shfl"] = [](Decode& d) {
    need_sync(d);
    d.in.a = static_cast<uint16_t>(d.must({"up", "down", "bfly", "idx"}));
    if (!d.take("b32")) d.wrong("moves .b32");
    pair(d, Type::b32);
    for (size_t i = 1; i < 5; ++i) d.src(i, Type::b32);
    d.in.run = shfl;
  };
  t["vote"] = [](Decode& d) {
    need_sync(d);
    d.in.a = static_cast<uint16_t>(d.must({"all", "any", "uni", "ballot"}));
    const Type x = d.type();
    if ((x == Type::b32) != (d.in.a == 3)) d.wrong("a ballot is .b32, any other vote .pred");
    d.dst(0, x); d.src(1, Type::pred); d.src(2, Type::b32);
    d.in.run = vote;
  };
  t["match"] = [](Decode& d) {
    d.in.a = static_cast<uint16_t>(d.must({"any", "all"}));
    need_sync(d);
    const Type x = d.type();
    pair(d, Type::b32);
    d.src(1, x); d.src(2, Type::b32);
    d.in.run = wide_type(x) ? &match<uint64_t> : &match<uint32_t>;
  };
  t["redux"] = [](Decode& d) {
    need_sync(d);
    d.in.a = static_cast<uint16_t>(d.must({"add", "min", "max", "and", "or", "xor"}));
    if (d.take("abs")) d.in.c |= 1;
    if (d.take("NaN")) d.in.c |= 2;
    const Type x = d.type();
    const bool fits = x == Type::f32 ? d.in.a == min || d.in.a == max : d.in.a >= bit_and ? x == Type::b32 : x == Type::u32 || x == Type::s32;
    if (!fits || (d.in.c && x != Type::f32)) d.wrong("this combination does not exist");
    d.in.b = x == Type::s32 ? 1 : x == Type::f32 ? 2 : 0;
    d.dst(0, x); d.src(1, x); d.src(2, Type::b32);
    d.in.run = redux;
  };
  t["elect"] = [](Decode& d) {
    need_sync(d);
    pair(d, Type::b32);
    d.src(1, Type::b32);
    d.in.run = elect;
  };
  t["activemask"] = [](Decode& d) { d.take("b32"); d.dst(0, Type::b32); d.in.run = activemask; };
}

}  // namespace dsv4::sim
