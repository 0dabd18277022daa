// The happens-before check, synchronisation: what warps and lanes learn from barriers, fences and waits. See hazards.h.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {

void Clock::raise(uint32_t e, uint32_t c, uint32_t lanes) {
  if (lanes == kAll) return raise(e, c);
  if (at(e) >= c) return;
  for (Part& p : parts_) {
    if (p.entity != e) continue;
    if (p.clock <= c) p.lanes &= ~lanes;
    else lanes &= ~p.lanes;
  }
  bool added = !lanes;
  uint32_t all = 0, least = c;
  for (Part& p : parts_) {
    if (p.entity != e) continue;
    if (!added && p.clock == c) {
      p.lanes |= lanes;
      added = true;
    }
    if (!p.lanes) continue;
    all |= p.lanes;
    least = std::min(least, p.clock);
  }
  if (!added) {
    parts_.push_back({e, c, lanes});
    all |= lanes;
  }
  if (all == kAll) raise(e, least);
  const uint32_t known = at(e);
  parts_.erase(std::remove_if(parts_.begin(), parts_.end(), [&](const Part& p) { return !p.lanes || (p.entity == e && p.clock <= known); }), parts_.end());
}

void Clock::copy(uint32_t e, const Clock& o) {
  raise(e, 0);
  v_[e] = o.at(e);
  parts_.erase(std::remove_if(parts_.begin(), parts_.end(), [&](const Part& p) { return p.entity == e; }), parts_.end());
  for (const Part& p : o.parts_) if (p.entity == e) parts_.push_back(p);
}

bool Watch::initialised(Warp& w, uint32_t entity, uint32_t clock) const {
  const Thread& me = threads_[entity_of(w)];
  if (entity == entity_of(w) || me.order.inits.at(entity) >= clock) return true;
  for (const Partial& p : me.partial) if (p.order.inits.at(entity) >= clock) return true;
  return false;
}

void Watch::acquire(Warp& w, uint32_t lanes, const JobEntity& job) {
  Thread& me = threads_[entity_of(w)];
  if (is_copy(job)) return me.waits[__builtin_ctz(lanes)].add(job.clock, now(me));
  if ((lanes | ~w.live) == kAll) return release_job(me.order, job);
  Order done;
  release_job(done, job);
  acquire(w, lanes, done);
}

void Watch::tell(const Warp& w, uint32_t lanes, Order& into) const {
  const Thread& me = threads_[entity_of(w)];
  into.join(me.order);
  for (const Partial& p : me.partial) if (p.lanes & together(lanes)) into.join(p.order);
}

void Watch::view(const Warp& w, uint32_t lanes, Order& into) const {
  const uint32_t self = entity_of(w);
  const Thread& me = threads_[self];
  tell(w, lanes, into);
  into.seen.raise(self, me.clock, together(lanes | ~w.live));
  into.reads.raise(self, me.reads);
}

void Watch::release_observed(const Warp& w, uint32_t lanes, Order& into) const {
  Order known;
  tell(w, lanes, known);
  known.seen.copy(entity_of(w), known.proxy);  // its own accesses up to the last fence.proxy.async
  into.join(known);
}
void Watch::fence_job(Warp& w, uint32_t lanes, const JobEntity& job) {
  Thread& me = threads_[entity_of(w)];
  uint32_t clock = me.order.seen.at(job.entity);
  for (const Partial& p : me.partial) if (p.lanes & together(lanes)) clock = std::max(clock, p.order.seen.at(job.entity));
  if (job.clock && clock) me.fenced.seen.raise(job.entity, clock);
}
void Watch::remote_arrival(Ctx& c, Cta& cta, Order& into) {
  const JobEntity arrival = begin(c);
  reach(c, cta, arrival.entity, arrival.clock, kAll, "an arrival in");
  threads_[entity_of(*c.warp)].order.seen.raise(arrival.entity, arrival.clock);
  into.seen.raise(arrival.entity, arrival.clock);
  finish(arrival);
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
  me.released = true;
}
void Watch::release(Warp& w, uint32_t lanes, Order& into) {
  Thread& me = threads_[entity_of(w)];
  view(w, lanes, into);
  into.inits.raise(entity_of(w), me.clock);
  me.released = true;
}
void Watch::acquire(Warp& w, uint32_t lanes, const Order& from) {
  Thread& me = threads_[entity_of(w)];
  if (together(lanes | ~w.live) == kAll) return me.order.join(from);
  for (Partial& p : me.partial) if (p.lanes == lanes) return p.order.join(from);
  if (me.partial.size() == 16) {  // a warp that never meets: its lanes are no longer told apart
    for (const Partial& p : me.partial) me.order.join(p.order);
    me.partial.clear();
  }
  me.partial.push_back({lanes, from});
}
void Watch::fence(Warp& w, uint32_t lanes) {
  Thread& me = threads_[entity_of(w)];
  acquire(w, lanes, me.pending);
  me.init_fence = me.clock;
  view(w, lanes, me.fenced);
  me.released = true;
}
void Watch::proxy_fence(Warp& w, uint32_t lanes) {
  Thread& me = threads_[entity_of(w)];
  const uint32_t self = entity_of(w);
  Clock& proxy = me.order.proxy;
  proxy.join(me.order.seen);
  for (const Partial& p : me.partial) if (p.lanes & lanes) proxy.join(p.order.seen);
  proxy.raise(self, me.clock, together(lanes | ~w.live));
  me.released = true;
}
void Watch::warp_sync(Warp& w, uint32_t lanes) {
  Thread& me = threads_[entity_of(w)];
  if ((lanes | ~w.live) == kAll) {
    for (const Partial& p : me.partial) me.order.join(p.order);
    me.partial.clear();
    me.order.seen.raise(entity_of(w), me.clock);
  } else {
    Order met;
    view(w, lanes, met);
    acquire(w, lanes, met);
  }
  me.released = true;
}
void Watch::gather_reads(Warp& w) {
  Thread& me = threads_[entity_of(w)];
  me.reads = me.clock;
  me.released = true;
}

void Watch::leave(Warp& w) {
  Order last;
  view(w, kAll, last);
  gone_[w.cta->rank].join(last.seen);
}

std::string Watch::left_behind(Cta& cta) {
  for (const auto& [entity, access] : remote_[cta.rank]) {
    if (!gone_[cta.rank].unknown(entity, access.clock, access.lanes)) continue;
    return text_of("hazard in shared memory: CTA (%u,%u,%u) ends while an access of its shared memory by ", cta.id[0], cta.id[1], cta.id[2]) + name(entity) +
           text_of(" (PTX line %u) is not ordered before its end (a barrier of the cluster is missing)", access.raw ? access.raw->line : 0);
  }
  return "";
}

}  // namespace dsv4::sim
