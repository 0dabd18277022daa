// Groups of asynchronous copies: what cp.async.commit_group, cp.async.bulk.commit_group and their waits count, per lane.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {

void add_to_group(Ctx& c, const std::shared_ptr<JobState>& job, uint32_t lanes, bool bulk) {
  for (int l = 0; l < 32; ++l) if (lanes >> l & 1) (bulk ? c.warp->bulk : c.warp->copies)[l].open.push_back(job);
}

void commit_group(Ctx& c, bool bulk) {
  if (Watch* watch = watch_of(*c.cta); watch && !bulk) watch->close_copies(*c.warp);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    Groups& g = (bulk ? c.warp->bulk : c.warp->copies)[l];
    g.committed.push_back(std::move(g.open));
    g.open.clear();
    // Empty groups in front matter to nobody.
    while (g.committed.size() > 64 && g.committed.front().empty()) g.committed.pop_front();
  }
}

Step wait_groups(Ctx& c, uint32_t but, bool bulk) {
  uint32_t open = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    Groups& g = (bulk ? c.warp->bulk : c.warp->copies)[l];
    for (size_t i = 0; i + but < g.committed.size(); ++i) {
      for (const auto& job : g.committed[i]) if (!job->done) open |= 1u << l;
    }
  }
  Watch* watch = watch_of(*c.cta);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1) || open >> l & 1) continue;
    Groups& g = (bulk ? c.warp->bulk : c.warp->copies)[l];
    JobEntity last;  // of cp.async: later groups stand for earlier ones
    while (g.committed.size() > but) {
      for (const auto& job : g.committed.front()) {
        if (!watch) break;
        if (bulk) watch->acquire(*c.warp, 1u << l, job->entity);
        else if (job->entity.clock > last.clock) last = job->entity;
      }
      g.committed.pop_front();
    }
    if (last.clock) watch->acquire(*c.warp, 1u << l, last);
  }
  if (!open) return Step::next;
  c.blocked = open;
  c.why = "its groups of asynchronous copies";
  return Step::block;
}

}  // namespace dsv4::sim
