// Descriptors of shared memory, and tcgen05.cp from shared to tensor memory. PTX ISA 9.7.16.3, .4, .9.
#include "layout.h"
#include "tcgen05.h"

namespace dsv4::sim {

MatrixLayout tensor_layout_of(uint64_t d, bool k_major) {
  static const int widths[] = {0, -1, 128, -1, 64, -1, 32, -1};
  if ((d >> 46 & 7) != 1) fail("a shared memory descriptor whose bits 46-48 are not 0b001");
  if (d >> 49 & 7) fail("a shared memory descriptor with a base offset, which is not modelled");
  if (d >> 52 & 0x1FF) fail("a shared memory descriptor with bits 52-60 set");
  if (widths[d >> 61] < 0) fail("a shared memory descriptor with swizzle mode %u, which is not modelled", static_cast<unsigned>(d >> 61));
  return {descriptor_field(d, 0), descriptor_field(d, 16), descriptor_field(d, 32), static_cast<uint32_t>(widths[d >> 61]), k_major};
}

namespace {
struct Copy { int rows, bytes, group, replicas; };
Step copy(Ctx& c, const Instr& in) {  // slots: tensor address, descriptor
  const Copy k = *static_cast<const Copy*>(in.extra);
  note(c, in);
  same_group(c, k.group);
  for (int l = 0; l < 32; ++l) {
    if (!(c.mask >> l & 1)) continue;
    const uint32_t to = src<uint32_t>(c, in, 0)[l] + static_cast<uint32_t>(in.imm);
    const MatrixLayout m = tensor_layout_of(src<uint64_t>(c, in, 1)[l], true);
    if (to >> 16) fail("tcgen05.cp to lane %u of tensor memory; it must be 0", to >> 16);
    const auto columns = static_cast<uint32_t>(k.bytes / 4);
    const JobEntity job = next_tensor_entity(c);
    Cta* other = k.group == 2 ? &peer_of(c) : nullptr;
    for (Cta* cta : {c.cta, other}) {
      if (!cta) continue;
      check_columns(*cta, to, columns, "a copy");
      for (int r = 0; r < k.rows; ++r) for (int b = 0; b < k.bytes; b += 16) {
        const uint32_t at = cta->rank << 24 | m.at(static_cast<uint32_t>(r), static_cast<uint32_t>(b));
        shared_at(c, at, 16, 16, Access::read, Space::cluster);
        if (Watch* watch = watch_of(*c.cta)) watch->job_touch(c, job, *cta, (at & 0xFFFFFF) - kSharedBase, 16, false, true);
      }
      touch_tensor(c, *cta, 0, 128, to, columns, true, &job);
    }
    issue_tensor_op(c, [=](Ctx& later) {
      for (Cta* cta : {later.cta, other}) {
        if (!cta) continue;
        TensorMemory& t = tensor_of(*cta);
        for (int r = 0; r < k.rows; ++r) for (int b = 0; b < k.bytes; b += 16) {
          uint32_t words[4];
          std::memcpy(words, shared_at(later, cta->rank << 24 | m.at(static_cast<uint32_t>(r), static_cast<uint32_t>(b)), 16, 16, Access::read, Space::cluster), 16);
          for (int q = 0; q < k.replicas; ++q) for (uint32_t w = 0; w < 4; ++w) t.at(static_cast<uint32_t>(r + q * k.rows), to + static_cast<uint32_t>(b / 4) + w) = words[w];
        }
      }
    });
  }
  return Step::next;
}
}  // namespace

void decode_tensor_copy(Decode& d) {
  Copy k{};
  k.group = decode_cta_group(d);
  switch (d.must({"128x256b", "128x128b", "32x128b"})) {
    case 0: k = {128, 32, k.group, 1}; break;
    case 1: k = {128, 16, k.group, 1}; break;
    default: k = {32, 16, k.group, 4}; if (!d.take("warpx4")) d.wrong("needs .warpx4");
  }
  if (d.memory(0)) d.wrong("an address in tensor memory has 32 bits");
  d.src(1, Type::b64);
  *d.extra<Copy>() = k;
  d.in.run = copy;
}

}  // namespace dsv4::sim
