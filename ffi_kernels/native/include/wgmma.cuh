// Products of a warpgroup on the tensor cores of sm_90a: thin wrappers of wgmma. B lies in shared memory, A there or in registers;
// rows of 128 bytes, swizzled: 16-byte chunk i of a row at i ^ (row % 8). Sums and A in registers have the layout of mma.sync, 16
// rows to a warp (mma.cuh). A sum is also the same bit for bit as that of mma.sync, and takes the terms of a k step in any order
// (an H200 was asked with random and with badly scaled numbers).
#pragma once

#include "numerics.h"

namespace dsv4 {

// A matrix in shared memory from `address` on, of at most 128 bytes to a row where the rows are along k: `group_bytes` from 8 rows to
// the next 8. Above its 18 bits an address has the CTA's rank in the cluster.
DSV4_D uint64_t swizzled_matrix(uint32_t address, uint32_t group_bytes) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(group_bytes >> 4) << 32 | uint64_t(1) << 62;
}

// The matrix that begins so many bytes later.
DSV4_D uint64_t moved(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Before the first product, and where a thread has written the registers of one: they are in place.
DSV4_D void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DSV4_D void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last `pending` committed groups are done.
template <int pending>
DSV4_D void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// What the compiler must not read or write on the other side of this line.
template <int count>
DSV4_D void pin(float (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define DSV4_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define DSV4_20(x, i) DSV4_4(x, i), DSV4_4(x, i + 4), DSV4_4(x, i + 8), DSV4_4(x, i + 12), DSV4_4(x, i + 16)

// sum[64 x 40] = (adds ? sum : 0) + a[64 x 16] b[40 x 16]^T in bf16, both along k.
DSV4_D void product_64x40(float (&sum)[20], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %22, 0;\n wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}, %20, %21, p, 1, 1, 0, 0;\n}"
      : DSV4_20(sum, 0)
      : "l"(a), "l"(b), "r"(int(adds)));
}

// sum[64 x 32] = (adds ? sum : 0) + a[64 x 16] b[16 x 32] in bf16; the rows of b are along k.
DSV4_D void product_64x32(float (&sum)[16], const uint32_t (&a)[4], uint64_t b, bool adds) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %21, 0;\n wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}"
      : DSV4_4(sum, 0), DSV4_4(sum, 4), DSV4_4(sum, 8), DSV4_4(sum, 12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(adds)));
}

#undef DSV4_4
#undef DSV4_20

}  // namespace dsv4
