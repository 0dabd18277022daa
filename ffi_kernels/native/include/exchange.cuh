// Small messages between the CTAs of a cluster: st.async stores into another CTA's shared memory and counts the bytes on
// an mbarrier there, so that a receiver waits for its own data and nothing else. Needs a launch with clusters, even of 2.
//
// Each barrier serves once per launch: initialise it, fence, pass a cluster barrier, then send. A CTA must not end before
// all of its messages have arrived.
#pragma once

#include "numerics.h"

namespace dsv4 {

DSV4_D int cluster_number() {
  int number;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return number;
}

// For what a fence has ordered already: an arrival with release would flush all of the thread's writes.
DSV4_D void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

DSV4_D void barrier_init(uint64_t* barrier, uint32_t bytes) {
  const uint32_t at = shared_address(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

DSV4_D void barrier_wait(uint64_t* barrier) {  // until all of its bytes have arrived; each barrier serves once
  const uint32_t at = shared_address(barrier);
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at)
        : "memory");
}

DSV4_D void send(void* slot, uint64_t* barrier, uint32_t rank, uint32_t value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   peer_address(shared_address(slot), rank)),
               "r"(value), "r"(peer_address(shared_address(barrier), rank))
               : "memory");
}

DSV4_D void send(float4* slot, uint64_t* barrier, uint32_t rank, float4 value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   peer_address(shared_address(slot), rank)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(peer_address(shared_address(barrier), rank))
               : "memory");
}

}  // namespace dsv4
