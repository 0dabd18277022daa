// The happens-before check, accesses: see hazards.h. What orders them: happens_before.cpp.
#include "hazards.h"

#include <algorithm>

#include "machine.h"

namespace dsv4::sim {

Watch::Watch(uint32_t ctas, uint32_t warps_per_cta, uint32_t words)
    : warps_(warps_per_cta), words_(words), threads_(ctas * warps_per_cta), cells_(ctas), remote_(ctas), gone_(ctas) {}

uint32_t Watch::entity_of(const Warp& w) const { return w.cta->rank * warps_ + w.id; }

std::string Watch::name(uint32_t e) const {
  const auto count = static_cast<uint32_t>(threads_.size());
  const auto warp = [&](uint32_t w) { return text_of("warp %u of CTA %u of the cluster", w % warps_, w / warps_); };
  if (e < count) return warp(e);
  return "an asynchronous operation (issued by " + warp(e < 2 * count ? e - count : job_maker_[e - 2 * count]) + ")";
}

Cell* Watch::cells(const Cta& cta, uint32_t end) {
  Cells& all = cells_[cta.rank];
  if (end > all.count) {  // tensor memory comes when it is used
    const uint32_t count = end <= words_ ? words_ : words_ + 4 * 512;
    Block larger(count * sizeof(Cell));
    Cell* const cells = reinterpret_cast<Cell*>(larger.data());
    if (all.count) std::memcpy(static_cast<void*>(cells), all.storage.data(), all.count * sizeof(Cell));
    std::uninitialized_fill(cells + all.count, cells + count, Cell());
    all.storage = std::move(larger);
    all.count = count;
  }
  return reinterpret_cast<Cell*>(all.storage.data());
}

void Watch::hazard(Ctx& c, const Cta& cta, uint32_t offset, uint64_t bytes, const char* what, const Mark& m, const char* did) {
  const uint32_t e = m.entity - 1u, self = entity_of(*c.warp);
  const auto count = static_cast<uint32_t>(threads_.size());
  bool waited = true;  // for its end
  uint32_t maker = e;
  if (e >= count && e < 2 * count) {
    maker = e - count;
    waited = threads_[maker].waits[__builtin_ctz(m.lanes)].first(m.clock) > 0;
  } else if (e >= count) waited = false;
  const char* why = !waited ? ", and whose end has not been waited for" : maker == self ? ", another lane of the same warp, with no bar.warp.sync between" : ", with no synchronisation between";
  const std::string before = name(e) + " " + did + text_of(" at PTX line %u (", m.raw ? m.raw->line : 0) + (m.raw ? source_of(c.machine->module, *m.raw) + ": '" + show(*m.raw) : "?: '?") + "')" + why;
  if (offset >= tensor_base()) {
    const uint32_t at = (offset - tensor_base()) / 4;
    fail("hazard in tensor memory: %s columns from %u, lanes %u to %u of CTA %u, which %s", what, at % 512, at / 512 * 32, at / 512 * 32 + 31, cta.rank, before.c_str());
  }
  fail("hazard in shared memory: %s %llu bytes at offset 0x%x of CTA %u's shared memory, which %s", what, (unsigned long long)bytes, offset, cta.rank, before.c_str());
}

// Whether an access lies before what `who` of the warp does now.
bool Watch::before(const Thread& me, uint32_t self, const Mark& m, Lanes who, bool was_read) const {
  uint32_t e = m.entity - 1u, clock = m.clock, left = m.lanes;
  if (me.order.seen.at(e) >= clock) return true;
  const auto count = static_cast<uint32_t>(threads_.size());
  if (e >= count && e < 2 * count) {  // a copy counts as a write of the lane that waited for it, at the first such wait
    for (const Partial& p : me.partial) if (p.lanes & who.lanes && p.order.seen.at(e) >= clock) return true;
    e -= count;
    const Waits& waits = threads_[e].waits[__builtin_ctz(left)];
    if (waits.forgotten >= clock) return true;
    if (!(clock = waits.first(clock))) return false;
  }
  if (e == self) {
    left &= ~who.own;
    if (!left || (was_read && clock <= me.reads)) return true;
  }
  const auto knows = [&](const Order& o) { return !o.seen.unknown(e, clock, left) || (was_read && o.reads.at(e) >= clock); };
  if (knows(me.order)) return true;
  uint32_t ignorant = who.lanes;
  for (const Partial& p : me.partial) if (p.lanes & ignorant && knows(p.order)) ignorant &= ~p.lanes;
  return !ignorant;
}

void Watch::check_started(Ctx& c, const Thread& me, const Cta& cta, const char* what) const {
  if (&cta == c.cta) return;
  const auto knows = [&](const Order& o) {
    for (uint32_t w = 0; w < warps_; ++w) if (o.inits.at(cta.rank * warps_ + w) > 0) return true;
    return false;
  };
  if (knows(me.order)) return;
  for (const Partial& p : me.partial) if (knows(p.order)) return;
  fail("hazard in shared memory: %s CTA %u's shared memory that is not ordered after the start of that CTA (a barrier of the cluster is missing)", what, cta.rank);
}

void Watch::forget_readers(Cell& x) {
  x.read = Mark();
  while (x.more >= 0) {
    Reader& r = readers_[static_cast<size_t>(x.more)];
    std::swap(r.next, spare_reader_);
    std::swap(spare_reader_, x.more);
  }
}

// Beside x.read. Earlier reads of the same entity make room where they lie before: of the same lanes, or up to a clock.
void Watch::add_reader(Cell& x, const Mark& mark, uint32_t superseded) {
  int own = 0;
  for (int32_t i = x.more; i >= 0; i = readers_[static_cast<size_t>(i)].next) {
    Mark& m = readers_[static_cast<size_t>(i)].mark;
    if (m.entity != mark.entity) continue;
    const bool same = m.clock == mark.clock;
    if (!same && m.clock > superseded && m.lanes & ~mark.lanes && ++own < 4) continue;
    const uint32_t lanes = same || own == 4 ? m.lanes | mark.lanes : mark.lanes, clock = own == 4 ? std::min(m.clock, mark.clock) : mark.clock;
    const uint8_t bytes = same || own == 4 ? m.bytes | mark.bytes : mark.bytes;
    m = mark;
    m.bytes = bytes & 15;
    m.lanes = lanes;
    m.clock = clock;
    return;
  }
  int32_t i = spare_reader_;
  if (i >= 0) spare_reader_ = readers_[static_cast<size_t>(i)].next;
  else {
    i = static_cast<int32_t>(readers_.size());
    readers_.emplace_back();
  }
  readers_[static_cast<size_t>(i)] = {mark, x.more};
  x.more = i;
}

void Watch::touch(Ctx& c, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, Lanes who) {
  const uint32_t self = entity_of(*c.warp);
  Thread& me = threads_[self];
  const bool write = kind == Touch::write || kind == Touch::strong_write || kind == Touch::atomic;
  const bool strong = kind != Touch::read && kind != Touch::write;
  Mark mark;
  mark.raw = c.statement;
  mark.clock = now(me);
  mark.lanes = who.lanes;
  mark.entity = static_cast<uint16_t>(self + 1);
  mark.strong = strong;
  if (&cta != c.cta) {
    check_started(c, me, cta, "an access of");
    remote_[cta.rank][self] = {c.statement, mark.clock, who.lanes};
  }
  Cell* const all = cells(cta, (offset + bytes + 3) / 4);
  for (uint32_t b = offset; b < offset + bytes;) {
    const uint32_t word = b / 4, end = std::min(offset + bytes, (word + 1) * 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - b)) - 1) << (b % 4));
    b = end;
    mark.bytes = mask & 15;
    mark.lanes = who.lanes;
    Cell& x = all[word];
    const auto conflicts = [&](const Mark& m, bool was_read) {
      return m.entity && m.bytes & mask && !(strong && m.strong) && !before(me, self, m, who, was_read);
    };
    const auto same = [&](const Mark& m) { return m.entity == mark.entity && m.clock == mark.clock; };
    if (!(write && x.write.entity == mark.entity) && conflicts(x.write, false)) hazard(c, cta, offset, bytes, write ? "writes" : "reads", x.write, "writes");
    if (!write) {
      if (same(x.read)) {
        mark.lanes |= x.read.lanes;
        mark.bytes = (mark.bytes | x.read.bytes) & 15;
        x.read = mark;
      } else if (!x.read.entity || (x.read.entity == mark.entity && !(x.read.lanes & ~who.own)) || (x.more < 0 && before(me, self, x.read, who, true))) {
        x.read = mark;
      } else add_reader(x, mark, std::max(me.reads, me.order.seen.at(self)));
      continue;
    }
    if (conflicts(x.read, true)) hazard(c, cta, offset, bytes, "writes", x.read, "reads");
    for (int32_t i = x.more; i >= 0; i = readers_[static_cast<size_t>(i)].next) {
      const Mark& m = readers_[static_cast<size_t>(i)].mark;
      if (conflicts(m, true)) hazard(c, cta, offset, bytes, "writes", m, "reads");
    }
    if (same(x.write)) {
      mark.lanes |= x.write.lanes;
      mark.bytes = (mark.bytes | x.write.bytes) & 15;
    }
    x.write = mark;
    if (mask == 15) forget_readers(x);
  }
  if (!strong) return;
  Order& place = locations_[uint64_t{cta.rank} << 32 | offset];
  if (kind != Touch::strong_write) me.pending.join(place);
  if (kind != Touch::strong_read) place.join(me.fenced);
}

