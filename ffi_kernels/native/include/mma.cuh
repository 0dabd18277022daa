// Tensor cores and asynchronous copies: thin wrappers of the PTX instructions that kernels of several families use.
// Fragment layouts are those of the PTX ISA, with g = lane / 4 and c = lane % 4.
#pragma once

#include "numerics.h"

namespace dsv4 {

// sum[16 x 8] += a[16 x 16] b[16 x 8] in bf16 with fp32 accumulation. a: rows g, g + 8 of k = 2c, 2c + 1, then the same
// rows of k + 8; b: k = 2c, 2c + 1, then k + 8, of column g; sum: columns 2c, 2c + 1 of row g, then of row g + 8.
DSV4_D void mma_bf16(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i.
DSV4_D void load_matrices(uint32_t (&out)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address)
               : "memory");
}

DSV4_D void load_matrices_transposed(uint32_t (&out)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address)
               : "memory");
}

DSV4_D uint4 load16(uint32_t shared) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(shared) : "memory");
  return x;
}

// 16 bytes to shared memory, past L1; zeros (and no read) where `present` is false.
DSV4_D void copy_async_16(uint32_t shared_address, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(from), "r"(present ? 16 : 0) : "memory");
}

DSV4_D void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last `pending` groups that this thread committed.
template <int pending>
DSV4_D void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

DSV4_D float4 load_peer4(uint32_t peer_address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(peer_address)
               : "memory");
  return x;
}

DSV4_D uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

}  // namespace dsv4
