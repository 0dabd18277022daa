// Clusters: their barrier, mapa, getctarank, st.async and red.async to other CTAs' shared memory, clusterlaunchcontrol.
// PTX ISA 9.7.13.3, 9.7.13.17, 9.7.13.18, 9.7.9.12 ff.
#include "atomic.h"

namespace dsv4::sim {
namespace {

Step arrive(Ctx& c, const Instr& in) {
  if (in.a && c.mask != c.warp->live) {
    c.blocked = c.mask;
    c.why = "the other lanes of the warp at an aligned cluster barrier";
    return Step::block;
  }
  Cluster& cluster = *c.cta->cluster;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    if (c.warp->cluster_token[l]) fail("lane %d arrives at the cluster barrier twice without waiting", l);
    c.warp->cluster_token[l] = cluster.generation + 1;
    ++cluster.arrived;
  }
  c.machine->progress = c.machine->instructions;
  if (cluster.watch) in.b && c.machine->options.strict ? cluster.watch->release_relaxed(*c.warp, cluster.next) : cluster.watch->release(*c.warp, cluster.next);
  if (cluster.arrived == cluster.live_threads) {
    cluster.done = cluster.next;
    cluster.next.clear();
    cluster.arrived = 0;
    ++cluster.generation;
    c.machine->event();
  }
  return Step::next;
}
Step wait(Ctx& c, const Instr& in) {
  if (in.a && c.mask != c.warp->live) {
    c.blocked = c.mask;
    c.why = "the other lanes of the warp at an aligned cluster barrier";
    return Step::block;
  }
  uint32_t open = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    if (!c.warp->cluster_token[l]) fail("lane %d waits at the cluster barrier without having arrived", l);
    if (c.warp->cluster_token[l] == c.cta->cluster->generation + 1) open |= 1u << l;
  }
  if (open) {
    c.blocked = c.mask;
    c.why = "the barrier of the cluster";
    return Step::block;
  }
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1) c.warp->cluster_token[l] = 0;
  if (Watch* watch = watch_of(*c.cta)) watch->acquire(*c.warp, c.cta->cluster->done);
  return Step::next;
}

// mapa: in.a: 1 for addresses of the shared window (else generic); in.b: 64 bits
Step mapa(Ctx& c, const Instr& in) {
  const uint32_t* rank = src<uint32_t>(c, in, 2);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint64_t a = in.b ? src<uint64_t>(c, in, 1)[l] : src<uint32_t>(c, in, 1)[l];
    if (rank[l] >= c.cta->cluster->ctas.size()) fail("mapa to CTA %u of a cluster of %zu", rank[l], c.cta->cluster->ctas.size());
    const uint64_t r = (shared_offset(a) & 0xFFFFFF) | rank[l] << 24 | (in.a ? 0 : kSharedWindow);
    if (in.b) out<uint64_t>(c, in, 0)[l] = r;
    else out<uint32_t>(c, in, 0)[l] = static_cast<uint32_t>(r);
  }
  return Step::next;
}
Step rank_of(Ctx& c, const Instr& in) {
  for (int l = 0; l < 32; ++l) {
    if (c.mask >> l & 1) out<uint32_t>(c, in, 0)[l] = shared_offset(in.b ? src<uint64_t>(c, in, 1)[l] : src<uint32_t>(c, in, 1)[l]) >> 24;
  }
  return Step::next;
}