JobEntity Watch::begin(Ctx& c) {
  const auto first = static_cast<uint32_t>(2 * threads_.size());
  if (free_.size() < 256) {
    free_.push_front(first + static_cast<uint32_t>(job_clock_.size()));
    job_clock_.push_back(0);
    job_maker_.push_back(0);
  }
  JobEntity job;
  job.entity = free_.front();
  free_.pop_front();
  if (job.entity > 65000) fail("more than 60000 asynchronous operations are in flight");
  job.clock = ++job_clock_[job.entity - first];
  job_maker_[job.entity - first] = entity_of(*c.warp);
  return job;
}

JobEntity Watch::again(const JobEntity& job) { return {job.entity, ++job_clock_[job.entity - 2 * threads_.size()]}; }

JobEntity Watch::copies(Ctx& c) {
  const uint32_t self = entity_of(*c.warp);
  return {static_cast<uint32_t>(threads_.size()) + self, threads_[self].copies};
}

bool Watch::proxy_knows(const Thread& me, const Mark& m) const {
  const uint32_t e = m.entity - 1u;
  if (!me.order.proxy.unknown(e, m.clock, m.lanes)) return true;
  for (const Partial& p : me.partial) if (!p.order.proxy.unknown(e, m.clock, m.lanes)) return true;
  return false;
}

