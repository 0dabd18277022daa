// The happens-before check: see hazards.h.
#include "hazards.h"

#include <algorithm>

#include "machine.h"

namespace dsv4::sim {

Watch::Watch(uint32_t ctas, uint32_t warps_per_cta, uint32_t words, bool strict)
    : warps_(warps_per_cta), words_(words), strict_(strict), threads_(ctas * warps_per_cta), cells_(ctas), remote_(ctas), gone_(ctas) {
  for (uint32_t e = 0; e < threads_.size(); ++e) threads_[e].order.seen.raise(e, 2);
}

uint32_t Watch::entity_of(const Warp& w) const { return w.cta->rank * warps_ + w.id; }

std::string Watch::name(uint32_t e) const {
  if (e < threads_.size()) return text_of("warp %u of CTA %u of the cluster", e % warps_, e / warps_);
  return "an asynchronous operation (" + job_name_[e - threads_.size()] + ")";
}

Cell& Watch::cell(const Cta& cta, uint32_t word) {
  auto& cells = cells_[cta.rank];
  if (cells.empty()) cells.resize(words_);
  if (word >= cells.size()) cells.resize(words_ + 4 * 512);
  return cells[word];
}

void Watch::hazard(Ctx& c, const Cta& cta, uint32_t offset, uint32_t bytes, const char* what, const Mark& before, const char* did, const char* why) {
  const Module& module = c.machine->module;
  if (offset >= tensor_base()) {
    const uint32_t at = (offset - tensor_base()) / 4;
    fail("hazard in tensor memory: %s columns from %u, lanes %u to %u of CTA %u, which %s %s at PTX line %u (%s: '%s')%s", what, at % 512, at / 512 * 32, at / 512 * 32 + 31, cta.rank,
         name(before.entity - 1u).c_str(), did, before.raw ? before.raw->line : 0, before.raw ? source_of(module, *before.raw).c_str() : "?",
         before.raw ? show(*before.raw).c_str() : "?", why);
  }
  fail("hazard in shared memory: %s %u bytes at offset 0x%x of CTA %u's shared memory, which %s %s at PTX line %u (%s: '%s')%s", what, bytes, offset, cta.rank,
       name(before.entity - 1u).c_str(), did, before.raw ? before.raw->line : 0, before.raw ? source_of(module, *before.raw).c_str() : "?",
       before.raw ? show(*before.raw).c_str() : "?", why);
}

bool Watch::initialised(Warp& w, uint32_t entity, uint32_t clock) const {
  const uint32_t self = entity_of(w);
  return entity == self || threads_[self].order.inits.at(entity) >= clock;
}

void Watch::reach(Ctx& c, const Cta& cta, uint32_t entity, uint32_t clock, const char* what) {
  const Clock& inits = threads_[entity_of(*c.warp)].order.inits;
  bool started = false;
  for (uint32_t w = 0; w < warps_ && !started; ++w) started = inits.at(cta.rank * warps_ + w) > 0;
  if (!started) {
    fail("hazard in shared memory: %s CTA %u's shared memory that is not ordered after the start of that CTA (a barrier of the cluster is missing)", what, cta.rank);
  }
  remote_[cta.rank][entity] = {c.statement, clock};
}

void Watch::remote_arrival(Ctx& c, Cta& cta, Order& into) {
  const JobEntity arrival = begin(c);
  reach(c, cta, arrival.entity, arrival.clock, "an arrival in");
  threads_[entity_of(*c.warp)].order.seen.raise(arrival.entity, arrival.clock);
  into.seen.raise(arrival.entity, arrival.clock);
  finish(arrival);
}

void Watch::touch(Ctx& c, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, int lane) {
  const uint32_t self = entity_of(*c.warp);
  Thread& me = threads_[self];
  const Raw* raw = c.statement;
  const bool write = kind == Touch::write || kind == Touch::strong_write || kind == Touch::atomic;
  const bool strong = kind != Touch::read && kind != Touch::write;
  if (&cta != c.cta) reach(c, cta, self, me.clock, "an access of");
  const auto before = [&](const Mark& m) { return m.entity - 1u == self || me.order.seen.at(m.entity - 1u) >= m.clock; };
  for (uint32_t b = offset; b < offset + bytes;) {
    const uint32_t word = b / 4, end = std::min(offset + bytes, (word + 1) * 4);
    const auto mask = static_cast<uint8_t>(((1u << (end - b)) - 1) << (b % 4));
    Cell& x = cell(cta, word);
    const auto conflicts = [&](const Mark& m) {
      if (!m.entity || !(m.bytes & mask) || (strong && m.strong)) return false;
      if (!before(m)) return true;
      return strict_ && m.entity - 1u == self && m.lane != lane && m.sync == me.sync && m.raw != raw;
    };
    const auto why = [&](const Mark& m) {
      return m.entity - 1u == self ? ", another lane of the same warp, with no bar.warp.sync between" : m.entity > threads_.size() ? ", and whose end has not been waited for" : ", with no synchronisation between";
    };
    if (x.write.entity && conflicts(x.write) && !(write && x.write.entity - 1u == self)) hazard(c, cta, offset, bytes, write ? "writes" : "reads", x.write, "writes", why(x.write));
    if (write) {
      if (x.read.entity && conflicts(x.read)) hazard(c, cta, offset, bytes, "writes", x.read, "reads", why(x.read));
      if (x.more >= 0) {
        for (const Mark& m : readers_[static_cast<size_t>(x.more)]) if (conflicts(m)) hazard(c, cta, offset, bytes, "writes", m, "reads", why(m));
      }
    }
    Mark mark;
    mark.raw = raw;
    mark.clock = me.clock;
    mark.sync = me.sync;
    mark.entity = static_cast<uint16_t>(self + 1);
    mark.lane = static_cast<uint8_t>(lane);
    mark.bytes = mask & 15;
    mark.strong = strong;
    if (write) {
      if (x.write.entity == mark.entity && x.write.clock == mark.clock && x.write.sync == mark.sync && x.write.raw == raw && x.write.lane != mark.lane && x.write.bytes & mask) mark.lane = 32;
      x.write = mark;
      if (mask == 15) {
        x.read = Mark();
        if (x.more >= 0) { readers_[static_cast<size_t>(x.more)].clear(); spare_readers_.push_back(x.more); x.more = -1; }
      }
    } else if (!x.read.entity || x.read.entity == mark.entity || (before(x.read) && x.more < 0)) {
      if (x.read.entity == mark.entity && x.read.sync == mark.sync && x.read.clock == mark.clock) {
        if (x.read.lane != mark.lane) mark.lane = 32;
        mark.bytes = (mark.bytes | x.read.bytes) & 15;
      }
      x.read = mark;
    } else {
      if (x.more < 0) {
        if (spare_readers_.empty()) { spare_readers_.push_back(static_cast<int32_t>(readers_.size())); readers_.emplace_back(); }
        x.more = spare_readers_.back();
        spare_readers_.pop_back();
      }
      auto& list = readers_[static_cast<size_t>(x.more)];
      bool known = false;
      for (Mark& m : list) {
        if (m.entity != mark.entity) continue;
        if (m.sync == mark.sync && m.clock == mark.clock) { if (m.lane != mark.lane) mark.lane = 32; mark.bytes = (mark.bytes | m.bytes) & 15; }
        m = mark;
        known = true;
      }
      if (!known) list.push_back(mark);
    }
    b = end;
  }
  if (!strong) return;
  Order& place = locations_[uint64_t{cta.rank} << 32 | offset];
  if (kind != Touch::strong_write) me.pending.join(place);
  if (kind != Touch::strong_read) place.join(me.fenced);
}

JobEntity Watch::begin(Ctx& c) {
  if (free_.size() < 256) {
    free_.push_front(static_cast<uint32_t>(threads_.size() + job_clock_.size()));
    job_clock_.push_back(0);
    job_name_.emplace_back();
  }
  JobEntity job;
  job.entity = free_.front();
  free_.pop_front();
  if (job.entity > 65000) fail("more than 65000 asynchronous operations are in flight");
  job.clock = ++job_clock_[job.entity - threads_.size()];
  job_name_[job.entity - threads_.size()] = "issued by " + name(entity_of(*c.warp));
  return job;
}

JobEntity Watch::again(const JobEntity& job) { return {job.entity, ++job_clock_[job.entity - threads_.size()]}; }

void Watch::job_touch(Ctx& c, const JobEntity& job, Cta& cta, uint32_t offset, uint64_t bytes, bool write, bool async_proxy) {
  const uint32_t self = entity_of(*c.warp);
  Thread& me = threads_[self];
  if (&cta != c.cta) reach(c, cta, job.entity, job.clock, "an asynchronous access of");
  // One lane issues what other lanes of its warp have prepared; where all issue together, each may mean its own.
  const int lane = c.mask & (c.mask - 1) ? -1 : __builtin_ctz(c.mask);
  const auto of_another_lane = [&](const Mark& m) { return strict_ && lane >= 0 && m.entity - 1u == self && m.lane != lane && m.sync == me.sync; };
  for (uint32_t word = offset / 4; word < (offset + bytes + 3) / 4; ++word) {
    Cell& x = cell(cta, word);
    const auto before = [&](const Mark& m) {
      const uint32_t e = m.entity - 1u;
      return e == job.entity || e == self || me.order.seen.at(e) >= m.clock;
    };
    const auto at = static_cast<uint32_t>(bytes);
    if (x.write.entity && !before(x.write)) hazard(c, cta, offset, at, write ? "an asynchronous operation writes" : "an asynchronous operation reads", x.write, "writes", ", with no synchronisation between");
    if (x.write.entity && of_another_lane(x.write)) {
      hazard(c, cta, offset, at, write ? "an asynchronous operation writes" : "an asynchronous operation reads", x.write, "writes", ", another lane of the same warp, with no bar.warp.sync between");
    }
    if (!write && async_proxy && x.write.entity && !x.write.async && x.write.entity <= threads_.size()) {
      const uint32_t e = x.write.entity - 1u;
      if (me.order.proxy.at(e) < x.write.clock) {
        hazard(c, cta, offset, at, "an asynchronous operation reads", x.write, "writes", ", with no fence.proxy.async between");
      }
    }
    if (write) {
      if (x.read.entity && !before(x.read)) hazard(c, cta, offset, at, "an asynchronous operation writes", x.read, "reads", ", with no synchronisation between");
      if (x.more >= 0) for (const Mark& m : readers_[static_cast<size_t>(x.more)]) if (!before(m)) hazard(c, cta, offset, at, "an asynchronous operation writes", m, "reads", ", with no synchronisation between");
    }
    Mark mark;
    mark.raw = c.statement;
    mark.clock = job.clock;
    mark.entity = static_cast<uint16_t>(job.entity + 1);
    mark.lane = 33;
    mark.bytes = 15;
    mark.async = async_proxy;
    if (write) {
      x.write = mark;
      x.read = Mark();
      if (x.more >= 0) { readers_[static_cast<size_t>(x.more)].clear(); spare_readers_.push_back(x.more); x.more = -1; }
    } else if (!x.read.entity || (before(x.read) && x.more < 0)) x.read = mark;
    else {
      if (x.more < 0) {
        if (spare_readers_.empty()) { spare_readers_.push_back(static_cast<int32_t>(readers_.size())); readers_.emplace_back(); }
        x.more = spare_readers_.back();
        spare_readers_.pop_back();
      }
      auto& list = readers_[static_cast<size_t>(x.more)];
      list.erase(std::remove_if(list.begin(), list.end(), before), list.end());
      list.push_back(mark);
    }
  }
}

void Watch::acquire(Warp& w, const JobEntity& job) {
  Thread& me = threads_[entity_of(w)];
  me.order.seen.raise(job.entity, job.clock);
  me.order.proxy.raise(job.entity, job.clock);
}
void Watch::release_observed(Warp& w, Order& into) {
  const uint32_t self = entity_of(w);
  Order known = threads_[self].order;
  known.seen.set(self, known.proxy.at(self));  // its own accesses up to the last fence.proxy.async
  into.join(known);
}
void Watch::fence_job(Warp& w, const JobEntity& job) {
  Thread& me = threads_[entity_of(w)];
  if (const uint32_t clock = me.order.seen.at(job.entity); job.clock && clock) me.fenced.seen.raise(job.entity, clock);
}
void Watch::release_relaxed(Warp& w, Order& into) {
  Thread& me = threads_[entity_of(w)];
  into.join(me.fenced);
  into.inits.join(me.order.inits);
  into.inits.raise(entity_of(w), me.init_fence);
}
void Watch::init_fence(Warp& w) {
  Thread& me = threads_[entity_of(w)];
  me.init_fence = me.clock;
  me.order.seen.raise(entity_of(w), ++me.clock);
}
void Watch::release(Warp& w, Order& into) {
  Thread& me = threads_[entity_of(w)];
  me.order.inits.raise(entity_of(w), me.clock);
  into.join(me.order);
  me.order.seen.raise(entity_of(w), ++me.clock);
  ++me.sync;
}
void Watch::acquire(Warp& w, const Order& from) {
  Thread& me = threads_[entity_of(w)];
  me.order.join(from);
  ++me.sync;
}
void Watch::fence(Warp& w) {
  Thread& me = threads_[entity_of(w)];
  me.order.join(me.pending);
  me.order.inits.raise(entity_of(w), me.clock);
  me.fenced = me.order;
  me.order.seen.raise(entity_of(w), ++me.clock);
}
void Watch::proxy_fence(Warp& w) {
  Thread& me = threads_[entity_of(w)];
  me.order.proxy.join(me.order.seen);
  me.order.seen.raise(entity_of(w), ++me.clock);
}
void Watch::warp_sync(Warp& w) { ++threads_[entity_of(w)].sync; }

void Watch::leave(Warp& w) { gone_[w.cta->rank].join(threads_[entity_of(w)].order.seen); }

std::string Watch::left_behind(Cta& cta) {
  for (const auto& [entity, access] : remote_[cta.rank]) {
    if (gone_[cta.rank].at(entity) >= access.clock) continue;
    return text_of("hazard in shared memory: CTA (%u,%u,%u) ends while an access of its shared memory by ", cta.id[0], cta.id[1], cta.id[2]) + name(entity) +
           text_of(" (PTX line %u) is not ordered before its end (a barrier of the cluster is missing)", access.raw ? access.raw->line : 0);
  }
  return "";
}

}  // namespace dsv4::sim
