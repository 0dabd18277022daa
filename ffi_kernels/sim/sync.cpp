// CTA barriers (bar, barrier), fences, and what exits mean for barriers. PTX ISA 9.7.13.1 to 9.7.13.4.
#include "decode.h"

namespace dsv4::sim {
namespace {

enum Action { sync, arrive, red_popc, red_and, red_or };

void complete(Machine& m, Barrier& b) {
  std::memcpy(b.result, b.reduction, sizeof b.result);
  b.arrived = 0;
  b.expected = 0;
  b.reduction[0] = 0;
  b.reduction[1] = 1;
  b.reduction[2] = 0;
  b.done = b.next;
  b.next.clear();
  ++b.generation;
  m.event();
}

uint32_t threads_of(const Cta& cta) {  // whole warps that still live
  uint32_t n = 0;
  for (const auto& w : cta.warps) n += w->done() || !w->live ? 0 : 32;
  return n;
}

// Slots: [d], barrier, [count], [p]. in.a action; in.b: bit 0 count given, bit 1 aligned.
Step barrier(Ctx& c, const Instr& in) {
  const bool red = in.a >= red_popc;
  const int at = red ? 1 : 0;
  const int first = __builtin_ctz(c.mask);
  const uint32_t id = src<uint32_t>(c, in, at)[first];
  const uint32_t given = in.b & 1 ? src<uint32_t>(c, in, at + 1)[first] : 0;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    if (src<uint32_t>(c, in, at)[l] != id || (in.b & 1 && src<uint32_t>(c, in, at + 1)[l] != given)) fail("the barrier or its count differs between lanes");
  }
  if (id > 15) fail("barrier %u; a CTA has barriers 0 to 15", id);
  if (in.b & 1 && (given == 0 || given % 32)) fail("a barrier for %u threads; the count must be a multiple of 32", given);
  Barrier& b = c.cta->barriers[id];
  Fragment& f = *c.fragment;
  const uint64_t what = 1 + id;
  if (f.token && f.token_what == what) {
    if (b.generation == f.token - 1) {
      c.blocked = c.mask;
      c.why = "a barrier of the CTA";
      return Step::block;
    }
    f.token = f.token_what = 0;
    if (Watch* watch = watch_of(*c.cta)) watch->acquire(*c.warp, b.done);
    if (in.a == red_popc) for (int l = 0; l < 32; ++l) { if (c.mask >> l & 1) out<uint32_t>(c, in, 0)[l] = b.result[0]; }
    else if (red) put_pred(c, in, 0, b.result[in.a == red_and ? 1 : 2] ? kAll : 0);
    return Step::next;
  }
  if (in.b & 2 && c.mask != c.warp->live) {
    c.blocked = c.mask;
    c.why = "the other lanes of the warp at an aligned barrier";
    return Step::block;
  }
  const uint32_t total = given ? given : threads_of(*c.cta);
  if (b.arrived && b.expected != (given ? given : 0) && !(b.expected == 0 && given == 0)) {
    fail("barrier %u is used with %u threads while others wait at it for %u (0: all threads of the CTA)", id, given, b.expected);
  }
  if (!b.arrived) { b.reduction[0] = 0; b.reduction[1] = 1; b.reduction[2] = 0; }
  b.expected = given;
  const uint32_t n = c.mask == c.warp->live ? 32 : static_cast<uint32_t>(__builtin_popcount(c.mask));
  b.arrived += n;
  if (red) {
    const uint32_t p = pred(c, in, at + 1 + (in.b & 1)) & c.mask;
    b.reduction[0] += static_cast<uint32_t>(__builtin_popcount(p));
    b.reduction[1] &= p == c.mask;
    b.reduction[2] |= p != 0;
  }
  c.machine->progress = c.machine->instructions;
  if (b.arrived > total) fail("barrier %u: %u threads have arrived where %u are expected", id, b.arrived, total);
  if (Watch* watch = watch_of(*c.cta)) watch->release(*c.warp, b.next);
  const uint64_t generation = b.generation;
  if (b.arrived == total) complete(*c.machine, b);
  if (in.a == arrive) return Step::next;
  f.token = generation + 1;
  f.token_what = what;
  if (b.generation != generation) return barrier(c, in);
  c.blocked = c.mask;
  c.why = "a barrier of the CTA";
  return Step::block;
}

Step fence(Ctx& c, const Instr&) {
  if (watch_of(*c.cta)) fence_all(c);
  return Step::next;
}
void mark_fenced(Ctx& c) {  // the mbarriers that this warp has initialised
  const uint32_t self = watch_of(*c.cta)->entity_of(*c.warp);
  for (auto& [at, b] : c.cta->mbarriers) b.fenced |= b.maker == self;
}
Step proxy_fence(Ctx& c, const Instr&) {
  if (Watch* watch = watch_of(*c.cta)) {
    mark_fenced(c);
    watch->proxy_fence(*c.warp);
  }
  return Step::next;
}
Step init_fence(Ctx& c, const Instr&) {
  if (Watch* watch = watch_of(*c.cta)) {
    mark_fenced(c);
    watch->init_fence(*c.warp);
  }
  return Step::next;
}

void decode_barrier(Decode& d, bool short_form) {
  d.take("cta");
  if (d.take("warp")) return warp_barrier(d);
  if (d.take("cluster")) return cluster_barrier(d);
  int action = d.choose({"sync", "arrive", "red"});
  if (action < 0) d.wrong("needs .sync, .arrive or .red");
  const bool aligned = d.take("aligned") || short_form;
  if (action == 2) action = red_popc + d.must({"popc", "and", "or"});
  const bool red = action >= red_popc;
  if (red) {
    const Type t = d.type();
    if ((t == Type::u32) != (action == red_popc) || (t != Type::u32 && t != Type::pred)) d.wrong("reduces .popc.u32, .and.pred or .or.pred");
    d.dst(0, t);
  }
  const size_t left = d.args() - (red ? 2 : 0);
  size_t i = red ? 1 : 0;
  d.src(i++, Type::b32);
  const bool counted = left == 2;
  if (counted) d.src(i++, Type::b32);
  if (red) d.src(i++, Type::pred);
  if (action == arrive && !counted) d.wrong("an arrive needs a count");
  d.in.a = static_cast<uint16_t>(action);
  d.in.b = static_cast<uint16_t>(counted | aligned << 1);
  d.in.run = barrier;
}
}  // namespace

