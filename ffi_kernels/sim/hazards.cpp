// The happens-before check, accesses: see hazards.h. What orders them: happens_before.cpp.
#include "hazards.h"

#include <algorithm>

#include "machine.h"

namespace dsv4::sim {


Watch::Watch(uint32_t ctas, uint32_t warps_per_cta, uint32_t words, bool strict)
    : warps_(warps_per_cta), words_(words), strict_(strict), threads_(ctas * warps_per_cta), cells_(ctas), remote_(ctas), gone_(ctas) {}

uint32_t Watch::entity_of(const Warp& w) const { return w.cta->rank * warps_ + w.id; }

std::string Watch::name(uint32_t e) const {
  const auto count = static_cast<uint32_t>(threads_.size());
  const auto warp = [&](uint32_t w) { return text_of("warp %u of CTA %u of the cluster", w % warps_, w / warps_); };
  if (e < count) return warp(e);
  return "an asynchronous operation (issued by " + warp(e < 2 * count ? e - count : job_maker_[e - 2 * count]) + ")";
}

Watch::Cells& Watch::cells(const Cta& cta, uint32_t end) {
  Cells& all = cells_[cta.rank];
  if (end > all.count) {  // tensor memory comes when it is used
    const uint32_t count = end <= words_ ? words_ : words_ + 4 * 512;
    Block larger(count * sizeof(Cell)), chains(count * sizeof(int32_t));
    if (all.count) {
      std::memcpy(larger.data(), all.storage.data(), all.count * sizeof(Cell));
      std::memcpy(chains.data(), all.chains.data(), all.count * sizeof(int32_t));
    }
    std::memset(larger.data() + all.count * sizeof(Cell), 0, (count - all.count) * sizeof(Cell));
    all.storage = std::move(larger);
    all.chains = std::move(chains);
    all.count = count;
  }
  return all;
}

const Raw* Watch::statement(const Ctx& c, const Mark& m) const { return c.machine->module.statements[m.statement]; }

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
  const Raw* raw = statement(c, m);
  const std::string before = name(e) + " " + did + text_of(" at PTX line %u (", raw ? raw->line : 0) + (raw ? source_of(c.machine->module, *raw) + ": '" + show(*raw) : "?: '?") + "')" + why;
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
    if (!strict_ || (m.mixed && who.part && m.lanes & who.own)) return true;
    left &= ~who.own;
    if (!left || (was_read && clock <= me.reads)) return true;
  }
  const auto knows = [&](const Order& o) { return !o.seen.unknown(e, clock, left) || (was_read && o.reads.at(e) >= clock); };
  if (knows(me.order)) return true;
  uint32_t ignorant = who.lanes;
  for (const Partial& p : me.partial) if (p.lanes & ignorant && knows(p.order)) ignorant &= ~p.lanes;
  return !ignorant;
}

void Watch::reach(Ctx& c, const Cta& cta, uint32_t entity, uint32_t clock, uint32_t lanes, const char* what) {
  const Thread& me = threads_[entity_of(*c.warp)];
  const auto knows = [&](const Order& o) {
    for (uint32_t w = 0; w < warps_; ++w) if (o.inits.at(cta.rank * warps_ + w) > 0) return true;
    return false;
  };
  bool started = knows(me.order);
  for (const Partial& p : me.partial) started = started || knows(p.order);
  if (!started) {
    fail("hazard in shared memory: %s CTA %u's shared memory that is not ordered after the start of that CTA (a barrier of the cluster is missing)", what, cta.rank);
  }
  remote_[cta.rank][entity] = {c.statement, clock, lanes};
}

void Watch::forget_readers(Cells& all, uint32_t word) {
  Cell& x = all.at(word);
  for (int32_t i = x.read.more ? all.more(word) : -1; i >= 0;) {
    Reader& r = readers_[static_cast<size_t>(i)];
    const int32_t next = r.next;
    r.next = spare_reader_;
    spare_reader_ = i;
    i = next;
  }
  x.read = Mark();
}

