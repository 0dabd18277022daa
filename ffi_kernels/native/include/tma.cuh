// Tensor copies (TMA): boxes of a tensor in global memory to and from shared memory. A TensorMap says what the tensor and its
// box are; the launch layer encodes it (`TensorMap` of ffi_kernels/launch.py). Elements beyond its bounds are read as
// zeros and not written. Coordinates count elements from the innermost dimension.
#pragma once

#include "mbarrier.cuh"

namespace dsv4 {

// Opaque: never depend on its bits. It must stay in the kernel's parameters (__grid_constant__).
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

DSV4_D void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// A box to shared memory of this CTA; its bytes, those beyond the bounds too, are counted by `barrier`, which in a pair of CTAs
// (group 2) may be one of the other CTA.
template <int group>
DSV4_D void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  if constexpr (group == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::2 [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
  }
}

template <int group>
DSV4_D void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  if constexpr (group == 1) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::2 [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
  }
}

// A box from shared memory. Threads that wrote it call fence_async first; the thread that stores commits and waits.
DSV4_D void store_box(const TensorMap& map, uint32_t from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from), "r"(x), "r"(y)
               : "memory");
}

// What this thread wrote to shared memory, for copies and products that run on their own.
DSV4_D void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DSV4_D void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last `pending` committed groups have read shared memory, which may then be written again.
template <int pending>
DSV4_D void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Until all but the last `pending` committed groups are done.
template <int pending>
DSV4_D void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace dsv4