void Watch::job_touch(Ctx& c, const JobEntity& job, Cta& cta, uint32_t offset, uint64_t bytes, bool write, bool async_proxy, uint32_t lanes) {
  const uint32_t self = entity_of(*c.warp);
  Thread& me = threads_[self];
  const bool copy = is_copy(job);
  const Lanes who{lanes, lanes};
  if (&cta != c.cta) {
    check_started(c, me, cta, "a copy to");
    remote_[cta.rank][job.entity] = {c.statement, job.clock, kAll};
  }
  Mark mark;
  mark.raw = c.statement;
  mark.clock = job.clock;
  mark.lanes = copy ? lanes : kAll;
  mark.entity = static_cast<uint16_t>(job.entity + 1);
  mark.bytes = 15;
  mark.async = async_proxy;
  Mark good, good_read;  // found to lie before: neighbours mostly were accessed together
  const auto like = [](const Mark& a, const Mark& b) { return a.entity == b.entity && a.clock == b.clock && a.lanes == b.lanes; };
  const auto ordered = [&](const Mark& m, bool was_read) { return (m.entity == mark.entity && !copy) || before(me, self, m, who, was_read); };
  const uint32_t first = offset / 4, end = static_cast<uint32_t>((offset + bytes + 3) / 4);
  Cell* const all = cells(cta, end);
  for (uint32_t word = first; word < end; ++word) {
    Cell& x = all[word];
    if (x.write.entity && !like(x.write, good)) {
      if (!ordered(x.write, false)) hazard(c, cta, offset, bytes, write ? "an asynchronous operation writes" : "an asynchronous operation reads", x.write, "writes");
      if (!write && async_proxy && !x.write.async && x.write.entity <= threads_.size() && !proxy_knows(me, x.write)) {
        fail("hazard in shared memory: an asynchronous operation reads %llu bytes at offset 0x%x of CTA %u's shared memory, which %s writes at PTX line %u (%s: '%s'), with no fence.proxy.async between",
             (unsigned long long)bytes, offset, cta.rank, name(x.write.entity - 1u).c_str(), x.write.raw->line, source_of(c.machine->module, *x.write.raw).c_str(), show(*x.write.raw).c_str());
      }
      good = x.write;
    }
    if (write) {
      if (x.read.entity && !like(x.read, good_read)) {
        if (!ordered(x.read, true)) hazard(c, cta, offset, bytes, "an asynchronous operation writes", x.read, "reads");
        good_read = x.read;
      }
      for (int32_t i = x.more; i >= 0; i = readers_[static_cast<size_t>(i)].next) {
        const Mark& m = readers_[static_cast<size_t>(i)].mark;
        if (!ordered(m, true)) hazard(c, cta, offset, bytes, "an asynchronous operation writes", m, "reads");
      }
      x.write = mark;
      forget_readers(x);
    } else if (!like(x.read, mark)) {
      for (int32_t* i = &x.more; *i >= 0;) {  // what lies before makes room
        Reader& r = readers_[static_cast<size_t>(*i)];
        if (!ordered(r.mark, true)) {
          i = &r.next;
          continue;
        }
        const int32_t free = *i;
        *i = r.next;
        r.next = spare_reader_;
        spare_reader_ = free;
      }
      bool replace = !x.read.entity || like(x.read, good_read);
      if (!replace && ordered(x.read, true)) { good_read = x.read; replace = true; }
      if (replace) x.read = mark;
      else add_reader(x, mark, 0);
    }
  }
}

}  // namespace dsv4::sim