// Beside the first one. Earlier reads of the same entity make room where they lie before: of the same lanes, or up to a clock.
void Watch::add_reader(Cells& all, uint32_t word, const Mark& mark, uint32_t superseded) {
  Cell& x = all.at(word);
  const int32_t first = x.read.more ? all.more(word) : -1;
  int own = 0;
  for (int32_t i = first; i >= 0; i = readers_[static_cast<size_t>(i)].next) {
    Mark& m = readers_[static_cast<size_t>(i)].mark;
    if (m.entity != mark.entity) continue;
    const bool same = m.clock == mark.clock;
    if (!same && m.clock > superseded && m.lanes & ~mark.lanes && ++own < 4) continue;
    Mark joined = mark;
    if (same || own == 4) joined.join(m);
    if (own == 4) joined.clock = std::min(m.clock, mark.clock);
    m = joined;
    return;
  }
  int32_t i = spare_reader_;
  if (i >= 0) spare_reader_ = readers_[static_cast<size_t>(i)].next;
  else {
    i = static_cast<int32_t>(readers_.size());
    readers_.emplace_back();
  }
  readers_[static_cast<size_t>(i)] = {mark, first};
  all.more(word) = i;
  x.read.more = 1;
}

// A read of these bytes by another entity than `except` that does not lie before; null if there is none.
const Mark* Watch::unordered_reader(const Cells& all, uint32_t word, const Mark& by, const Thread& me, uint32_t self, Lanes who, uint16_t except) const {
  const auto unordered = [&](const Mark& m) {
    return m.entity && m.entity != except && m.bytes & by.bytes && !(by.strong && m.strong) && !before(me, self, m, who, true);
  };
  const Mark& first = all.at(word).read;
  if (unordered(first)) return &first;
  for (int32_t i = first.more ? all.more(word) : -1; i >= 0;) {
    const Reader& r = readers_[static_cast<size_t>(i)];
    if (unordered(r.mark)) return &r.mark;
    i = r.next;
  }
  return nullptr;
}

void Watch::touch(Ctx& c, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, Lanes who) {
  const uint32_t self = entity_of(*c.warp);
  Thread& me = threads_[self];
  const bool write = kind == Touch::write || kind == Touch::strong_write || kind == Touch::atomic;
  const bool strong = kind != Touch::read && kind != Touch::write;
  Mark mark;
  mark.statement = c.statement->id;
  mark.clock = now(me);
  mark.entity = static_cast<uint16_t>(self + 1);
  mark.strong = strong;
  if (&cta != c.cta) reach(c, cta, self, mark.clock, who.lanes, "an access of");
  Cells& all = cells(cta, (offset + bytes + 3) / 4);
  for (uint32_t b = offset; b < offset + bytes;) {
    const uint32_t word = b / 4, end = std::min(offset + bytes, (word + 1) * 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - b)) - 1) << (b % 4) & 15);
    b = end;
    mark.bytes = mask;
    mark.lanes = who.lanes;
    mark.mixed = 0;
    who.part = mask != 15;
    Cell& x = all.at(word);
    const auto same = [&](const Mark& m) { return m.entity == mark.entity && m.clock == mark.clock; };
    const Mark& w = x.write;
    if (w.entity && w.bytes & mask && !(strong && w.strong) && !(write && w.entity == mark.entity) && !before(me, self, w, who, false)) {
      hazard(c, cta, offset, bytes, write ? "writes" : "reads", w, "writes");
    }
    if (!write) {
      mark.more = x.read.more;
      if (same(x.read)) {
        mark.join(x.read);
        x.read = mark;
      } else if (!x.read.entity || (x.read.entity == mark.entity && !(x.read.lanes & ~who.own)) || (!x.read.more && before(me, self, x.read, who, true))) {
        x.read = mark;
      } else {
        mark.more = 0;
        add_reader(all, word, mark, std::max(me.reads, me.order.seen.at(self)));
      }
      continue;
    }
    if (const Mark* m = unordered_reader(all, word, mark, me, self, who, 0)) hazard(c, cta, offset, bytes, "writes", *m, "reads");
    if (same(w)) mark.join(w);
    x.write = mark;
    if (mask == 15) forget_readers(all, word);
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

namespace {
bool like(const Mark& a, const Mark& b) { return a.entity == b.entity && a.clock == b.clock && a.mixed == b.mixed && !(a.lanes & ~b.lanes); }
}  // namespace

