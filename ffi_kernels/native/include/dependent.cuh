// Programmatic dependent launch: in a custom call of several launches (ffi_kernels/chain.py) a kernel starts while the one before
// it still runs, and meanwhile may read what no launch writes, its weights above all. Every kernel calls both functions, in every
// thread: a kernel that has ended must mean that all those before it have.
#pragma once

#include "numerics.h"

namespace dsv4 {

// The next kernel may start: it takes what the multiprocessors have left.
DSV4_D void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Before anything is read that another launch may have written, and before anything is written.
DSV4_D void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// For kernels that have nothing to do in advance.
DSV4_D void start_after_previous() {
  let_next_start();
  wait_for_previous();
}

// Weights that kernels after this one read whole, filled in by ffi_kernels/chain.py: asked for into L2 once a kernel has asked for all
// that it needs itself, so that the memory is busy while short kernels run.
constexpr int kAheadBuffers = 8;

DSV4_D void prefetch_to_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// A warp's share of such a buffer; warps are counted over the grid. What does not fill 16 bytes at its end is left out.
DSV4_D void fetch_share(const uint8_t* buffer, uint32_t bytes, uint32_t warp, uint32_t warps) {
  const uint32_t pieces = bytes / 16, begin = uint64_t(pieces) * warp / warps, end = uint64_t(pieces) * (warp + 1) / warps;
  if (begin < end) prefetch_to_l2(buffer + 16 * size_t(begin), 16 * (end - begin));
}

DSV4_D void fetch_ahead(const uint8_t* const (&buffers)[kAheadBuffers], const int (&bytes)[kAheadBuffers], uint32_t warp, uint32_t warps) {
  const uint32_t lane = lane_id();
  if (lane < kAheadBuffers && bytes[lane] != 0) fetch_share(buffers[lane], bytes[lane], warp, warps);
}

}  // namespace dsv4
