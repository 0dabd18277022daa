// tcgen05: tensor memory, its allocation, loads and stores, waits, commits, fences. PTX ISA 9.7.16.1, .7, .8, .11, .12.
// Fragments of .32x32b and .16x256b are modelled, the others stand in figures only.
#include "tcgen05.h"

namespace dsv4::sim {

TensorMemory& tensor_of(Cta& cta) {
  if (!cta.tensor) cta.tensor = std::make_shared<TensorMemory>();
  return *std::static_pointer_cast<TensorMemory>(cta.tensor);
}

Cta& peer_of(Ctx& c) {
  const uint32_t peer = c.cta->rank ^ 1;
  if (peer >= c.cta->cluster->ctas.size()) fail("a .cta_group::2 operation needs a cluster with pairs of CTAs; this one has %zu", c.cta->cluster->ctas.size());
  return *c.cta->cluster->ctas[peer];
}

void check_columns(Cta& cta, uint32_t first, uint32_t count, const char* what) {
  TensorMemory& t = tensor_of(cta);
  auto it = t.allocated.upper_bound(first);
  if (it != t.allocated.begin() && (--it)->first + it->second >= first + count && it->first <= first) return;
  fail("%s covers columns %u to %u of tensor memory, which are not allocated together in CTA (%u,%u,%u)", what, first, first + count - 1, cta.id[0], cta.id[1], cta.id[2]);
}

void check_tensor_freed(Cta& cta) {
  if (!cta.tensor) return;
  for (const auto& [column, count] : tensor_of(cta).allocated) fail("CTA (%u,%u,%u) ends without freeing %u columns of tensor memory at %u", cta.id[0], cta.id[1], cta.id[2], count, column);
}

int decode_cta_group(Decode& d) { return 1 + d.must({"cta_group::1", "cta_group::2"}); }

void same_group(Ctx& c, int group) {
  int& first = tensor_of(*c.cta).group;
  if (first && first != group) fail(".cta_group::%d after .cta_group::%d; all tcgen05 instructions of a kernel must name the same", group, first);
  first = group;
}

void touch_tensor(Ctx& c, Cta& cta, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, bool write, const JobEntity* job) {
  Watch* watch = watch_of(*c.cta);
  if (!watch) return;
  const uint32_t base = watch->tensor_base();
  for (uint32_t quarter = lane / 32; quarter <= (lane + lanes - 1) / 32; ++quarter) {
    const uint32_t at = base + (quarter * kTensorColumns + column) * 4;
    if (job) watch->job_touch(c, *job, cta, at, columns * 4, write, false);
    else watch->touch(c, cta, at, columns * 4, write ? Touch::write : Touch::read, 32);
  }
}

JobEntity next_tensor_entity(Ctx& c) {
  TensorMemory& t = tensor_of(*c.cta);
  Watch* watch = watch_of(*c.cta);
  if (!watch) return {};
  t.pipe = t.pipe.clock ? watch->again(t.pipe) : watch->begin(c);
  return t.pipe;
}

void issue_tensor_op(Ctx& c, std::function<void(Ctx&)> run) {
  TensorMemory& t = tensor_of(*c.cta);
  auto job = std::make_shared<JobState>();
  const auto before = t.last;
  t.last = job;
  submit(c, job, std::move(run), [before] { return !before || before->done; });
}

namespace {
template <class T> T uniform(Ctx& c, const Instr& in, int slot, const char* what) {
  const T* v = src<T>(c, in, slot);
  const int first = __builtin_ctz(c.mask);
  for (int l = 0; l < 32; ++l) if (c.mask >> l & 1 && v[l] != v[first]) fail("%s differs between lanes", what);
  return v[first];
}
bool whole(Ctx& c) { return c.mask == kAll || gathered(c, kAll); }

constexpr uint64_t kPairToken = 77;
// Both CTAs of a pair take part: true once the peer has come as far. The token keeps the arrival.
bool pair_arrived(Ctx& c) {
  TensorMemory& mine = tensor_of(*c.cta);
  TensorMemory& other = tensor_of(peer_of(c));
  Fragment& f = *c.fragment;
  if (f.token_what != kPairToken) {
    f.token_what = kPairToken;
    f.token = ++mine.collective;
    c.machine->event();
  }
  if (other.collective >= f.token) { f.token = f.token_what = 0; return true; }
  c.blocked = c.mask;
  c.why = "the peer CTA's warp at a collective tcgen05 operation";
  return false;
}

// Slots: address, columns. in.a: cta_group; in.c: wide address
Step alloc(Ctx& c, const Instr& in) {
  if (!whole(c)) return Step::block;
  same_group(c, in.a);
  const uint32_t n = uniform<uint32_t>(c, in, 1, "the number of columns");
  if (n < 32 || n > 512 || (n & (n - 1))) fail("allocates %u columns; it must be a power of two from 32 to 512", n);
  TensorMemory& t = tensor_of(*c.cta);
  t.wanted = n;
  if (in.a == 2 && !pair_arrived(c)) return Step::block;
  TensorMemory* other = in.a == 2 ? &tensor_of(peer_of(c)) : nullptr;
  if (!t.granted) {  // of a pair the first to go on allocates for both, at the same columns
    uint32_t first = 0;
    bool moved = true;
    while (moved) {
      moved = false;
      for (TensorMemory* m : {&t, other}) {
        if (!m) continue;
        if (m->relinquished) fail("tcgen05.alloc after tcgen05.relinquish_alloc_permit");
        if (m->wanted != n) fail("allocates %u columns, and its peer CTA %u", n, m->wanted);
        if (n > m->last_columns) fail("allocates %u columns after %u; allocations must not grow", n, m->last_columns);
        for (const auto& [column, count] : m->allocated) {
          if (first < column + count && column < first + n) { first = column + count; moved = true; }
        }
      }
    }
    if (first + n > kTensorColumns) {  // another warp may free some
      if (other) { c.fragment->token_what = kPairToken; c.fragment->token = t.collective; }  // it has arrived already
      c.blocked = c.mask;
      c.why = "free columns of tensor memory";
      return Step::block;
    }
    for (TensorMemory* m : {&t, other}) {
      if (!m) continue;
      m->last_columns = n;
      m->allocated[first] = n;
      m->granted = true;
      m->granted_at = first;
    }
  }
  t.granted = false;
  const uint32_t first = t.granted_at;
  const uint64_t at = address(c, in, 0, in.c, 0) + static_cast<uint64_t>(in.imm);
  const uint32_t shared = shared_offset(in.c ? at : static_cast<uint32_t>(at));
  std::memcpy(shared_at(c, shared, 4, 4, Access::write, Space::shared), &first, 4);
  if (Watch* watch = watch_of(*c.cta)) {
    touch_memory(c, in, Space::shared, shared, 4, Touch::write, 32);
    watch->warp_sync(*c.warp);  // all lanes allocate, so that each sees the address
  }
  c.machine->event();
  return Step::next;
}
Step dealloc(Ctx& c, const Instr& in) {
  if (!whole(c)) return Step::block;
  same_group(c, in.a);
  const uint32_t first = uniform<uint32_t>(c, in, 0, "the address"), n = uniform<uint32_t>(c, in, 1, "the number of columns");
  if (in.a == 2 && !pair_arrived(c)) return Step::block;
  TensorMemory& t = tensor_of(*c.cta);
  const auto it = t.allocated.find(first);
  if (it == t.allocated.end() || it->second != n) fail("frees %u columns of tensor memory at 0x%x, which were not allocated so", n, first);
  note(c, in);
  touch_tensor(c, *c.cta, 0, 128, first, n, true, nullptr);
  t.allocated.erase(it);
  c.machine->event();
  return Step::next;
}
Step relinquish(Ctx& c, const Instr& in) {
  if (!whole(c)) return Step::block;
  same_group(c, in.a);
  tensor_of(*c.cta).relinquished = true;
  return Step::next;
}

// Slots: registers, address. in.a: registers; in.b: 0 32x32b, 1 16x256b
template <bool Store> Step move(Ctx& c, const Instr& in) {
  if (!whole(c)) return Step::block;
  const int n = in.a;
  const uint32_t at = uniform<uint32_t>(c, in, n, "the address in tensor memory") + static_cast<uint32_t>(in.imm);
  const uint32_t column = at & 0xFFFF, columns = static_cast<uint32_t>(in.b ? n * 2 : n);
  const uint32_t quarter = c.warp->id % 4 * 32;
  const uint32_t lane0 = c.machine->options.strict ? at >> 16 : quarter + (at >> 16) % 32;  // devices ignore the bits of the quarter
  if (lane0 != quarter && !(in.b && lane0 == quarter + 16)) {
    fail("warp %u reaches lanes %u to %u of tensor memory, not lane %u", c.warp->id, quarter, quarter + 31, lane0);
  }
  check_columns(*c.cta, column, columns, Store ? "a store" : "a load");
  note(c, in);
  TensorMemory& t = tensor_of(*c.cta);
  JobEntity& job = t.moves[Store][c.warp->id];
  if (Watch* watch = watch_of(*c.cta)) job = job.clock ? watch->again(job) : watch->begin(c);
  touch_tensor(c, *c.cta, lane0, in.b ? 16 : 32, column, columns, Store, &job);
  if (Watch* watch = watch_of(*c.cta); watch && !Store && !c.machine->options.strict) watch->acquire(*c.warp, job);  // devices wait for registers that are used
  for (int r = 0; r < n; ++r) {
    for (uint32_t l = 0; l < 32; ++l) {
      uint32_t& word = in.b ? t.at(lane0 + l / 4 + 8 * (r / 2 & 1), column + static_cast<uint32_t>(r / 4) * 8 + l % 4 * 2 + (r & 1)) : t.at(lane0 + l, column + static_cast<uint32_t>(r));
      if (Store) word = src<uint32_t>(c, in, r)[l];
      else out<uint32_t>(c, in, r)[l] = word;
    }
  }
  return Step::next;
}
// Loads and stores are done when issued, but in order before others only from here on. in.a: stores
Step wait(Ctx& c, const Instr& in) {
  if (!whole(c)) return Step::block;
  const JobEntity job = tensor_of(*c.cta).moves[in.a][c.warp->id];
  if (Watch* watch = watch_of(*c.cta); watch && job.clock) watch->acquire(*c.warp, job);
  return Step::next;
}
// in.a: before_thread_sync, which a relaxed arrival needs. The other fence is not checked: CUTLASS does without.
Step fence(Ctx& c, const Instr& in) {
  Watch* watch = watch_of(*c.cta);
  if (!watch || !in.a) return Step::next;
  TensorMemory& t = tensor_of(*c.cta);
  for (auto& moves : t.moves) watch->fence_job(*c.warp, moves[c.warp->id]);
  for (auto& cta : c.cta->cluster->ctas) watch->fence_job(*c.warp, tensor_of(*cta).pipe);
  return Step::next;
}

// Slots: barrier, [cta mask]. in.a: multicast; in.b: cta_group
Step commit(Ctx& c, const Instr& in) {
  note(c, in);
  same_group(c, in.b);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    uint64_t at = address(c, in, 0, in.c, l) + static_cast<uint64_t>(in.imm);
    if (!(in.c & 1)) at = static_cast<uint32_t>(at);
    const uint32_t signal = shared_offset(at);
    std::vector<Mbarrier*> barriers;
    if (in.a) {
      const uint32_t mask = src<uint32_t>(c, in, 1)[l] & 0xFFFF;
      const auto ctas = static_cast<uint32_t>(c.cta->cluster->ctas.size());
      if (mask >> ctas) fail("the multicast mask 0x%x names CTAs outside the cluster of %u", mask, ctas);
      for (uint32_t r = 0; r < ctas; ++r) if (mask >> r & 1) barriers.push_back(&mbarrier_at(c, (signal & 0xFFFFFF) | r << 24, Space::cluster));
    } else barriers.push_back(&mbarrier_at(c, signal, Space::cluster));
    const JobEntity pipe = tensor_of(*c.cta).pipe;
    Order observed;  // what the operations read was complete before them
    if (Watch* watch = watch_of(*c.cta)) c.machine->options.strict ? watch->release_observed(*c.warp, observed) : watch->release(*c.warp, observed);
    issue_tensor_op(c, [barriers, pipe, observed](Ctx& later) {
      for (Mbarrier* b : barriers) {
        b->next.join(observed);
        if (pipe.clock) Watch::release_job(b->next, pipe);
        mbarrier_arrive(*later.machine, *b, 1);
      }
    });
  }
  return Step::next;
}

void decode_move(Decode& d, bool store) {
  if (d.take("red")) d.wrong(".red is not modelled");
  if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned");
  d.in.b = static_cast<uint16_t>(d.must({"32x32b", "16x256b"}));
  const int repeat = 1 << d.must({"x1", "x2", "x4", "x8", "x16", "x32", "x64", "x128"});
  const int n = d.in.b ? 4 * repeat : repeat;
  if (n > 128) d.wrong("moves at most 128 registers");
  if (!d.take("b32")) d.wrong("moves .b32");
  const Arg& v = d.arg(store ? 1 : 0);
  if (v.kind == Arg::vector ? v.parts.size() != static_cast<size_t>(n) : n != 1) d.wrong("needs " + std::to_string(n) + " registers");
  for (int r = 0; r < n; ++r) {
    const Arg& a = v.kind == Arg::vector ? v.parts[static_cast<size_t>(r)] : v;
    store ? d.src(a, Type::b32) : d.dst(a, Type::b32);
  }
  if (d.memory(store ? 0 : 1)) d.wrong("an address in tensor memory has 32 bits");
  d.in.a = static_cast<uint16_t>(n);
  d.in.run = store ? &move<true> : &move<false>;
}
}  // namespace