void fence_all(Ctx& c) {
  watch_of(*c.cta)->fence(*c.warp);
  if (c.machine->global_watch) c.machine->global_watch->fence(c);
}

void exit_lanes(Machine& m, Warp& w, uint32_t lanes) {
  w.live &= ~lanes;
  const auto n = static_cast<uint32_t>(__builtin_popcount(lanes));
  w.cta->live_threads -= n;
  Cluster& cluster = *w.cta->cluster;
  cluster.live_threads -= n;
  for (Barrier& b : w.cta->barriers) {
    if (b.arrived && !b.expected && b.arrived >= threads_of(*w.cta)) complete(m, b);
  }
  for (int l = 0; l < 32; ++l) {  // an exited lane counts as arrived: take it out on both sides
    if (lanes >> l & 1 && w.cluster_token[l] == cluster.generation + 1) --cluster.arrived;
  }
  if (cluster.arrived && cluster.arrived == cluster.live_threads) {
    cluster.done = cluster.next;
    cluster.next.clear();
    cluster.arrived = 0;
    ++cluster.generation;
  }
  m.event();
  if (!w.cta->live_threads) check_tensor_freed(*w.cta);
  Watch* watch = watch_of(*w.cta);
  if (!watch) return;
  for (int l = 0; l < 32 && m.options.strict; ++l) {  // devices let the copies end first
    if (!(lanes >> l & 1)) continue;
    const Groups& g = w.bulk[l];
    if (!g.open.empty() || !g.committed.empty()) {
      fail("hazard in shared memory: lane %d exits without waiting (cp.async.bulk.wait_group.read) for its bulk copies out of shared memory, which may still read it", l);
    }
  }
  if (!w.live) watch->leave(w);
  if (w.cta->live_threads) return;
  for (const auto& [at, b] : w.cta->mbarriers) {
    if (b.tx) fail("hazard in shared memory: the CTA ends while %lld bytes are pending on the mbarrier at shared address 0x%x", static_cast<long long>(b.tx), at);
  }
  const std::string left = watch->left_behind(*w.cta);
  if (!left.empty()) fail("%s", left.c_str());
}

void add_sync(Decoders& t) {
  t["bar"] = [](Decode& d) { decode_barrier(d, true); };
  t["barrier"] = [](Decode& d) { decode_barrier(d, false); };
  // One instruction runs at a time and its effects are seen at once: fences matter to the hazard checks alone.
  t["membar"] = [](Decode& d) { if (!d.take("proxy")) d.must({"cta", "gl", "sys"}); else d.must({"alias", "async"}); d.in.run = fence; };
  t["fence"] = [](Decode& d) {
    d.in.run = fence;
    if (d.take("proxy")) {
      if (d.must({"alias", "async", "async::generic", "async.global", "tensormap::generic"}) >= 3) d.wrong("is not modelled");
      d.in.run = proxy_fence;
      d.ignore({"global", "shared::cta", "shared::cluster", "sync_restrict::shared::cta", "sync_restrict::shared::cluster", "acquire", "release", "cluster"});
    } else if (d.take("mbarrier_init")) {
      d.must({"release"});
      d.must({"cluster"});
      d.in.run = init_fence;
    } else {
      d.ignore({"sc", "acq_rel", "acquire", "release", "sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
      d.must({"cta", "cluster", "gpu", "sys"});
    }
  };
}

}  // namespace dsv4::sim
