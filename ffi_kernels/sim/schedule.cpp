// Which warp runs next. Clusters of CTAs run one after another; when all resident warps are stuck or spin without progress
// another cluster joins them (up to 132 CTAs, as on the device), so that kernels which wait for other CTAs run too.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {
namespace {
constexpr uint32_t kSlice = 8192;
constexpr uint64_t kStall = 1 << 20, kLivelock = uint64_t{1} << 26;

std::unique_ptr<Cluster> make_cluster(Machine& m, uint64_t index) {
  auto cluster = std::make_unique<Cluster>();
  cluster->machine = &m;
  cluster->index = index;
  if (m.options.checks) {
    cluster->watch = std::make_unique<Watch>(m.cluster_dims[0] * m.cluster_dims[1] * m.cluster_dims[2], (m.launch.block[0] * m.launch.block[1] * m.launch.block[2] + 31) / 32,
                                             (m.shared_bytes + 3) / 4, m.options.strict);
  }
  cluster->id[0] = static_cast<uint32_t>(index % m.clusters[0]);
  cluster->id[1] = static_cast<uint32_t>(index / m.clusters[0] % m.clusters[1]);
  cluster->id[2] = static_cast<uint32_t>(index / m.clusters[0] / m.clusters[1]);
  const uint32_t* dims = m.cluster_dims;
  const uint32_t threads = m.launch.block[0] * m.launch.block[1] * m.launch.block[2];
  for (uint32_t rank = 0; rank < dims[0] * dims[1] * dims[2]; ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->cluster = cluster.get();
    cta->rank = rank;
    const uint32_t local[3] = {rank % dims[0], rank / dims[0] % dims[1], rank / dims[0] / dims[1]};
    for (int i = 0; i < 3; ++i) cta->id[i] = cluster->id[i] * dims[i] + local[i];
    cta->live_threads = threads;
    cta->shared_bytes = m.shared_bytes;
    cta->storage = Block(m.shared_bytes + 64);
    cta->shared = cta->storage.data();
    std::memset(cta->shared, kPoison, m.shared_bytes);
    for (uint32_t w = 0; w * 32 < threads; ++w) {
      auto warp = std::make_unique<Warp>();
      warp->cta = cta.get();
      warp->id = w;
      const uint32_t lanes = std::min(32u, threads - w * 32);
      start_warp(*warp, lanes == 32 ? kAll : (1u << lanes) - 1, m);
      cta->warps.push_back(std::move(warp));
    }
    cluster->live_threads += threads;
    cluster->ctas.push_back(std::move(cta));
  }
  return cluster;
}
}  // namespace

void Machine::rank() {
  std::map<const Warp*, uint64_t> before;
  for (const Turn& t : turns) before[t.warp] = t.priority;
  turns.clear();
  for (auto& cluster : resident) {
    for (auto& cta : cluster->ctas) for (auto& warp : cta->warps) {
      const auto known = before.find(warp.get());
      turns.push_back({warp.get(), known == before.end() ? random() : known->second, 0});
    }
  }
}

uint32_t Machine::random() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 16);
}

namespace {
void carry_out(Machine& m, const Job& job) {
  Ctx c{};
  c.machine = &m;
  c.warp = job.warp;
  c.cta = job.warp->cta;
  try {
    job.run(c);
  } catch (const Error& e) {
    fail("Kernel %s: %s. Asynchronously, from PTX line %u (%s): '%s' in CTA (%u,%u,%u) warp %u.", m.kernel.name.c_str(), e.text.c_str(), job.raw->line,
         source_of(m.module, *job.raw).c_str(), show(*job.raw).c_str(), c.cta->id[0], c.cta->id[1], c.cta->id[2], c.warp->id);
  }
  m.event();
}

bool run_job(Machine& m, Cluster& cluster, size_t first) {  // the first that is ready, from `first` on
  for (size_t k = 0; k < cluster.jobs.size(); ++k) {
    const size_t i = (first + k) % cluster.jobs.size();
    if (cluster.jobs[i].ready && !cluster.jobs[i].ready()) continue;
    const Job job = std::move(cluster.jobs[i]);
    cluster.jobs.erase(cluster.jobs.begin() + static_cast<long>(i));
    carry_out(m, job);
    return true;
  }
  return false;
}

// Every warp once, for long; asynchronous work is done already (eager), or waits until no warp can move (lazy).
bool sweep(Machine& m) {
  bool moved = false;
  const uint64_t before = m.progress;
  for (auto& cluster : m.resident) {
    for (auto& cta : cluster->ctas) {
      for (auto& warp : cta->warps) if (!warp->done()) moved |= run_warp(m, *warp, kSlice);
    }
  }
  if (moved && m.progress != before) return true;  // polling alone is no movement
  for (auto& cluster : m.resident) if (!cluster->jobs.empty() && run_job(m, *cluster, 0)) return true;
  return moved;
}

// One step of a random schedule: the warp of highest priority that can move, for a few instructions, or an
// asynchronous operation. Priorities change now and then, so that some warps stay far behind for long.
bool step(Machine& m) {
  size_t jobs = 0;
  for (auto& cluster : m.resident) jobs += cluster->jobs.size();
  const uint32_t patience = 1u << (m.options.seed % 7);
  if (jobs && m.random() % patience == 0) {
    Cluster& cluster = *m.resident[m.random() % m.resident.size()];
    if (!cluster.jobs.empty() && run_job(m, cluster, m.random() % cluster.jobs.size())) return true;
  }
  const auto less = [&](uint32_t a, uint32_t b) { return m.turns[a].priority < m.turns[b].priority; };
  std::vector<uint32_t>& queue = m.queue;
  queue.clear();
  for (uint32_t i = 0; i < m.turns.size(); ++i) if (m.turns[i].idle != m.epoch) queue.push_back(i);
  std::make_heap(queue.begin(), queue.end(), less);
  while (!queue.empty()) {
    Machine::Turn& first = m.turns[queue.front()];
    std::pop_heap(queue.begin(), queue.end(), less);
    queue.pop_back();
    const uint64_t epoch = m.epoch;
    if (m.random() % 8 == 0) first.priority = m.random();
    if (!first.warp->done() && run_warp(m, *first.warp, 1 + m.random() % (2u << (m.random() % 10)))) return true;
    first.idle = epoch;
  }
  for (auto& cluster : m.resident) if (!cluster->jobs.empty() && run_job(m, *cluster, m.random() % cluster->jobs.size())) return true;
  return false;
}
}  // namespace

