// cp.async (non-bulk): copies of 4, 8 or 16 bytes to shared memory, groups, and their arrival on mbarriers. PTX ISA 9.7.9.25.
#include "decode.h"

namespace dsv4::sim {
namespace {

// Slots: destination, source, [source size], [ignore]. in.a: size; in.b: bit 0 source size, bit 1 ignore predicate;
// in.c: bit 0 wide destination, bit 1 wide source. imm: offset of the destination; extra: of the source.
Step copy(Ctx& c, const Instr& in) {
  const int64_t source_offset = *static_cast<const int64_t*>(in.extra);
  const uint32_t ignored = in.b & 2 ? pred(c, in, 2) : 0;
  struct Copies {
    struct { uint8_t* to; const uint8_t* from; uint32_t bytes; } of[32];
    int count = 0;
    uint32_t size;
    void run() const {
      for (int i = 0; i < count; ++i) {
        if (of[i].bytes) std::memcpy(of[i].to, of[i].from, of[i].bytes);
        std::memset(of[i].to + of[i].bytes, 0, size - of[i].bytes);
      }
    }
  } copies;
  JobEntity entity;
  Watch* watch = watch_of(*c.cta);
  note(c, in);
  if (watch) entity = watch->copies(c);
  const uint32_t size = copies.size = in.a;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t to = address(c, in, 0, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    if (!(in.c & 1)) to = static_cast<uint32_t>(to);
    const uint64_t from = address(c, in, 1, in.c & 2, l) + static_cast<uint64_t>(source_offset);
    uint32_t n = in.b & 1 ? src<uint32_t>(c, in, 2)[l] : size;
    if (ignored >> l & 1) n = 0;
    if (n > size) fail("copies %u source bytes into %u", n, size);
    uint8_t* p = shared_at(c, shared_offset(to), size, size, Access::write, Space::shared);
    if (watch) watch->job_touch(c, entity, *c.cta, (shared_offset(to) & 0xFFFFFF) - kSharedBase, size, true, false, 1u << l);
    if (watch && n) touch_memory(c, in, Space::global, from, n, Touch::read, Lanes::one(l));
    copies.of[copies.count++] = {p, n ? resolve(c, Space::global, from, n, size, Access::read, l) : nullptr, n};
  }
  if (eager(c)) {
    copies.run();
    c.warp->copies.open.push_back({nullptr, entity, c.mask});
  } else {
    auto job = std::make_shared<JobState>();
    job->entity = entity;
    c.warp->copies.open.push_back({job, entity, c.mask});
    submit(c, job, [copies](Ctx&) { copies.run(); });
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}
const char kWhy[] = "its groups of asynchronous copies";
Step commit(Ctx& c, const Instr&) {
  if (Watch* watch = watch_of(*c.cta)) watch->close_copies(*c.warp);
  commit_group(c, c.warp->copies);
  return Step::next;
}
Step wait(Ctx& c, const Instr& in) { return wait_groups(c, c.warp->copies, in.a, kWhy); }
Step wait_all(Ctx& c, const Instr& in) {
  uint32_t open = 0;
  for (const Groups::Member& m : c.warp->copies.open) open |= m.lanes;
  if (open & c.mask) commit(c, in);
  return wait_groups(c, c.warp->copies, 0, kWhy);
}
// The arrival comes when all earlier copies of the lane are done. in.a: noinc
Step arrive(Ctx& c, const Instr& in) {
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t at = address(c, in, 0, in.c & 1, l) + static_cast<uint64_t>(in.imm);
    if (!(in.c & 1)) at = static_cast<uint32_t>(at);
    Mbarrier* b = &mbarrier_at(c, at, Space::shared);
    if (!in.a) ++b->pending;
    std::vector<Groups::Member> before;
    const auto add = [&](const std::vector<Groups::Member>& members) {
      for (const Groups::Member& m : members) if (m.lanes >> l & 1) before.push_back(m);
    };
    for (const Groups::Group& g : c.warp->copies.committed) if (g.lanes >> l & 1) add(g.members);
    add(c.warp->copies.open);
    Watch* watch = watch_of(*c.cta);
    if (watch) watch->close_copies(*c.warp);
    const bool watched = watch != nullptr;
    const auto ready = [before] {
      for (const Groups::Member& m : before) if (m.job && !m.job->done) return false;
      return true;
    };
    submit(c, std::make_shared<JobState>(), [b, before, watched](Ctx& later) {
      if (watched) for (const Groups::Member& m : before) Watch::release_job(b->next, m.entity);
      mbarrier_arrive(*later.machine, *b, 1);
    }, ready);
  }
  return Step::next;
}
}  // namespace

void async_copy(Decode& d) {
  if (d.take("bulk")) return bulk_copy(d, false);
  if (d.take("commit_group")) { d.in.run = commit; return; }
  if (d.take("wait_all")) { d.in.run = wait_all; return; }
  if (d.take("wait_group")) {
    if (d.arg(0).kind != Arg::integer || d.arg(0).value > 1000) d.wrong("needs a number of groups");
    d.in.a = static_cast<uint16_t>(d.arg(0).value);
    d.in.run = wait;
    return;
  }
  bool arrives = false;
  for (const std::string& m : d.raw.mods) arrives |= m == "arrive";
  if (arrives) {
    d.ignore({"mbarrier", "arrive"});
    d.in.a = d.take("noinc");
    d.ignore({"shared", "shared::cta", "b64"});
    d.in.c = d.memory(0);
    d.in.run = arrive;
    return;
  }
  const int policy = d.must({"ca", "cg"});
  if (d.choose({"shared", "shared::cta"}) < 0) d.wrong("copies to .shared");
  d.must({"global"});
  const bool hint = d.take("L2::cache_hint");
  d.ignore({"L2::64B", "L2::128B", "L2::256B"});
  const Arg& size = d.arg(2);
  if (size.kind != Arg::integer || (size.value != 16 && (policy == 1 || (size.value != 4 && size.value != 8)))) d.wrong("copies 4, 8 or 16 bytes (.cg: 16)");
  d.in.a = static_cast<uint16_t>(size.value);
  const bool to = d.memory(0);
  const int64_t offset = d.in.imm;
  const bool from = d.memory(1);
  *d.extra<int64_t>() = d.in.imm;
  d.in.imm = offset;
  d.in.c = static_cast<uint16_t>(to | from << 1);
  size_t i = 3;
  const size_t end = d.args() - (hint ? 1 : 0);
  if (i < end) {
    const Arg& a = d.arg(i++);
    const bool predicate = a.kind == Arg::reg && d.f.registers[static_cast<size_t>(a.reg_index)].type == Type::pred;
    d.in.b = predicate ? 2 : 1;
    d.src(a, predicate ? Type::pred : Type::b32);
  }
  if (hint) d.src(i, Type::b64);
  d.in.run = copy;
}

void add_async(Decoders& t) {
  t["cp"] = [](Decode& d) {
    if (d.take("reduce")) {
      if (!d.take("async") || !d.take("bulk")) d.wrong("is written cp.reduce.async.bulk");
      return bulk_copy(d, true);
    }
    if (!d.take("async")) d.wrong("only cp.async and cp.reduce.async are modelled");
    async_copy(d);
  };
}

}  // namespace dsv4::sim
