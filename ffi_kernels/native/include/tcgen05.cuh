// Tensor memory and the tensor cores of sm_100a: thin wrappers of tcgen05 instructions, for one CTA (group 1) or a pair (group 2:
// CTAs 2i and 2i + 1 of a cluster). PTX ISA, chapter on tcgen05.
//
// Tensor memory has 128 lanes and 512 columns of 32 bits; an address is lane << 16 | column. Scale factors of row r stand in lane
// r % 32 of all four quarters, in column r / 32, one byte for each block of K.
#pragma once

#include "mbarrier.cuh"

namespace dsv4 {

#define DSV4_CTA_GROUP(group, instruction, ...)                           \
  if constexpr ((group) == 1) {                                           \
    asm volatile(instruction(".cta_group::1") __VA_ARGS__);               \
  } else {                                                                \
    asm volatile(instruction(".cta_group::2") __VA_ARGS__);               \
  }

// --- allocation: by one whole warp of each CTA -----------------------------------------------------------------------

// Writes the address of `columns` columns (a power of two from 32) to shared memory; waits while others hold them.
template <int group>
DSV4_D void allocate_tensor_memory(uint32_t slot, uint32_t columns) {
#define INSTRUCTION(g) "tcgen05.alloc" g ".sync.aligned.shared::cta.b32 [%0], %1;\n tcgen05.relinquish_alloc_permit" g ".sync.aligned;"
  DSV4_CTA_GROUP(group, INSTRUCTION, ::"r"(slot), "r"(columns) : "memory")
#undef INSTRUCTION
}

template <int group>
DSV4_D void free_tensor_memory(uint32_t address, uint32_t columns) {
#define INSTRUCTION(g) "tcgen05.dealloc" g ".sync.aligned.b32 %0, %1;"
  DSV4_CTA_GROUP(group, INSTRUCTION, ::"r"(address), "r"(columns) : "memory")
#undef INSTRUCTION
}

// --- order between threads -------------------------------------------------------------------------------------------

// Around what one thread tells another (arrivals, barriers): before it, and after it.
DSV4_D void tensor_fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
DSV4_D void tensor_fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// An arrival on `barrier` when all that this thread has issued is done; in a pair on the barriers at this place of both CTAs.
template <int group>
DSV4_D void commit_products(uint32_t barrier) {
  if constexpr (group == 1) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier) : "memory");
  } else {
    asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(barrier),
                 "h"(uint16_t(3))
                 : "memory");
  }
}

// --- operands --------------------------------------------------------------------------------------------------------

// Rows of 128 bytes of K, swizzled by 128 bytes as TMA does it, eight rows after the other. K advances by adding bytes / 16.
DSV4_D uint64_t rows_descriptor(uint32_t shared) {
  constexpr uint64_t stride = 8 * 128 / 16, version = 1, swizzle_128 = 2;
  return uint64_t((shared & 0x3FFFF) >> 4) | uint64_t(1) << 16 | stride << 32 | version << 46 | swizzle_128 << 61;
}

// 512 bytes of scale factors: 32 rows of 16 bytes, one after the other.
DSV4_D uint64_t scales_descriptor(uint32_t shared) {
  constexpr uint64_t stride = 8 * 16 / 16, version = 1;
  return uint64_t((shared & 0x3FFFF) >> 4) | uint64_t(1) << 16 | stride << 32 | version << 46;
}

// kind::mxf4nvf4: e2m1 times e2m1, e4m3 scales, fp32 sums of rows x columns.
DSV4_HD constexpr uint32_t nvfp4_instruction(int rows, int columns) {
  constexpr uint32_t e2m1 = 1;
  return e2m1 << 7 | e2m1 << 10 | uint32_t(columns) / 8 << 17 | uint32_t(rows) / 128 << 27;
}

// 512 bytes of scale factors to four columns, in all quarters; in a pair from each CTA's shared memory to its tensor memory.
template <int group>
DSV4_D void copy_scales(uint32_t to, uint64_t from) {
#define INSTRUCTION(g) "tcgen05.cp" g ".32x128b.warpx4 [%0], %1;"
  DSV4_CTA_GROUP(group, INSTRUCTION, ::"r"(to), "l"(from) : "memory")
#undef INSTRUCTION
}

// sum[rows x columns] (+)= a[rows x 64] b[columns x 64]^T with a scale for each row and 16 of K. One thread issues it, after the
// copies of its scales: a product waits for the copies and for products into the same sums that its thread issued before.
template <int group>
DSV4_D void multiply_nvfp4(uint32_t sum, uint64_t a, uint64_t b, uint32_t instruction, uint32_t scales_a, uint32_t scales_b, bool add) {
#define INSTRUCTION(g)                                                                                   \
  "{\n .reg .pred p;\n setp.ne.b32 p, %6, 0;\n tcgen05.mma" g                                            \
  ".kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%4], [%5], p;\n}"
  DSV4_CTA_GROUP(group, INSTRUCTION,
                 ::"r"(sum), "l"(a), "l"(b), "r"(instruction), "r"(scales_a), "r"(scales_b), "r"(uint32_t(add))
                 : "memory")
#undef INSTRUCTION
}

#undef DSV4_CTA_GROUP

// --- registers -------------------------------------------------------------------------------------------------------

// 32 columns of lane 32 (warp % 4) + lane, for which `address` names lane 32 (warp % 4). Valid after wait_tensor_loads.
DSV4_D void load_tensor_32(uint32_t (&out)[32], uint32_t address) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
      : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]), "=r"(out[4]), "=r"(out[5]), "=r"(out[6]), "=r"(out[7]), "=r"(out[8]),
        "=r"(out[9]), "=r"(out[10]), "=r"(out[11]), "=r"(out[12]), "=r"(out[13]), "=r"(out[14]), "=r"(out[15]), "=r"(out[16]),
        "=r"(out[17]), "=r"(out[18]), "=r"(out[19]), "=r"(out[20]), "=r"(out[21]), "=r"(out[22]), "=r"(out[23]), "=r"(out[24]),
        "=r"(out[25]), "=r"(out[26]), "=r"(out[27]), "=r"(out[28]), "=r"(out[29]), "=r"(out[30]), "=r"(out[31])
      : "r"(address)
      : "memory");
}

// Keeps the compiler from using loaded values before the instruction that stands before this.
DSV4_D void settle(uint32_t (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(x[i]));
}

// Until the warp's loads are done, which filled these.
template <class... Loaded>
DSV4_D void wait_tensor_loads(Loaded&... loaded) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
  (settle(loaded), ...);
}

}  // namespace dsv4