void submit(Ctx& c, std::shared_ptr<JobState> state, std::function<void(Ctx&)> run, std::function<bool()> ready) {
  Watch* watch = watch_of(*c.cta);
  auto whole = [state, run = std::move(run), watch](Ctx& later) {
    run(later);
    state->done = true;
    if (watch && state->entity.clock) watch->finish(state->entity);
  };
  if (c.machine->options.schedule == Options::eager && (!ready || ready())) return whole(c);
  c.cta->cluster->jobs.push_back({std::move(whole), std::move(ready), c.warp, c.statement});
}

void Machine::run() {
  const uint64_t most = std::max<uint64_t>(1, 132 / (uint64_t{cluster_dims[0]} * cluster_dims[1] * cluster_dims[2]));
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 0x853C49E6748FEA9Bull;
  if (options.checks && total_clusters > 1) {
    global_watch = std::make_unique<GlobalWatch>();
    for (const Region& r : regions) if (r.writable) global_watch->add(r.low, r.high);
  }
  uint64_t expired_events = 0, expiries = 0, stall_mark = 0;
  while (true) {
    if (resident.empty()) {
      if (next_cluster == total_clusters) {
        if (!launch.follows || waited) return;
        fail("Kernel %s never executes griddepcontrol.wait: the launch after it could start before the one that came before it has ended.", kernel.name.c_str());
      }
      resident.push_back(make_cluster(*this, next_cluster++));
      const uint64_t more = options.schedule == Options::random ? random() % 3 : 0;  // a few clusters side by side
      for (uint64_t i = 0; i < more && next_cluster < total_clusters && resident.size() < most; ++i) resident.push_back(make_cluster(*this, next_cluster++));
      rank();
      event();
    }
    const bool moved = options.schedule == Options::random ? step(*this) : sweep(*this);
    expire = false;
    if (instructions > options.limit) {
      fail("Kernel %s: more than %llu warp instructions (limit=N in DSV4_SIM raises the limit).", kernel.name.c_str(), (unsigned long long)options.limit);
    }
    const size_t before = resident.size();
    resident.erase(std::remove_if(resident.begin(), resident.end(), [](const auto& c) { return c->live_threads == 0 && c->jobs.empty(); }), resident.end());
    if (resident.size() != before) {
      rank();
      event();
      continue;
    }
    const bool stalled = moved && instructions - std::max(progress, stall_mark) > kStall;
    if (moved && !stalled) continue;
    if (next_cluster < total_clusters && resident.size() < most) {
      resident.push_back(make_cluster(*this, next_cluster++));
      rank();
      stall_mark = instructions;
      ++epoch;
      continue;
    }
    if (!moved) {  // waits with a time limit give up; if nothing comes of that, this is a deadlock
      if (expired_events != events) { expired_events = events; expiries = 0; }
      if (++expiries > 16) fail("Kernel %s: deadlock, no warp can go on:%s", kernel.name.c_str(), dump(*this).c_str());
      expire = true;
      ++epoch;
      continue;
    }
    if (instructions - progress > kLivelock) {
      fail("Kernel %s: no store, arrival or exit in %llu warp instructions, it spins for ever:%s", kernel.name.c_str(), (unsigned long long)kLivelock, dump(*this).c_str());
    }
  }
}

}  // namespace dsv4::sim
