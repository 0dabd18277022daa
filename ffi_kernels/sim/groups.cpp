// Groups of asynchronous operations: what commit_group and wait_group of cp.async, cp.async.bulk and wgmma count, per lane.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {
namespace {

// Lanes whose groups are the same wait together: all of them, mostly; else one by one.
bool alike(const Groups& g, uint32_t lanes) {
  for (const Groups::Group& group : g.committed) if (group.lanes & lanes && lanes & ~group.lanes) return false;
  return true;
}

// True if all but the last groups of these lanes are done; the lanes then have them behind themselves.
bool settle(Ctx& c, Groups& g, uint32_t lanes, uint32_t but) {
  size_t count = 0;
  for (const Groups::Group& group : g.committed) count += (group.lanes & lanes) != 0;
  if (count <= but) return true;
  count -= but;
  size_t left = count;
  for (const Groups::Group& group : g.committed) {
    if (!left) break;
    if (!(group.lanes & lanes)) continue;
    --left;
    for (const Groups::Member& m : group.members) if (m.lanes & lanes && m.job && !m.job->done) return false;
  }
  Watch* watch = watch_of(*c.cta);
  JobEntity copies[32];  // the latest cp.async of each lane: it stands for the earlier ones
  for (Groups::Group& group : g.committed) {
    if (!count) break;
    if (!(group.lanes & lanes)) continue;
    --count;
    group.lanes &= ~lanes;
    for (const Groups::Member& m : group.members) {
      if (!watch || !(m.lanes & lanes)) continue;
      if (!watch->is_copy(m.entity)) {
        watch->acquire(*c.warp, m.lanes & lanes, m.entity);
        continue;
      }
      for (uint32_t rest = m.lanes & lanes; rest; rest &= rest - 1) {
        JobEntity& last = copies[__builtin_ctz(rest)];
        if (m.entity.clock > last.clock) last = m.entity;
      }
    }
  }
  for (int l = 0; l < 32; ++l) if (copies[l].clock) watch->acquire(*c.warp, 1u << l, copies[l]);
  return true;
}

}  // namespace

void commit_group(Ctx& c, Groups& g) {
  Groups::Group group{{}, c.mask};
  for (Groups::Member& m : g.open) {
    if (!(m.lanes & c.mask)) continue;
    if (!(m.lanes & ~c.mask)) {
      group.members.push_back(std::move(m));
      m.lanes = 0;
      continue;
    }
    group.members.push_back({m.job, m.entity, m.lanes & c.mask});
    m.lanes &= ~c.mask;
  }
  g.open.erase(std::remove_if(g.open.begin(), g.open.end(), [](const Groups::Member& m) { return !m.lanes; }), g.open.end());
  g.committed.push_back(std::move(group));
  // Empty groups in front matter to nobody.
  while (g.committed.size() > 64 && g.committed.front().members.empty()) g.committed.erase(g.committed.begin());
}

Step wait_groups(Ctx& c, Groups& g, uint32_t but, const char* why) {
  uint32_t open = 0;
  if (alike(g, c.mask)) open = settle(c, g, c.mask, but) ? 0 : c.mask;
  else for (int l = 0; l < 32; ++l) if (c.mask >> l & 1 && !settle(c, g, 1u << l, but)) open |= 1u << l;
  g.committed.erase(std::remove_if(g.committed.begin(), g.committed.end(), [](const Groups::Group& group) { return !group.lanes; }), g.committed.end());
  if (!open) return Step::next;
  c.blocked = open;
  c.why = why;
  return Step::block;
}

}  // namespace dsv4::sim
