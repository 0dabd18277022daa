// Addresses to host memory, with every check: bounds, writability, alignment, whose shared memory it is.
#include <algorithm>

#include "machine.h"

namespace dsv4::sim {
namespace {
const char* doing(Access access) { return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates"; }

uint8_t* kernel_param(const Machine& m, uint64_t address, uint64_t bytes, Access access) {
  if (access != Access::read) fail("writes a parameter of the kernel");
  if (address >= m.launch.params_bytes || bytes > m.launch.params_bytes - address) {
    fail("reads parameter bytes %lld to %lld; the kernel was given %zu", (long long)address, (long long)(address + bytes), m.launch.params_bytes);
  }
  return const_cast<uint8_t*>(m.launch.params) + address;
}
}  // namespace

bool starts_early(const Ctx& c, int lane) { return c.machine->launch.follows && !(c.warp->waited >> lane & 1); }

uint8_t* global_at(Machine& m, uint64_t address, uint64_t bytes, uint64_t align, Access access, bool early) {
  if (address & (align - 1)) {
    fail("%s %llu bytes of global memory at 0x%llx, which is not a multiple of %llu", doing(access), (unsigned long long)bytes,
         (unsigned long long)address, (unsigned long long)align);
  }
  const auto inside = [&](const Region& r) { return address >= r.low && address < r.high && bytes <= r.high - address; };
  const Region* r = nullptr;
  if (m.last_region < m.regions.size() && inside(m.regions[m.last_region])) r = &m.regions[m.last_region];
  else {
    auto it = std::upper_bound(m.regions.begin(), m.regions.end(), address, [](uint64_t a, const Region& x) { return a < x.low; });
    if (it != m.regions.begin() && inside(*(it - 1))) r = &*(it - 1);
    if (r) m.last_region = static_cast<size_t>(r - m.regions.data());
  }
  if (r && early && !(access == Access::read && r->settled)) {
    fail("%s %llu bytes at 0x%llx before griddepcontrol.wait: a launch before this one in its custom call may still run and %s them", doing(access),
         (unsigned long long)bytes, (unsigned long long)address, r->settled ? "read" : "write");
  }
  if (r && (access == Access::read || r->writable)) return reinterpret_cast<uint8_t*>(address);
  if (r) fail("%s %llu bytes at 0x%llx of an input, which may only be read", doing(access), (unsigned long long)bytes, (unsigned long long)address);
  for (const Variable& v : m.module.variables) {
    const uint64_t low = reinterpret_cast<uint64_t>(v.data);
    if (!v.data || address < low || address + bytes > low + v.size) continue;
    if (access == Access::read) return reinterpret_cast<uint8_t*>(address);
    fail("%s the module variable '%s'; variables of a module are constant here", doing(access), v.name.c_str());
  }
  // Name the buffer that it nearly hits.
  const Region* nearest = nullptr;
  uint64_t distance = UINT64_MAX;
  for (const Region& x : m.regions) {
    const uint64_t d = address < x.low ? x.low - address : address >= x.high ? address - x.high + 1 : 0;
    if (d < distance) { distance = d; nearest = &x; }
  }
  if (address < 4096) fail("%s %llu bytes at address 0x%llx: a null pointer", doing(access), (unsigned long long)bytes, (unsigned long long)address);
  if (!nearest) fail("%s %llu bytes of global memory at 0x%llx, but the launch lists no buffers", doing(access), (unsigned long long)bytes, (unsigned long long)address);
  for (size_t i = 0; i < m.launch.memory.size(); ++i) {
    if (reinterpret_cast<uint64_t>(m.launch.memory[i].data) != nearest->low) continue;
    fail("%s %llu bytes out of bounds at 0x%llx: offset %lld of buffer %zu, which has %llu bytes", doing(access), (unsigned long long)bytes,
         (unsigned long long)address, (long long)(address - nearest->low), i, (unsigned long long)(nearest->high - nearest->low));
  }
  fail("%s %llu bytes out of bounds at 0x%llx", doing(access), (unsigned long long)bytes, (unsigned long long)address);
}

Cta& cta_of(Ctx& c, uint64_t address) {
  const uint64_t rank = address >> 24;
  if (rank >= c.cta->cluster->ctas.size()) {
    fail("shared address 0x%llx belongs to no CTA of the cluster (%zu CTAs)", (unsigned long long)address, c.cta->cluster->ctas.size());
  }
  return *c.cta->cluster->ctas[rank];
}

uint8_t* shared_at(Ctx& c, uint64_t address, uint64_t bytes, uint64_t align, Access access, Space space) {
  if (address & (align - 1)) {
    fail("%s %llu bytes of shared memory at 0x%llx, which is not a multiple of %llu", doing(access), (unsigned long long)bytes,
         (unsigned long long)address, (unsigned long long)align);
  }
  Cta* cta = c.cta;
  if (address >> 24 != cta->rank) {
    if (space == Space::shared) {
      fail("%s shared::cta address 0x%llx, which lies in the memory of CTA %llu of the cluster, not of its own CTA %u", doing(access),
           (unsigned long long)address, (unsigned long long)(address >> 24), cta->rank);
    }
    cta = &cta_of(c, address);
    if (!cta->live_threads) fail("%s shared memory of CTA %u of the cluster, which has exited", doing(access), cta->rank);
  }
  const uint64_t at = address & 0xFFFFFF;
  if (at < kSharedBase || at - kSharedBase + bytes > cta->shared_bytes) {
    fail("%s %llu bytes out of bounds of shared memory: offset %lld, the CTA has %u bytes (%u of them dynamic)", doing(access), (unsigned long long)bytes,
         (long long)at - kSharedBase, cta->shared_bytes, c.machine->launch.shared_bytes);
  }
  return cta->shared + (at - kSharedBase);
}

uint8_t* local_at(Ctx& c, uint64_t address, uint64_t bytes, uint64_t align, int lane) {
  Warp& w = *c.warp;
  if (address & (align - 1)) fail("an access of local memory at 0x%llx is not a multiple of %llu", (unsigned long long)address, (unsigned long long)align);
  const uint64_t end = c.frame->local_base + c.frame->f->local_bytes;
  if (address < 16 || address >= end || bytes > end - address) {
    fail("an access of %llu bytes out of bounds of local memory: offset %lld, the frame ends at %llu", (unsigned long long)bytes, (long long)address, (unsigned long long)end);
  }
  return w.local.data() + lane * w.local_stride + address;
}

uint8_t* resolve(Ctx& c, Space space, uint64_t address, uint64_t bytes, uint64_t align, Access access, int lane) {
  switch (space) {
    case Space::generic:
      switch (address & kWindowMask) {
        case kSharedWindow: return shared_at(c, address & ~kWindowMask, bytes, align, access, Space::cluster);
        case kLocalWindow: return local_at(c, address & ~kWindowMask, bytes, align, lane);
        case kParamWindow: return kernel_param(*c.machine, address & ~kWindowMask, bytes, access);
        default: return global_at(*c.machine, address, bytes, align, access, starts_early(c, lane));
      }
    case Space::global:
    case Space::constant:
      if ((address & kWindowMask) == kSharedWindow || (address & kWindowMask) == kLocalWindow) fail("a generic address of shared or local memory is used as a global address");
      return global_at(*c.machine, address, bytes, align, access, starts_early(c, lane));
    case Space::shared:
    case Space::cluster: return shared_at(c, address, bytes, align, access, space);
    case Space::local: return local_at(c, address, bytes, align, lane);
    case Space::param: {
      if (address & (align - 1)) fail("an access of a parameter at %llu is not a multiple of %llu", (unsigned long long)address, (unsigned long long)align);
      Frame* frame = c.frame;
      if (frame->f->entry && (address < c.machine->launch.params_bytes || address >= frame->f->param_bytes)) return kernel_param(*c.machine, address, bytes, access);
      if (address >= frame->f->param_bytes || bytes > frame->f->param_bytes - address) {
        fail("an access of parameter bytes %lld to %lld; the function has %llu", (long long)address, (long long)(address + bytes), (unsigned long long)frame->f->param_bytes);
      }
      return frame->param(lane) + address;
    }
  }
  fail("an address of no state space");
}

void touch_memory(Ctx& c, const Instr& in, Space space, uint64_t address, uint64_t bytes, Touch kind, Lanes who, const void* value) {
  if (space == Space::global || (space == Space::generic && !(address & kWindowMask))) {
    if (c.machine->global_watch) c.machine->global_watch->touch(c, in, address, static_cast<uint32_t>(bytes), kind, value);
    return;
  }
  if (space == Space::generic) {
    if ((address & kWindowMask) != kSharedWindow) return;
    address &= ~kWindowMask;
  } else if (space != Space::shared && space != Space::cluster) return;
  note(c, in);
  watch_of(*c.cta)->touch(c, cta_of(c, address), static_cast<uint32_t>(address & 0xFFFFFF) - kSharedBase, static_cast<uint32_t>(bytes), kind, who);
}

}  // namespace dsv4::sim