Watch::Access::Access(Watch& watch, Ctx& c, const JobEntity& job, bool write, bool async_proxy, uint32_t lanes)
    : watch_(watch), c_(c), self_(watch.entity_of(*c.warp)), me_(watch.threads_[self_]), copy_(watch.is_copy(job)), write_(write), who_{lanes, lanes} {
  mark_.statement = c.statement->id;
  mark_.clock = job.clock;
  mark_.lanes = copy_ ? lanes : kAll;
  mark_.entity = static_cast<uint16_t>(job.entity + 1);
  mark_.bytes = 15;
  mark_.async = async_proxy;
}

void Watch::Access::check_write(Cta& cta, uint32_t offset, uint64_t bytes, const Mark& m) {
  if (!ordered(m, false)) watch_.hazard(c_, cta, offset, bytes, write_ ? "an asynchronous operation writes" : "an asynchronous operation reads", m, "writes");
  if (!write_ && mark_.async && !m.async && m.entity <= watch_.threads_.size() && !watch_.proxy_knows(me_, m)) {
    const Raw& raw = *watch_.statement(c_, m);
    fail("hazard in shared memory: an asynchronous operation reads %llu bytes at offset 0x%x of CTA %u's shared memory, which %s writes at PTX line %u (%s: '%s'), with no fence.proxy.async between",
         (unsigned long long)bytes, offset, cta.rank, watch_.name(m.entity - 1u).c_str(), raw.line, source_of(c_.machine->module, raw).c_str(), show(raw).c_str());
  }
}

void Watch::Access::forget_ordered(Cells& all, uint32_t word) {  // further reads that lie before
  int32_t* at = &all.more(word);
  while (*at >= 0) {
    Reader& r = watch_.readers_[static_cast<size_t>(*at)];
    if (!ordered(r.mark, true)) {
      at = &r.next;
      continue;
    }
    const int32_t free = *at;
    *at = r.next;
    r.next = watch_.spare_reader_;
    watch_.spare_reader_ = free;
  }
  all.at(word).read.more = all.more(word) >= 0;
}

void Watch::Access::touch(Cta& cta, uint32_t offset, uint64_t bytes) {
  if (&cta != c_.cta) watch_.reach(c_, cta, mark_.entity - 1u, mark_.clock, kAll, "an asynchronous access of");
  const uint32_t end = static_cast<uint32_t>((offset + bytes + 3) / 4);
  Cells& all = watch_.cells(cta, end);
  for (uint32_t word = offset / 4; word < end; ++word) {
    Cell& x = all.at(word);
    if (x.write.entity && !like(x.write, good_)) {
      check_write(cta, offset, bytes, x.write);
      good_ = x.write;
      const uint32_t e = good_.entity - 1u;
      if (me_.order.seen.at(e) >= good_.clock && (write_ || me_.order.proxy.at(e) >= good_.clock)) good_.lanes = kAll;
    }
    if (write_) {
      if (x.read.entity && (x.read.more || !like(x.read, good_read_))) {
        const Mark* m = watch_.unordered_reader(all, word, mark_, me_, self_, who_, copy_ ? 0 : mark_.entity);
        if (m) watch_.hazard(c_, cta, offset, bytes, "an asynchronous operation writes", *m, "reads");
        good_read_ = x.read;
      }
      x.write = mark_;
      watch_.forget_readers(all, word);
    } else if (!like(x.read, mark_)) {
      if (x.read.more) forget_ordered(all, word);
      if (x.read.entity && !like(x.read, good_read_) && !ordered(x.read, true)) {
        watch_.add_reader(all, word, mark_, UINT32_MAX);
        continue;
      }
      good_read_ = x.read;
      const uint8_t more = x.read.more;
      x.read = mark_;
      x.read.more = more;
    }
  }
}

void Watch::job_touch(Ctx& c, const JobEntity& job, Cta& cta, uint32_t offset, uint64_t bytes, bool write, bool async_proxy, uint32_t lanes) {
  Access(*this, c, job, write, async_proxy, lanes).touch(cta, offset, bytes);
}

}  // namespace dsv4::sim
