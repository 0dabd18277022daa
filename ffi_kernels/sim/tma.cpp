// cp.async.bulk.tensor in tile mode: loads with multicast, swizzles and fill out of bounds; stores and reductions.
// PTX ISA 5.5 (boxes, bounds, swizzles) and 9.7.9.27.
#include "tensor_map.h"

#include "atomic.h"

namespace dsv4::sim {
namespace {

struct Tensor {
  bool store = false, reduce = false, multicast = false, cluster_target = true;
  int rank = 1;
  AtomicOp op = AtomicOp::add;
  bool wide_map = true, wide_shared = false, wide_barrier = false;
  int64_t map = 0, shared = 0, barrier = 0;
};

TensorMap read_map(Ctx& c, uint64_t at, int rank, int lane) {
  if (at % 64) fail("the tensor map at 0x%llx is not aligned to 64 bytes", (unsigned long long)at);
  TensorMap m;
  std::memcpy(&m, resolve(c, Space::generic, at, 128, 64, Access::read, lane), sizeof m);
  if (m.magic != kTensorMapMagic) fail("there is no tensor map of this interpreter at 0x%llx (see sim_encode_tiled)", (unsigned long long)at);
  if (m.rank != rank) fail("a tensor map of rank %d is used in %d dimensions", m.rank, rank);
  return m;
}

uint64_t elements(const TensorMap& m) {
  uint64_t n = 1;
  for (int d = 0; d < m.rank; ++d) n *= (m.box[d] + m.element_strides[d] - 1u) / m.element_strides[d];
  return n;
}

uint32_t swizzled(uint32_t at, int swizzle) {  // of a shared address: bits 4.. are exclusive-ored with bits 7..
  if (!swizzle) return at;
  const uint32_t mask = (1u << (swizzle - 4)) - 1;
  return at ^ ((at >> 7 & mask) << 4);
}

// Calls f(global address or 0 out of bounds, offset in the box) for each run of elements along the first dimension that
// may move together: single elements where strides or swizzles break them up.
template <class F> void walk(const TensorMap& m, const int32_t* coordinates, F f) {
  uint32_t count[5] = {1, 1, 1, 1, 1}, i[5] = {};
  for (int d = 0; d < m.rank; ++d) count[d] = (m.box[d] + m.element_strides[d] - 1u) / m.element_strides[d];
  uint64_t offset = 0;
  for (i[4] = 0; i[4] < count[4]; ++i[4])
    for (i[3] = 0; i[3] < count[3]; ++i[3])
      for (i[2] = 0; i[2] < count[2]; ++i[2])
        for (i[1] = 0; i[1] < count[1]; ++i[1]) {
          bool inside = true;
          uint64_t at = m.address;
          for (int d = 1; d < m.rank; ++d) {
            const int64_t x = coordinates[d] + static_cast<int64_t>(i[d]) * m.element_strides[d];
            inside = inside && x >= 0 && x <= static_cast<int64_t>(m.dims[d]);
            at += static_cast<uint64_t>(x) * m.strides[d - 1];
          }
          for (i[0] = 0; i[0] < count[0]; ++i[0], offset += m.element) {
            const int64_t x = coordinates[0] + static_cast<int64_t>(i[0]) * m.element_strides[0];
            f(inside && x >= 0 && x <= static_cast<int64_t>(m.dims[0]) ? at + static_cast<uint64_t>(x) * m.element : 0, static_cast<uint32_t>(offset));
          }
        }
}

Type reduced_type(const TensorMap& m, AtomicOp op) {
  if (m.element < 4) return Type::none;
  if (!m.real) return op >= AtomicOp::bit_and ? (m.element == 8 ? Type::b64 : Type::b32) : m.element == 8 ? Type::u64 : Type::u32;
  return m.element == 4 ? Type::f32 : m.element == 8 ? Type::f64 : Type::none;
}

// Slots: map, coordinates, shared address, then barrier, cta mask.
Step copy(Ctx& c, const Instr& in) {
  const Tensor& k = *static_cast<const Tensor*>(in.extra);
  note(c, in);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const TensorMap m = read_map(c, where(c, in, 0, k.wide_map, k.map, l), k.rank, l);
    std::vector<int32_t> x(5, 0);
    for (int d = 0; d < k.rank; ++d) x[static_cast<size_t>(d)] = static_cast<int32_t>(src<uint32_t>(c, in, 1 + d)[l]);
    const uint32_t shared = shared_offset(where(c, in, 1 + k.rank, k.wide_shared, k.shared, l));
    const uint64_t bytes = elements(m) * m.element;
    Watch* watch = watch_of(*c.cta);
    auto job = std::make_shared<JobState>();
    if (watch) job->entity = watch->begin(c);
    const auto base = [&](uint32_t at, Access access) { return shared_at(c, at, bytes, 128, access, k.cluster_target ? Space::cluster : Space::shared); };
    // The swizzle permutes the 16-byte pieces of a row by bits of the address itself, so any multiple of 128 may start a box.
    const auto place = [m](uint32_t at, uint32_t offset) { return static_cast<int64_t>(swizzled((at & 0xFFFFFF) + offset, m.swizzle)) - static_cast<int64_t>(at & 0xFFFFFF); };
    if (k.store) {
      uint8_t* s = base(shared, Access::read);
      if (watch) watch->job_touch(c, job->entity, *c.cta, (shared & 0xFFFFFF) - kSharedBase, bytes, false, true, 1u << l);
      walk(m, x.data(), [&](uint64_t g, uint32_t) { if (g) global_at(*c.machine, g, m.element, m.element, k.reduce ? Access::both : Access::write); });
      const Type type = k.reduce ? reduced_type(m, k.op) : Type::none;
      if (k.reduce && type == Type::none) fail("a reduction of this tensor's type is not modelled");
      c.warp->bulk.open.push_back({job, job->entity, 1u << l});
      submit(c, job, [=, &k](Ctx&) {
        walk(m, x.data(), [&](uint64_t g, uint32_t offset) {
          if (!g) return;
          const uint8_t* from = s + place(shared, offset);
          auto* to = reinterpret_cast<uint8_t*>(g);
          if (!k.reduce) { std::memcpy(to, from, m.element); return; }
          uint64_t a = 0, b = 0;
          std::memcpy(&a, to, m.element);
          std::memcpy(&b, from, m.element);
          const uint64_t r = apply_atomic(k.op, type, a, b, 0, false);
          std::memcpy(to, &r, m.element);
        });
      });
      continue;
    }
    struct Target { uint8_t* to; uint32_t at; Mbarrier* signal; };
    std::vector<Target> targets;
    const Space target = k.cluster_target ? Space::cluster : Space::shared;
    const auto one = [&](uint32_t at, uint32_t signal) {
      Mbarrier& b = mbarrier_at(c, signal, target);
      uint8_t* p = base(at, Access::write);
      if (watch) {
        if (!b.fenced) fail("hazard in shared memory: a tensor copy signals the mbarrier at shared address 0x%x, whose mbarrier.init was not followed by fence.mbarrier_init or fence.proxy.async", signal);
        watch->job_touch(c, job->entity, cta_of(c, at), (at & 0xFFFFFF) - kSharedBase, bytes, true, true, 1u << l);
      }
      targets.push_back({p, at, &b});
    };
    const uint32_t signal = shared_offset(where(c, in, 2 + k.rank, k.wide_barrier, k.barrier, l));
    if (k.multicast) {
      const uint32_t mask = src<uint32_t>(c, in, 3 + k.rank)[l] & 0xFFFF;
      const auto ctas = static_cast<uint32_t>(c.cta->cluster->ctas.size());
      if (mask >> ctas) fail("the multicast mask 0x%x names CTAs outside the cluster of %u", mask, ctas);
      for (uint32_t r = 0; r < ctas; ++r) if (mask >> r & 1) one((shared & 0xFFFFFF) | r << 24, (signal & 0xFFFFFF) | r << 24);
    } else one(shared, signal);
    walk(m, x.data(), [&](uint64_t g, uint32_t) { if (g) global_at(*c.machine, g, m.element, m.element, Access::read); });
    submit(c, job, [=, entity = job->entity, watched = watch != nullptr](Ctx& later) {
      static const uint16_t nan16 = 0x7FFF;
      for (const Target& t : targets) {
        walk(m, x.data(), [&](uint64_t g, uint32_t offset) {
          uint8_t* to = t.to + place(t.at, offset);
          if (g) std::memcpy(to, reinterpret_cast<const uint8_t*>(g), m.element);
          else if (!m.fill_nan) std::memset(to, 0, m.element);
          else if (m.element == 2) std::memcpy(to, &nan16, 2);
          else { std::memset(to, 0xFF, m.element); to[m.element - 1] = 0x7F; }
        });
        if (watched) Watch::release_job(t.signal->next, entity);
        mbarrier_tx(*later.machine, *t.signal, -static_cast<int64_t>(bytes));
      }
    });
  }
  c.machine->progress = c.machine->instructions;
  return Step::next;
}
Step nothing(Ctx&, const Instr&) { return Step::next; }
}  // namespace

