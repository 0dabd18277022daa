// One wgmma of a warpgroup: operands as the host laid them out in shared memory, or A in registers; accumulators in and out as
// they lie in registers, [register][thread].
#include <cstdint>

struct Product {
  const uint8_t* a; const uint8_t* b; const uint32_t* fragments; uint32_t* d;  // fragments: of A, [4][128]
  int a_bytes, b_bytes, a_start, b_start, a_leading, a_stride, b_leading, b_stride, swizzle, add, defect;
};
__device__ uint32_t at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ uint8_t* aligned(uint8_t* p) { return p + (1024 - (at(p) & 1023)) % 1024; }  // the launch asks for 1024 bytes more
__device__ uint64_t descriptor(uint32_t start, int leading, int stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t(start & 0x3FFFF) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
}

#define TEN(x) ",%" #x "0,%" #x "1,%" #x "2,%" #x "3,%" #x "4,%" #x "5,%" #x "6,%" #x "7,%" #x "8,%" #x "9"
#define NAMES_2 "%0,%1"
#define NAMES_4 "%0,%1,%2,%3"
#define NAMES_8 NAMES_4 ",%4,%5,%6,%7"
#define ALL_TEN NAMES_8 ",%8,%9"
#define NAMES_12 ALL_TEN ",%10,%11"
#define NAMES_16 NAMES_12 ",%12,%13,%14,%15"
#define NAMES_20 ALL_TEN TEN(1)
#define NAMES_32 ALL_TEN TEN(1) TEN(2) ",%30,%31"
#define NAMES_64 ALL_TEN TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) ",%60,%61,%62,%63"
#define NAMES_96 ALL_TEN TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) ",%90,%91,%92,%93,%94,%95"
#define NAMES_128 ALL_TEN TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define OUT_2(i) "+r"(d[i]), "+r"(d[(i) + 1])
#define OUT_4(i) OUT_2(i), OUT_2((i) + 2)
#define OUT_8(i) OUT_4(i), OUT_4((i) + 4)
#define OUT_12(i) OUT_8(i), OUT_4((i) + 8)
#define OUT_16(i) OUT_8(i), OUT_8((i) + 8)
#define OUT_20(i) OUT_16(i), OUT_4((i) + 16)
#define OUT_32(i) OUT_16(i), OUT_16((i) + 16)
#define OUT_64(i) OUT_32(i), OUT_32((i) + 32)
#define OUT_96(i) OUT_64(i), OUT_32((i) + 64)
#define OUT_128(i) OUT_64(i), OUT_64((i) + 64)

// Registers of D; the places of the operands behind them; shape and types; what follows scale-d.
#define IN_SHARED(name, count, first, second, third, shape, tail)                                                            \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Product p) {                               \
    PREPARE(count)                                                                                                           \
    const uint64_t a = descriptor(at(s) + p.a_start, p.a_leading, p.a_stride, p.swizzle);                                    \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                                  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " third ", 0; wgmma.mma_async.sync.aligned." shape " {" NAMES_##count "}, " first ", " second ", p" tail "; }" \
                 : OUT_##count(0) : "l"(a), "l"(b), "r"(p.add));                                                             \
    FINISH(count)                                                                                                            \
  }
#define IN_REGISTERS(name, count, a0, a1, a2, a3, second, third, shape, tail)                                                \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Product p) {                               \
    PREPARE(count)                                                                                                           \
    const uint32_t *f = p.fragments + threadIdx.x;                                                                           \
    const uint32_t f0 = f[0], f1 = f[128], f2 = f[256], f3 = f[384];                                                         \
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                                  \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " third ", 0; wgmma.mma_async.sync.aligned." shape " {" NAMES_##count "}, {" a0 "," a1 "," a2 "," a3 "}, " second ", p" tail "; }" \
                 : OUT_##count(0) : "r"(f0), "r"(f1), "r"(f2), "r"(f3), "l"(b), "r"(p.add));                                 \
    FINISH(count)                                                                                                            \
  }
