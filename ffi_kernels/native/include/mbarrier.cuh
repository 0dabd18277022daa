// mbarriers: phases that end when all arrivals and all announced bytes have come. Addresses are 32-bit shared addresses
// (shared_address, and peer_address for another CTA of the cluster: numerics.h).
//
// A barrier is waited for by the parity of a phase: the first phase has parity 0, and before its end a wait for parity 1
// returns at once. Also here: the cursor of a ring that barriers guard, and the choice of the one lane that issues asynchronous
// work. Not here: the barriers of exchange.cuh, which serve once per launch.
#pragma once

#include "numerics.h"

namespace dsv4 {

DSV4_D void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What this thread initialised, for the cluster and the async proxy; a barrier of the CTA or cluster must follow.
DSV4_D void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, which orders what this thread has done.
DSV4_D void mbarrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// One arrival, on a barrier of any CTA of the cluster. It orders only what a fence before it has ordered: with
// tensor_fence_before (tcgen05.cuh) this thread's accesses of tensor memory, and none of other memory.
DSV4_D void mbarrier_arrive_relaxed(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival that announces bytes of asynchronous copies: the phase lasts until they have come too.
DSV4_D void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DSV4_D void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// The place in a ring of `slots` that barriers guard, and the parity of its phase.
template <int slots>
struct RingCursor {
  uint32_t slot = 0, parity = 0;
  DSV4_D void advance() {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// True in one lane of the warp, which all of its lanes must ask for together. Ask once: what a thread issues, it must commit.
DSV4_D bool elect_lane() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xFFFFFFFF;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

}  // namespace dsv4
