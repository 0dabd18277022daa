// cp.async.bulk of one dimension, its reductions, bulk groups. PTX ISA 9.7.9.25.4 and 9.7.9.25.5.
#include "atomic.h"

namespace dsv4::sim {
namespace {

struct Bulk {
  enum Way : uint8_t { global_to_shared, shared_to_cluster, shared_to_global } way;
  bool multicast = false, masked = false, reduce = false, cluster_target = true;
  AtomicOp op = AtomicOp::add;
  Type type = Type::u32;
  bool wide_to = false, wide_from = false, wide_barrier = false;
  int64_t to = 0, from = 0, barrier = 0;
};

void combine(const Bulk& k, uint8_t* to, const uint8_t* from, uint64_t size) {
  if (!k.reduce) { std::memcpy(to, from, size); return; }
  const auto n = static_cast<size_t>(bits_of(k.type)) / 8;
  for (size_t i = 0; i < size; i += n) {
    uint64_t a = 0, b = 0;
    std::memcpy(&a, to + i, n);
    std::memcpy(&b, from + i, n);
    const uint64_t r = apply_atomic(k.op, k.type, a, b, 0, false);  // unlike red, keeps subnormal numbers
    std::memcpy(to + i, &r, n);
  }
}

// Slots: to, from, size, then barrier (towards shared memory), cta mask (multicast), byte mask.
void out(Ctx& c, const Instr& in, const Bulk& k, int l, uint64_t to, uint64_t from, uint64_t size) {  // shared to global
  const uint32_t at = shared_offset(from);
  const uint8_t* s = shared_at(c, at, size, 16, Access::read, Space::shared);
  uint8_t* g = size ? resolve(c, Space::global, to, size, 16, k.reduce ? Access::both : Access::write, l) : nullptr;
  auto job = std::make_shared<JobState>();
  if (Watch* watch = watch_of(*c.cta)) {
    job->entity = watch->begin(c);
    watch->job_touch(c, job->entity, *c.cta, (at & 0xFFFFFF) - kSharedBase, size, false, true, 1u << l);
  }
  c.warp->bulk.open.push_back({job, job->entity, 1u << l});
  const uint32_t mask = k.masked ? src<uint32_t>(c, in, 3)[l] : 0xFFFF;
  submit(c, job, [s, g, size, mask, &k](Ctx&) {
    if (k.masked) {
      for (uint64_t i = 0; i < size; ++i) if (mask >> (i % 16) & 1) g[i] = s[i];
    } else if (size) combine(k, g, s, size);
  });
}

struct Target { uint8_t* to; Mbarrier* signal; };

Step copy(Ctx& c, const Instr& in) {
  const Bulk& k = *static_cast<const Bulk*>(in.extra);
  note(c, in);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t to = where(c, in, 0, k.wide_to, k.to, l), from = where(c, in, 1, k.wide_from, k.from, l);
    const uint64_t size = src<uint32_t>(c, in, 2)[l];
    if (size % 16) fail("a bulk copy of %llu bytes; the size must be a multiple of 16", (unsigned long long)size);
    if (k.way == Bulk::shared_to_global) { out(c, in, k, l, to, from, size); continue; }
    Watch* watch = watch_of(*c.cta);
    auto job = std::make_shared<JobState>();
    if (watch) job->entity = watch->begin(c);
    const uint64_t barrier = where(c, in, 3, k.wide_barrier, k.barrier, l);
    const uint8_t* s = nullptr;
    if (k.way == Bulk::global_to_shared) s = size ? resolve(c, Space::global, from, size, 16, Access::read, l) : nullptr;
    else {
      s = shared_at(c, shared_offset(from), size, 16, Access::read, Space::shared);
      if (watch) watch->job_touch(c, job->entity, *c.cta, (shared_offset(from) & 0xFFFFFF) - kSharedBase, size, false, true, 1u << l);
    }
    const Space target = k.cluster_target ? Space::cluster : Space::shared;
    std::vector<Target> targets;
    const auto one = [&](uint32_t at, uint32_t signal) {
      uint8_t* p = shared_at(c, at, size, 16, k.reduce ? Access::both : Access::write, target);
      Mbarrier& b = mbarrier_at(c, signal, target);
      if (watch) {
        if (!b.fenced) fail("hazard in shared memory: a bulk copy signals the mbarrier at shared address 0x%x, whose mbarrier.init was not followed by fence.mbarrier_init or fence.proxy.async", signal);
        watch->job_touch(c, job->entity, cta_of(c, at), (at & 0xFFFFFF) - kSharedBase, size, true, true, 1u << l);
      }
      targets.push_back({p, &b});
    };
    const uint32_t at = shared_offset(to), signal = shared_offset(barrier);
    if (k.multicast) {
      const uint32_t mask = src<uint32_t>(c, in, 4)[l] & 0xFFFF;
      const auto ctas = static_cast<uint32_t>(c.cta->cluster->ctas.size());
      if (mask >> ctas) fail("the multicast mask 0x%x names CTAs outside the cluster of %u", mask, ctas);
      for (uint32_t r = 0; r < ctas; ++r) if (mask >> r & 1) one((at & 0xFFFFFF) | r << 24, (signal & 0xFFFFFF) | r << 24);
    } else {
      if (at >> 24 != signal >> 24) fail("a bulk copy to CTA %u signals an mbarrier of CTA %u", at >> 24, signal >> 24);
      if (k.way == Bulk::shared_to_cluster && at >> 24 == c.cta->rank) fail("a bulk copy from shared memory to shared memory of the same CTA; it must go to another one of the cluster");
      one(at, signal);
    }
    const bool watched = watch != nullptr;
    submit(c, job, [targets, s, size, entity = job->entity, watched, &k](Ctx& later) {
      for (const Target& t : targets) {
        if (size) combine(k, t.to, s, size);
        if (watched) Watch::release_job(t.signal->next, entity);
        mbarrier_tx(*later.machine, *t.signal, -static_cast<int64_t>(size));
      }
    });
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}
Step commit(Ctx& c, const Instr&) { commit_group(c, c.warp->bulk); return Step::next; }
Step wait(Ctx& c, const Instr& in) { return wait_groups(c, c.warp->bulk, in.a, "its groups of bulk copies"); }
Step nothing(Ctx&, const Instr&) { return Step::next; }
}  // namespace

void bulk_copy(Decode& d, bool reduce) {
  if (!reduce) {
    if (d.take("commit_group")) { d.in.run = commit; return; }
    if (d.take("wait_group")) {
      d.take("read");
      if (d.arg(0).kind != Arg::integer || d.arg(0).value > 1000) d.wrong("needs a number of groups");
      d.in.a = static_cast<uint16_t>(d.arg(0).value);
      d.in.run = wait;
      return;
    }
    if (d.take("prefetch")) {
      if (d.take("tensor")) return tensor_copy(d, false, true);
      d.must({"L2"});
      d.must({"global"});
      const bool hint = d.take("L2::cache_hint");
      d.memory(0);
      d.src(1, Type::b32);
      if (hint) d.src(2, Type::b64);
      d.in.run = nothing;
      return;
    }
  }
  if (d.take("tensor")) return tensor_copy(d, reduce, false);
  Bulk k;
  k.reduce = reduce;
  const int to = d.must({"shared::cluster", "global", "shared::cta"});  // the destination stands first
  if (to == 1) {
    if (d.take("shared::cluster")) d.wrong("the source must be .shared::cta");
    const bool from_shared = d.take("shared::cta");
    k.way = from_shared ? Bulk::shared_to_global : Bulk::global_to_shared;
    if (!from_shared) d.wrong("copies between .global and .shared");
  } else if (to == 2) {
    // .shared::cta is the destination when .global is the source, the source otherwise.
    if (d.take("global")) { k.way = Bulk::global_to_shared; k.cluster_target = false; }
    else d.wrong("copies between .global and .shared");
  } else k.way = d.take("global") ? Bulk::global_to_shared : (d.must({"shared::cta"}), Bulk::shared_to_cluster);
  // `.global.shared::cta` and `.shared::cta.global` hold the same words: their order decides.
  size_t global_at = 0, cta_at = 0;
  for (size_t i = 0; i < d.raw.mods.size(); ++i) {
    if (d.raw.mods[i] == "global") global_at = i;
    if (d.raw.mods[i] == "shared::cta") cta_at = i;
  }
  if (to == 1 && cta_at < global_at) { k.way = Bulk::global_to_shared; k.cluster_target = false; }
  if (k.way == Bulk::shared_to_global) d.must({"bulk_group"});
  else d.must({"mbarrier::complete_tx::bytes"});
  k.multicast = d.take("multicast::cluster");
  k.masked = d.take("cp_mask");
  const bool hint = d.take("L2::cache_hint");
  if (k.multicast && k.way != Bulk::global_to_shared) d.wrong("multicast goes from global to shared memory");
  if (reduce) {
    k.op = atomic_op(d);
    d.take("noftz");
    k.type = d.type();
    if (k.op == AtomicOp::exch || k.op == AtomicOp::cas) d.wrong("this reduction does not exist");
    if (bits_of(k.type) < 16) d.wrong("this type is not reduced");
  }
  k.wide_to = d.memory(0);
  k.to = d.in.imm;
  k.wide_from = d.memory(1);
  k.from = d.in.imm;
  d.src(2, Type::b32);
  size_t i = 3;
  if (k.way != Bulk::shared_to_global) { k.wide_barrier = d.memory(i++); k.barrier = d.in.imm; }
  if (k.multicast) d.src(i++, Type::b16);
  if (hint) d.arg(i++);
  if (k.masked) d.src(i++, Type::b16);
  *d.extra<Bulk>() = k;
  d.in.run = copy;
}

}  // namespace dsv4::sim