struct Remote {
  Type type;
  bool reduce = false, wide_to = false, wide_barrier = false;
  AtomicOp op = AtomicOp::add;
  int64_t to = 0, barrier = 0;
};
// Slots: values, address, barrier. in.a: elements
Step remote(Ctx& c, const Instr& in) {
  const Remote& k = *static_cast<const Remote*>(in.extra);
  const auto size = static_cast<uint64_t>(bits_of(k.type)) / 8;
  const int n = in.a;
  note(c, in);
  struct One { uint8_t* to; Mbarrier* signal; uint64_t value[4]; };
  std::vector<One> stores;
  auto job = std::make_shared<JobState>();
  Watch* watch = watch_of(*c.cta);
  if (watch) job->entity = watch->begin(c);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint32_t to = shared_offset(address(c, in, n, k.wide_to, l) + static_cast<uint64_t>(k.to));
    const uint32_t signal = shared_offset(address(c, in, n + 1, k.wide_barrier, l) + static_cast<uint64_t>(k.barrier));
    if (to >> 24 != signal >> 24) fail("a store to CTA %u signals an mbarrier of CTA %u", to >> 24, signal >> 24);
    const uint64_t bytes = size * static_cast<uint64_t>(n);
    One one{shared_at(c, to, bytes, bytes, k.reduce ? Access::both : Access::write, Space::cluster), &mbarrier_at(c, signal, Space::cluster), {}};
    if (watch) {
      // The order of reductions does not matter: only the first of them must come after what stood there before.
      if (!k.reduce) watch->job_touch(c, job->entity, cta_of(c, to), (to & 0xFFFFFF) - kSharedBase, bytes, true, true);
    }
    for (int v = 0; v < n; ++v) one.value[v] = size == 8 ? src<uint64_t>(c, in, v)[l] : src<uint32_t>(c, in, v)[l];
    stores.push_back(one);
  }
  submit(c, job, [stores = std::move(stores), &k, size, n, entity = job->entity, watched = watch != nullptr](Ctx& later) {
    for (const One& s : stores) {
      for (int v = 0; v < n; ++v) {
        uint64_t x = s.value[v];
        uint8_t* p = s.to + size * static_cast<uint64_t>(v);
        if (k.reduce) {
          uint64_t old = 0;
          std::memcpy(&old, p, size);
          x = apply_atomic(k.op, k.type, old, x, 0, false);
        }
        std::memcpy(p, &x, size);
      }
      if (watched) Watch::release_job(s.signal->next, entity);
      mbarrier_tx(*later.machine, *s.signal, -static_cast<int64_t>(size) * n);
    }
  });
  return Step::next;
}

void decode_remote(Decode& d, bool reduce) {
  Remote k;
  k.reduce = reduce;
  d.ignore({"weak", "relaxed", "cluster"});
  if (d.choose({"shared::cluster"}) < 0) d.wrong("needs .shared::cluster");
  d.must({"mbarrier::complete_tx::bytes"});
  if (reduce) k.op = atomic_op(d);
  const int vec = d.choose({"v2", "v4"});
  const int n = vec < 0 ? 1 : 2 << vec;
  k.type = d.type();
  if (bits_of(k.type) != 32 && bits_of(k.type) != 64) d.wrong("moves 32- or 64-bit elements");
  const Type held = bits_of(k.type) == 64 ? Type::b64 : Type::b32;
  const Arg& value = d.arg(1);
  if (vec >= 0 && (value.kind != Arg::vector || value.parts.size() != static_cast<size_t>(n))) d.wrong("needs a vector");
  for (int i = 0; i < n; ++i) {
    const Arg& a = vec < 0 ? value : value.parts[static_cast<size_t>(i)];
    a.kind == Arg::real ? d.src(a, k.type) : d.src(a, held);
  }
  k.wide_to = d.memory(0);
  k.to = d.in.imm;
  k.wide_barrier = d.memory(2);
  k.barrier = d.in.imm;
  d.in.a = static_cast<uint16_t>(n);
  *d.extra<Remote>() = k;
  d.in.run = remote;
}