void add_tcgen05(Decoders& t) {
  t["tcgen05"] = [](Decode& d) {
    const auto collective = [&](Handler run, bool columns, bool memory) {
      d.in.a = static_cast<uint16_t>(decode_cta_group(d));
      if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned");
      d.ignore({"shared::cta", "b32"});
      if (memory) d.in.c = d.memory(0);
      else if (columns) d.src(0, Type::b32);
      if (columns) d.src(1, Type::b32);
      d.in.run = run;
    };
    const int what = d.must({"alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st", "commit", "fence::before_thread_sync", "fence::after_thread_sync", "mma", "cp"});
    switch (what) {
      case 0: return collective(alloc, true, true);
      case 1: return collective(dealloc, true, false);
      case 2: return collective(relinquish, false, false);
      case 3: return decode_move(d, false);
      case 4: return decode_move(d, true);
      case 5: case 6:
        if (!d.take("sync") || !d.take("aligned")) d.wrong("needs .sync.aligned");
        d.in.a = what == 6;
        d.in.run = wait;
        return;
      case 7: {
        d.in.b = static_cast<uint16_t>(decode_cta_group(d));
        if (!d.take("mbarrier::arrive::one")) d.wrong("needs .mbarrier::arrive::one");
        d.ignore({"shared::cluster", "b64"});
        d.in.a = d.take("multicast::cluster");
        d.in.c = d.memory(0);
        if (d.in.a) d.src(1, Type::b16);
        d.in.run = commit;
        return;
      }
      case 8: case 9: d.in.a = what == 8; d.in.run = fence; return;
      case 10: return decode_tensor_mma(d);
      default: return decode_tensor_copy(d);
    }
  };
}

}  // namespace dsv4::sim