void tensor_copy(Decode& d, bool reduce, bool prefetch) {
  Tensor k;
  k.reduce = reduce;
  k.rank = 1 + d.must({"1d", "2d", "3d", "4d", "5d"});
  const auto operand = [&](size_t i) {  // [map, {coordinates}]
    const Arg& a = d.arg(i);
    if (a.kind != Arg::memory || a.parts.size() != 2 || a.parts[1].kind != Arg::vector || a.parts[1].parts.size() != static_cast<size_t>(k.rank)) {
      d.wrong("needs [map, {" + std::to_string(k.rank) + " coordinates}]");
    }
    k.wide_map = d.wide(a.parts[0]);
    k.map = a.offset;
    if (!k.wide_map) d.wrong("the address of a tensor map has 64 bits");
    for (const Arg& x : a.parts[1].parts) d.src(x, Type::b32);
  };
  for (const char* mode : {"im2col", "im2col::w", "im2col::w::128", "tile::gather4", "tile::scatter4", "im2col_no_offs"}) if (d.take(mode)) d.wrong("only tile mode is modelled");
  d.take("tile");
  const bool hint = d.take("L2::cache_hint");
  if (prefetch) {
    d.ignore({"L2", "global"});
    operand(0);
    if (hint) d.arg(1);
    d.in.run = nothing;
    return;
  }
  size_t global_at = 0, shared_at = 0;
  for (size_t i = 0; i < d.raw.mods.size(); ++i) {
    if (d.raw.mods[i] == "global") global_at = i;
    if (d.raw.mods[i] == "shared::cta" || d.raw.mods[i] == "shared::cluster") shared_at = i;
  }
  if (!global_at || !shared_at) d.wrong("copies between .global and .shared");
  d.take("global");
  k.cluster_target = d.must({"shared::cta", "shared::cluster"}) == 1;
  k.store = global_at < shared_at;
  if (reduce && !k.store) d.wrong("reduces into global memory");
  if (reduce) k.op = atomic_op(d);
  if (k.store) {
    d.must({"bulk_group"});
    k.cluster_target = false;
    operand(0);
    k.wide_shared = d.memory(1);
    k.shared = d.in.imm;
    if (hint) d.arg(2);
  } else {
    d.must({"mbarrier::complete_tx::bytes"});
    k.multicast = d.take("multicast::cluster");
    if (d.take("cta_group::2")) d.in.b = 1;
    d.take("cta_group::1");
    operand(1);
    k.wide_shared = d.memory(0);
    k.shared = d.in.imm;
    k.wide_barrier = d.memory(2);
    k.barrier = d.in.imm;
    size_t i = 3;
    if (k.multicast) d.src(i++, Type::b16);
    if (hint) d.arg(i);
  }
  *d.extra<Tensor>() = k;
  d.in.run = copy;
}

}  // namespace dsv4::sim