#define PREPARE(count)                                                                                                       \
  extern __shared__ __align__(1024) uint8_t dynamic[];                                                                       \
  uint8_t* s = aligned(dynamic);                                                                                             \
  uint8_t* sb = s + (p.a_bytes + 1023) / 1024 * 1024;                                                                        \
  for (int i = threadIdx.x; i < p.a_bytes; i += 128) s[i] = p.a[i];                                                          \
  for (int i = threadIdx.x; i < p.b_bytes; i += 128) sb[i] = p.b[i];                                                         \
  if (p.defect != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                            \
  if (p.defect != 5) __syncthreads();                                                                                        \
  uint32_t d[count];                                                                                                         \
  _Pragma("unroll") for (int i = 0; i < count; ++i) d[i] = p.d[i * 128 + threadIdx.x];                                       \
  const uint64_t b = descriptor(at(sb) + p.b_start, p.b_leading, p.b_stride, p.swizzle);
#define FINISH(count)                                                                                                        \
  asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");                          \
  _Pragma("unroll") for (int i = 0; i < count; ++i) asm volatile("" : "+r"(d[i])::"memory");                                 \
  _Pragma("unroll") for (int i = 0; i < count; ++i) p.d[i * 128 + threadIdx.x] = d[i];

#define SHARED_4(name, shape, tail) IN_SHARED(name, 4, "%4", "%5", "%6", shape, tail)
#define SHARED_12(name, shape, tail) IN_SHARED(name, 12, "%12", "%13", "%14", shape, tail)
#define SHARED_16(name, shape, tail) IN_SHARED(name, 16, "%16", "%17", "%18", shape, tail)
#define SHARED_20(name, shape, tail) IN_SHARED(name, 20, "%20", "%21", "%22", shape, tail)
#define SHARED_32(name, shape, tail) IN_SHARED(name, 32, "%32", "%33", "%34", shape, tail)
#define SHARED_64(name, shape, tail) IN_SHARED(name, 64, "%64", "%65", "%66", shape, tail)
#define SHARED_96(name, shape, tail) IN_SHARED(name, 96, "%96", "%97", "%98", shape, tail)
#define SHARED_128(name, shape, tail) IN_SHARED(name, 128, "%128", "%129", "%130", shape, tail)
#define REGISTERS_16(name, shape, tail) IN_REGISTERS(name, 16, "%16", "%17", "%18", "%19", "%20", "%21", shape, tail)
#define REGISTERS_32(name, shape, tail) IN_REGISTERS(name, 32, "%32", "%33", "%34", "%35", "%36", "%37", shape, tail)
#define REGISTERS_128(name, shape, tail) IN_REGISTERS(name, 128, "%128", "%129", "%130", "%131", "%132", "%133", shape, tail)

SHARED_4(bf16_n8, "m64n8k16.f32.bf16.bf16", ", 1, 1, 0, 0") SHARED_12(bf16_n24, "m64n24k16.f32.bf16.bf16", ", 1, 1, 0, 0") SHARED_20(bf16_n40, "m64n40k16.f32.bf16.bf16", ", 1, 1, 0, 0")
SHARED_32(bf16_n64, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 0") SHARED_64(bf16_n128, "m64n128k16.f32.bf16.bf16", ", 1, 1, 0, 0") SHARED_96(bf16_n192, "m64n192k16.f32.bf16.bf16", ", 1, 1, 0, 0")
SHARED_128(bf16_n256, "m64n256k16.f32.bf16.bf16", ", 1, 1, 0, 0") SHARED_32(f16_n64, "m64n64k16.f32.f16.f16", ", 1, 1, 0, 0") SHARED_32(f16_minus_a, "m64n64k16.f32.f16.f16", ", -1, 1, 0, 0")
SHARED_32(f16_minus_both, "m64n64k16.f32.f16.f16", ", -1, -1, 0, 0") SHARED_16(f16_sums_n64, "m64n64k16.f16.f16.f16", ", 1, 1, 0, 0") SHARED_4(tf32_n8, "m64n8k8.f32.tf32.tf32", ", 1, 1")
SHARED_32(tf32_n64, "m64n64k8.f32.tf32.tf32", ", 1, 1") SHARED_32(tf32_minus_b, "m64n64k8.f32.tf32.tf32", ", 1, -1") SHARED_32(e4m3_n64, "m64n64k32.f32.e4m3.e4m3", ", 1, 1") SHARED_32(e5m2_n64, "m64n64k32.f32.e5m2.e5m2", ", 1, 1")
SHARED_32(e4m3_e5m2_n64, "m64n64k32.f32.e4m3.e5m2", ", 1, 1") SHARED_128(e4m3_n256, "m64n256k32.f32.e4m3.e4m3", ", 1, 1") SHARED_16(e5m2_e4m3_sums_n64, "m64n64k32.f16.e5m2.e4m3", ", 1, 1")
SHARED_32(s8_n64, "m64n64k32.s32.s8.s8", "") SHARED_32(u8_n64, "m64n64k32.s32.u8.u8", "") SHARED_32(s8_u8_n64, "m64n64k32.s32.s8.u8", "") SHARED_32(u8_s8_sat, "m64n64k32.satfinite.s32.u8.s8", "")
SHARED_4(s8_n8, "m64n8k32.s32.s8.s8", "")
SHARED_32(bf16_mn_k, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1, 0") SHARED_32(bf16_k_mn, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 1") SHARED_32(bf16_mn_mn, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1, 1")
SHARED_64(f16_mn_mn_n128, "m64n128k16.f32.f16.f16", ", 1, 1, 1, 1")
REGISTERS_32(bf16_registers, "m64n64k16.f32.bf16.bf16", ", 1, 1, 0") REGISTERS_32(bf16_registers_mn, "m64n64k16.f32.bf16.bf16", ", 1, 1, 1") REGISTERS_32(f16_registers, "m64n64k16.f32.f16.f16", ", -1, 1, 0")
REGISTERS_16(f16_registers_sums, "m64n64k16.f16.f16.f16", ", 1, 1, 0") REGISTERS_32(tf32_registers, "m64n64k8.f32.tf32.tf32", ", 1, 1") REGISTERS_32(e4m3_registers, "m64n64k32.f32.e4m3.e4m3", ", 1, 1")
REGISTERS_32(e5m2_registers, "m64n64k32.f32.e5m2.e4m3", ", 1, 1") REGISTERS_32(s8_registers, "m64n64k32.s32.s8.s8", "") REGISTERS_32(u8_registers, "m64n64k32.s32.u8.s8", "")
REGISTERS_128(bf16_registers_n256, "m64n256k16.f32.bf16.bf16", ", 1, 1, 0")

// What becomes of a result before the wait. Defects: 1, no proxy fence; 2, it is used; 3, none: it is copied, and the copy used
// after the wait; 4, the copy is used before it; 5, the warps do not meet between their stores and the product.
extern "C" __global__ void __launch_bounds__(128) early(const __grid_constant__ Product p) {
  PREPARE(4)
  const uint64_t a = descriptor(at(s) + p.a_start, p.a_leading, p.a_stride, p.swizzle);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" : OUT_4(0) : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  uint32_t copy = 0;
  if (p.defect == 2) asm volatile("add.u32 %0, %0, 0;" : "+r"(d[0]));
  if (p.defect == 3 || p.defect == 4) asm volatile("mov.b32 %0, %1;" : "=r"(copy) : "r"(d[0]));
  if (p.defect == 4) asm volatile("add.u32 %0, %0, 0;" : "+r"(copy));
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if (p.defect == 3 || p.defect == 4) d[0] = copy;
  _Pragma("unroll") for (int i = 0; i < 4; ++i) p.d[i * 128 + threadIdx.x] = d[i];
}
