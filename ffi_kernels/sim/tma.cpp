// cp.async.bulk.tensor in tile mode and of four rows: loads with multicast, swizzles and fill out of bounds; stores and
// reductions.
// PTX ISA 5.5 (boxes, bounds, swizzles) and 9.7.9.27.
#include "tensor_map.h"

#include "atomic.h"

namespace dsv4::sim {
namespace {

struct Tensor {
  bool store = false, reduce = false, multicast = false, pairs = false, cluster_target = true;
  bool rows = false;  // four rows of a matrix (gather4, scatter4)
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

uint32_t swizzled(uint32_t at, const TensorMap& m) {  // of a shared address: the bits from the atom's are exclusive-ored with bits 7..
  if (!m.swizzle) return at;
  const uint32_t mask = (1u << (m.swizzle - m.atom)) - 1;
  return at ^ ((at >> 7 & mask) << m.atom);
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
          for (i[0] = 0; i[0] < count[0]; ++i[0], offset += m.held) {
            const int64_t x = coordinates[0] + static_cast<int64_t>(i[0]) * m.element_strides[0];
            f(inside && x >= 0 && x <= static_cast<int64_t>(m.dims[0]) ? at + static_cast<uint64_t>(x) * m.element : 0, static_cast<uint32_t>(offset));
          }
        }
}

// The type in which a reduction combines elements, by the map's type; none where the device has no such reduction.
Type reduced_type(const TensorMap& m, AtomicOp op) {
  static const Type types[] = {Type::none, Type::none, Type::u32, Type::s32, Type::u64, Type::s64, Type::f16, Type::f32, Type::none, Type::bf16};
  const Type t = m.type < 10 ? types[m.type] : Type::none;
  switch (op) {
    case AtomicOp::add: return t == Type::s64 ? Type::none : t;
    case AtomicOp::min: case AtomicOp::max: return t == Type::f32 ? Type::none : t;
    case AtomicOp::inc: case AtomicOp::dec: return t == Type::u32 ? t : Type::none;
    default: return is_integer(t) && t != Type::s64 ? t : Type::none;
  }
}

// What a device answers with an illegal instruction, in sentences.
void check_place(const TensorMap& m, const std::vector<int32_t>& x, int given, bool store) {
  const int64_t bytes = static_cast<int64_t>(x[0]) * m.element;
  if (bytes % 16) fail("the box starts at element %d of the first dimension, %lld bytes from the tensor's edge, which is not a multiple of 16", x[0], static_cast<long long>(bytes));
  for (int d = 0; store && d < given; ++d) {
    if (x[static_cast<size_t>(d)] < 0) fail("a store starts at %d in dimension %d; only loads may start below 0", x[static_cast<size_t>(d)], std::min(d, m.rank - 1));
  }
}

// Slots: map, coordinates, shared address, then barrier, cta mask.
Step copy(Ctx& c, const Instr& in) {
  const Tensor& k = *static_cast<const Tensor*>(in.extra);
  note(c, in);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const TensorMap m = read_map(c, where(c, in, 0, k.wide_map, k.map, l), k.rank, l);
    const int given = k.rows ? 5 : k.rank, times = k.rows ? 4 : 1;
    std::vector<int32_t> x(5, 0);
    for (int d = 0; d < given; ++d) x[static_cast<size_t>(d)] = static_cast<int32_t>(src<uint32_t>(c, in, 1 + d)[l]);
    const uint32_t shared = shared_offset(where(c, in, 1 + given, k.wide_shared, k.shared, l));
    if (k.rows && m.box[1] != 1) fail("copies four rows with a box of %u rows; it must be 1", m.box[1]);
    const uint64_t moved = times * elements(m) * m.element, bytes = times * elements(m) * m.held;  // in global and in shared memory
    if (m.pack > 1) {
      const int step = m.held != m.element ? 128 : m.pack;
      if (x[0] % step) fail("the first coordinate is %d; in a tensor of packed elements it must be a multiple of %d", x[0], step);
      if (k.reduce || (k.store && m.held != m.element)) fail("a store from padded elements, or a reduction of packed ones");
      x[0] /= m.pack;
    }
    check_place(m, x, given, k.store);
    Watch* watch = watch_of(*c.cta);
    auto job = std::make_shared<JobState>();
    if (watch) job->entity = watch->begin(c);
    const auto each = [m, x, rows = k.rows](auto f) {
      if (!rows) return walk(m, x.data(), f);
      for (uint32_t r = 0; r < 4; ++r) {
        const int32_t row[] = {x[0], x[1 + r]};
        walk(m, row, [&](uint64_t g, uint32_t offset) { f(g, offset + r * m.box[0] * m.held); });
      }
    };
    const auto base = [&](uint32_t at, Access access) { return shared_at(c, at, bytes, 128, access, k.cluster_target ? Space::cluster : Space::shared); };
    // The swizzle permutes the 16-byte pieces of a row by bits of the address itself, so any multiple of 128 may start a box.
    const auto place = [m](uint32_t at, uint32_t offset) { return static_cast<int64_t>(swizzled((at & 0xFFFFFF) + offset, m)) - static_cast<int64_t>(at & 0xFFFFFF); };
    if (k.store) {
      uint8_t* s = base(shared, Access::read);
      if (watch) watch->job_touch(c, job->entity, *c.cta, (shared & 0xFFFFFF) - kSharedBase, bytes, false, true, 1u << l);
      each([&](uint64_t g, uint32_t) { if (g) global_at(*c.machine, g, m.element, m.element & -m.element, k.reduce ? Access::both : Access::write, starts_early(c, l)); });
      const Type type = k.reduce ? reduced_type(m, k.op) : Type::none;
      if (k.reduce && type == Type::none) fail("a device has no such reduction of elements of this tensor's type (number %d of cuTensorMapEncodeTiled)", m.type);
      c.warp->bulk.open.push_back({job, job->entity, 1u << l});
      submit(c, job, [=, &k](Ctx&) {
        each([&](uint64_t g, uint32_t offset) {
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
      if (const uint32_t to = at >> 24, of = signal >> 24; to != of && (!k.pairs || to != (of ^ 1))) {
        fail("a tensor copy to CTA %u signals an mbarrier of CTA %u; %s", to, of, k.pairs ? "with .cta_group::2 it may be one of the pair's other CTA" : "it must be of the same CTA, or with .cta_group::2 of its pair");
      }
      Mbarrier& b = mbarrier_at(c, signal, k.pairs ? Space::cluster : target);
      uint8_t* p = base(at, Access::write);
      if (watch) {
        if (!b.fenced) fail("hazard in shared memory: a tensor copy signals the mbarrier at shared address 0x%x, whose mbarrier.init was not followed by fence.mbarrier_init or fence.proxy.async", signal);
        watch->job_touch(c, job->entity, cta_of(c, at), (at & 0xFFFFFF) - kSharedBase, bytes, true, true, 1u << l);
      }
      targets.push_back({p, at, &b});
    };
    const uint32_t signal = shared_offset(where(c, in, 2 + given, k.wide_barrier, k.barrier, l));
    if (k.multicast) {
      const uint32_t mask = src<uint32_t>(c, in, 3 + given)[l] & 0xFFFF;
      const auto ctas = static_cast<uint32_t>(c.cta->cluster->ctas.size());
      if (mask >> ctas) fail("the multicast mask 0x%x names CTAs outside the cluster of %u", mask, ctas);
      // Of a pair the signal goes to the CTA with the parity of the mbarrier that is named.
      const auto signaled = [&](uint32_t r) { return k.pairs ? (r & ~1u) | (signal >> 24 & 1) : r; };
      for (uint32_t r = 0; r < ctas; ++r) if (mask >> r & 1) one((shared & 0xFFFFFF) | r << 24, (signal & 0xFFFFFF) | signaled(r) << 24);
    } else one(shared, signal);
    each([&](uint64_t g, uint32_t) { if (g) global_at(*c.machine, g, m.element, m.element & -m.element, Access::read, starts_early(c, l)); });
    submit(c, job, [=, entity = job->entity, watched = watch != nullptr](Ctx& later) {
      static const uint16_t nan16 = 0x7FFF;
      for (const Target& t : targets) {
        each([&](uint64_t g, uint32_t offset) {
          uint8_t* to = t.to + place(t.at, offset);
          if (m.held != m.element) std::memset(to + m.element, kPoison, m.held - m.element);
          if (g) std::memcpy(to, reinterpret_cast<const uint8_t*>(g), m.element);
          else if (!m.fill_nan) std::memset(to, 0, m.element);
          else if (m.element == 2) std::memcpy(to, &nan16, 2);
          else { std::memset(to, 0xFF, m.element); to[m.element - 1] = 0x7F; }
        });
        if (watched) Watch::release_job(t.signal->next, entity);
        mbarrier_tx(*later.machine, *t.signal, -static_cast<int64_t>(moved));  // padding does not count
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
  const bool gather = d.take("tile::gather4"), scatter = d.take("tile::scatter4");
  k.rows = gather || scatter;
  if (k.rows && k.rank != 2) d.wrong("rows are of a matrix: .2d");
  const size_t given = k.rows ? 5 : static_cast<size_t>(k.rank);
  const auto operand = [&](size_t i) {  // [map, {coordinates}]
    const Arg& a = d.arg(i);
    if (a.kind != Arg::memory || a.parts.size() != 2 || a.parts[1].kind != Arg::vector || a.parts[1].parts.size() != given) {
      d.wrong("needs [map, {" + std::to_string(given) + " coordinates}]");
    }
    k.wide_map = d.wide(a.parts[0]);
    k.map = a.offset;
    if (!k.wide_map) d.wrong("the address of a tensor map has 64 bits");
    for (const Arg& x : a.parts[1].parts) d.src(x, Type::b32);
  };
  for (const char* mode : {"im2col", "im2col::w", "im2col::w::128", "im2col_no_offs"}) if (d.take(mode)) d.wrong("only tile mode is modelled");
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
  if ((k.store && gather) || (!k.store && scatter)) d.wrong("loads gather, stores scatter");
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
    k.pairs = d.take("cta_group::2");
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