// What a request to cancel the launch of a cluster is answered with; opaque to programs, which ask query_cancel.
struct Answer { uint32_t canceled, first[3]; };
struct Cancel { bool multicast, wide_to, wide_barrier; int64_t to, barrier; };
Step try_cancel(Ctx& c, const Instr& in) {  // slots: address, barrier
  const Cancel& k = *static_cast<const Cancel*>(in.extra);
  note(c, in);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    if (c.cta->launches_over) fail("asks to cancel another cluster after it was told that none is left");
    const uint32_t to = shared_offset(where(c, in, 0, k.wide_to, k.to, l)), signal = shared_offset(where(c, in, 1, k.wide_barrier, k.barrier, l));
    auto job = std::make_shared<JobState>();
    Watch* watch = watch_of(*c.cta);
    if (watch) job->entity = watch->begin(c);
    struct Target { uint8_t* to; Mbarrier* signal; };
    std::vector<Target> targets;
    for (uint32_t r = 0; r < c.cta->cluster->ctas.size(); ++r) {
      if (!k.multicast && r != c.cta->rank) continue;
      if (!c.cta->cluster->ctas[r]->live_threads) fail("CTA %u of the cluster has ended; the answer is sent to all of them", r);
      const uint32_t at = (to & 0xFFFFFF) | r << 24;
      targets.push_back({shared_at(c, at, 16, 16, Access::write, Space::cluster), &mbarrier_at(c, (signal & 0xFFFFFF) | r << 24, Space::cluster)});
      if (watch) watch->job_touch(c, job->entity, cta_of(c, at), (at & 0xFFFFFF) - kSharedBase, 16, true, true);
    }
    submit(c, job, [targets = std::move(targets), entity = job->entity, watched = watch != nullptr](Ctx& later) {
      Machine& m = *later.machine;
      Answer answer{m.next_cluster < m.total_clusters, {}};
      if (answer.canceled) {
        const uint64_t index = m.next_cluster++;
        const uint64_t id[] = {index % m.clusters[0], index / m.clusters[0] % m.clusters[1], index / m.clusters[0] / m.clusters[1]};
        for (int i = 0; i < 3; ++i) answer.first[i] = static_cast<uint32_t>(id[i]) * m.cluster_dims[i];
      }
      for (const Target& t : targets) {
        std::memcpy(t.to, &answer, sizeof answer);
        if (watched) Watch::release_job(t.signal->next, entity);
        mbarrier_tx(m, *t.signal, -16);
      }
    });
  }
  return Step::next;
}
// Slots: predicate or coordinates, answer. in.a: first coordinate; in.b: how many, 0: is_canceled
Step query_cancel(Ctx& c, const Instr& in) {
  const bool asks = in.b == 0;
  uint32_t canceled = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    Answer answer;
    std::memcpy(&answer, src<uint8_t>(c, in, asks ? 1 : in.b) + 16 * l, sizeof answer);
    if (answer.canceled > 1) fail("asks what became of a request to cancel a cluster, but 0x%x... is no answer to one", answer.canceled);
    if (asks && !answer.canceled) c.cta->launches_over = true;
    canceled |= answer.canceled << l;
    if (!asks && !answer.canceled) fail("asks for the CTA of a cluster that was not canceled");
    for (int i = 0; i < in.b; ++i) out<uint32_t>(c, in, i)[l] = answer.first[(in.a + i) % 3];
  }
  if (asks) put_pred(c, in, 0, canceled);
  return Step::next;
}
void decode_launch_control(Decode& d) {
  if (d.must({"try_cancel", "query_cancel"}) == 0) {
    Cancel k{};
    d.must({"async"});
    d.take("shared::cta");
    d.must({"mbarrier::complete_tx::bytes"});
    k.multicast = d.take("multicast::cluster::all");
    d.must({"b128"});
    k.wide_to = d.memory(0);
    k.to = d.in.imm;
    k.wide_barrier = d.memory(1);
    k.barrier = d.in.imm;
    *d.extra<Cancel>() = k;
    d.in.run = try_cancel;
    return;
  }
  const int what = d.must({"is_canceled", "get_first_ctaid", "get_first_ctaid::x", "get_first_ctaid::y", "get_first_ctaid::z"});
  if (what == 0) {
    d.must({"pred"});
    d.dst(0, Type::pred);
  } else if (what == 1) {
    d.must({"v4"});
    d.must({"b32"});
    const Arg& v = d.arg(0);
    if (v.kind != Arg::vector || v.parts.size() != 4) d.wrong("needs a vector of 4 registers");
    for (const Arg& a : v.parts) d.dst(a, Type::b32);
    d.in.b = 4;
  } else {
    d.must({"b32"});
    d.dst(0, Type::b32);
    d.in.a = static_cast<uint16_t>(what - 2);
    d.in.b = 1;
  }
  d.must({"b128"});
  d.src(1, Type::b128);
  d.in.run = query_cancel;
}
}  // namespace

void store_async(Decode& d) { decode_remote(d, false); }
void reduce_async(Decode& d) { decode_remote(d, true); }

void cluster_barrier(Decode& d) {
  const int action = d.must({"arrive", "wait"});
  d.in.b = d.take("relaxed");
  d.ignore({"release", "acquire"});
  d.in.a = d.take("aligned");
  d.in.run = action == 0 ? arrive : wait;
}

void add_cluster(Decoders& t) {
  t["mapa"] = [](Decode& d) {
    d.in.a = d.take("shared::cluster");
    const Type x = d.type();
    d.in.b = wide_type(x);
    if (!d.in.a && !d.in.b) d.wrong("a generic address has 64 bits");
    d.dst(0, x); d.src(1, x); d.src(2, Type::b32);
    d.in.run = mapa;
  };
  t["clusterlaunchcontrol"] = decode_launch_control;
  t["getctarank"] = [](Decode& d) {
    d.take("shared::cluster");
    const Type x = d.type();
    d.in.b = wide_type(x);
    d.dst(0, Type::b32); d.src(1, x);
    d.in.run = rank_of;
  };
}

}  // namespace dsv4::sim
