// Loads and stores of every width and space; atomics of every operation, type and space.
#include <cstdint>

// Each thread works on a cell of its own, so that what it reads back is certain.
#define CELLS(name, T) struct name##_params { T* cell; const T* b; const T* c; T* old; };
#define IN_GLOBAL(name, T, k, text)                                                                                     \
  extern "C" __global__ void name##_global(const __grid_constant__ name##_params p) {                                   \
    const int t = threadIdx.x;                                                                                          \
    T d;                                                                                                                \
    asm volatile("atom.relaxed.gpu.global." text : "=" k(d) : "l"(p.cell + t), k(p.b[t]), k(p.c[t]) : "memory");        \
    p.old[t] = d;                                                                                                       \
  }
#define IN_SHARED(name, T, k, text)                                                                                     \
  extern "C" __global__ void name##_shared(const __grid_constant__ name##_params p) {                                   \
    __shared__ T s[128];                                                                                                \
    const int t = threadIdx.x;                                                                                          \
    s[t] = p.cell[t];                                                                                                   \
    __syncthreads();                                                                                                    \
    T d;                                                                                                                \
    asm volatile("atom.acq_rel.cta.shared::cta." text : "=" k(d) : "r"(uint32_t(__cvta_generic_to_shared(s + t))), k(p.b[t]), k(p.c[t]) : "memory"); \
    p.old[t] = d;                                                                                                       \
    p.cell[t] = s[t];                                                                                                   \
  }
#define REDUCED(name, T, k, text)                                                                                       \
  extern "C" __global__ void name##_red(const __grid_constant__ name##_params p) {                                      \
    const int t = threadIdx.x;                                                                                          \
    asm volatile("red.release.sys.global." text ::"l"(p.cell + t), k(p.b[t]) : "memory");                               \
  }
#define ATOM(name, T, k, op) CELLS(name, T) IN_GLOBAL(name, T, k, op " %0, [%1], %2;") IN_SHARED(name, T, k, op " %0, [%1], %2;")
#define ATOM_RED(name, T, k, op) ATOM(name, T, k, op) REDUCED(name, T, k, op " [%0], %1;")
#define CAS(name, T, k, op) CELLS(name, T) IN_GLOBAL(name, T, k, op " %0, [%1], %2, %3;") IN_SHARED(name, T, k, op " %0, [%1], %2, %3;")
ATOM_RED(add_u32, uint32_t, "r", "add.u32") ATOM_RED(add_u64, uint64_t, "l", "add.u64") ATOM_RED(add_f32, float, "f", "add.f32") ATOM_RED(add_f64, double, "d", "add.f64")
ATOM_RED(add_f16, uint16_t, "h", "add.noftz.f16") ATOM_RED(add_bf16, uint16_t, "h", "add.noftz.bf16") ATOM_RED(add_f16x2, uint32_t, "r", "add.noftz.f16x2") ATOM_RED(add_bf16x2, uint32_t, "r", "add.noftz.bf16x2")
ATOM_RED(min_u32, uint32_t, "r", "min.u32") ATOM_RED(min_s32, uint32_t, "r", "min.s32") ATOM_RED(min_u64, uint64_t, "l", "min.u64") ATOM_RED(min_s64, uint64_t, "l", "min.s64")
ATOM_RED(max_u32, uint32_t, "r", "max.u32") ATOM_RED(max_s32, uint32_t, "r", "max.s32") ATOM_RED(max_u64, uint64_t, "l", "max.u64") ATOM_RED(max_s64, uint64_t, "l", "max.s64")
ATOM_RED(inc_u32, uint32_t, "r", "inc.u32") ATOM_RED(dec_u32, uint32_t, "r", "dec.u32") ATOM_RED(and_b32, uint32_t, "r", "and.b32") ATOM_RED(or_b32, uint32_t, "r", "or.b32")
ATOM_RED(xor_b32, uint32_t, "r", "xor.b32") ATOM_RED(and_b64, uint64_t, "l", "and.b64") ATOM_RED(or_b64, uint64_t, "l", "or.b64") ATOM_RED(xor_b64, uint64_t, "l", "xor.b64")
ATOM(exch_b32, uint32_t, "r", "exch.b32") ATOM(exch_b64, uint64_t, "l", "exch.b64") CAS(cas_b16, uint16_t, "h", "cas.b16") CAS(cas_b32, uint32_t, "r", "cas.b32") CAS(cas_b64, uint64_t, "l", "cas.b64")

// Vectors of floats: four, two, and eight halves at once, with and without what was there.
struct Vectors { float* f; uint16_t* h; uint32_t* w; const float* b; const uint16_t* c; float* old; };
extern "C" __global__ void vectors(const __grid_constant__ Vectors p) {
  const int t = threadIdx.x;
  const float* b = p.b + 4 * t;
  const uint16_t* c = p.c + 8 * t;
  const uint32_t* cw = reinterpret_cast<const uint32_t*>(c);
  float o[4];
  asm volatile("atom.global.add.v4.f32 {%0,%1,%2,%3}, [%4], {%5,%6,%7,%8};" : "=f"(o[0]), "=f"(o[1]), "=f"(o[2]), "=f"(o[3]) : "l"(p.f + 4 * t), "f"(b[0]), "f"(b[1]), "f"(b[2]), "f"(b[3]) : "memory");
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p.f + 4 * t), "f"(b[3]), "f"(b[2]), "f"(b[1]), "f"(b[0]) : "memory");
  asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" ::"l"(p.f + 4 * t + 2), "f"(b[1]), "f"(b[2]) : "memory");
  asm volatile("red.global.add.noftz.v8.f16 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};" ::"l"(p.h + 8 * t), "h"(c[0]), "h"(c[1]), "h"(c[2]), "h"(c[3]), "h"(c[4]), "h"(c[5]), "h"(c[6]), "h"(c[7]) : "memory");
  asm volatile("red.global.max.noftz.v4.f16 [%0], {%1,%2,%3,%4};" ::"l"(p.h + 8 * t), "h"(c[4]), "h"(c[5]), "h"(c[6]), "h"(c[7]) : "memory");
  asm volatile("red.global.min.noftz.v2.f16x2 [%0], {%1,%2};" ::"l"(p.w + 4 * t), "r"(cw[0]), "r"(cw[1]) : "memory");
  asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1,%2,%3,%4};" ::"l"(p.w + 4 * t), "r"(cw[3]), "r"(cw[2]), "r"(cw[1]), "r"(cw[0]) : "memory");
  for (int i = 0; i < 4; ++i) p.old[4 * t + i] = o[i];
}

// Many threads and CTAs on the same cells: what is left depends on no order.
struct Contended { int* cells; int n; };
extern "C" __global__ void contended(const __grid_constant__ Contended p) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x, v = t * 37 % 1001 - 300;
  atomicAdd(p.cells, v);
  atomicMin(p.cells + 1, v);
  atomicMax(p.cells + 2, v);
  atomicAnd(p.cells + 3, ~(1 << t % 20));
  atomicOr(p.cells + 4, 1 << t % 31);
  atomicXor(p.cells + 5, v);
  atomicInc(reinterpret_cast<unsigned*>(p.cells + 6), 77);
  atomicDec(reinterpret_cast<unsigned*>(p.cells + 7), 50);
  atomicAdd(reinterpret_cast<unsigned long long*>(p.cells + 8), 1ull << t % 40);
  atomicAdd(reinterpret_cast<float*>(p.cells + 10), 0.5f);
  int seen = *reinterpret_cast<volatile int*>(p.cells + 11), expected;
  do { expected = seen; seen = atomicCAS(p.cells + 11, expected, expected + 3); } while (seen != expected);
}

// Bytes, halves, words and vectors, widened with and without sign, through global, shared and local memory.
__constant__ int8_t kTable[32] = {5, -7, 100, -128, 127, 0, 1, -1, 33, -33, 64, -64, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, -16, 17, 18, 19, 20, 21, 22, -23};
struct Widths { const uint8_t* a; long long* d; uint8_t* bytes; };
#define LOAD(i, text, k, T) { T x; asm volatile(text : "=" k(x) : "l"(p.a + at) : "memory"); d[i] = static_cast<long long>(x); }
extern "C" __global__ void widths(const __grid_constant__ Widths p) {
  __shared__ __align__(16) uint8_t s[32 * 32];
  const int t = threadIdx.x, at = 32 * t;
  long long* d = p.d + 32 * t;
  LOAD(0, "ld.global.u8 %0, [%1];", "r", uint32_t) LOAD(1, "ld.global.s8 %0, [%1+1];", "r", int32_t) LOAD(2, "ld.global.u16 %0, [%1+2];", "h", uint16_t)
  LOAD(3, "ld.global.s16 %0, [%1+4];", "r", int32_t) LOAD(4, "ld.global.u32 %0, [%1+8];", "r", uint32_t) LOAD(5, "ld.global.s32 %0, [%1+8];", "l", long long)
  LOAD(6, "ld.global.u8 %0, [%1+7];", "l", long long) LOAD(7, "ld.global.s8 %0, [%1+7];", "l", long long) LOAD(8, "ld.global.b64 %0, [%1+16];", "l", long long)
  LOAD(9, "ld.global.nc.u32 %0, [%1+12];", "r", uint32_t) LOAD(10, "ld.volatile.global.s16 %0, [%1+6];", "r", int32_t) LOAD(11, "ld.relaxed.gpu.global.u32 %0, [%1+4];", "r", uint32_t)
  LOAD(12, "ld.acquire.sys.global.u64 %0, [%1+8];", "l", long long) LOAD(13, "ld.global.cg.u32 %0, [%1];", "r", uint32_t) LOAD(14, "ld.global.cv.u32 %0, [%1];", "r", uint32_t)
  LOAD(15, "ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1+28];", "r", uint32_t) LOAD(16, "ld.u16 %0, [%1+30];", "h", uint16_t)
  uint32_t x, y, z, w;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4+16];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(p.a + at) : "memory");
  d[17] = x ^ y ^ z ^ w;
  asm volatile("ld.global.v2.s8 {%0,%1}, [%2+30];" : "=r"(x), "=r"(y) : "l"(p.a + at) : "memory");
  d[18] = int(x) * 1000 + int(y);
  asm volatile("ld.global.v4.u16 {%0,%1,%2,%3}, [%4+8];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "l"(p.a + at) : "memory");
  d[19] = x + 3 * y + 5 * z + 7 * w;
  const uint32_t mine = uint32_t(__cvta_generic_to_shared(s + at));
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n st.shared.v2.b64 [%0+16], {%5,%6};" ::"r"(mine), "r"(x), "r"(y), "r"(z), "r"(w), "l"(d[8]), "l"(d[12]) : "memory");
  asm volatile("st.shared.u8 [%0+1], %1;\n st.volatile.shared.u16 [%0+6], %2;\n st.relaxed.cta.shared.u32 [%0+12], %1;" ::"r"(mine), "r"(uint32_t(d[1])), "h"(uint16_t(d[3])) : "memory");
  asm volatile("ld.shared.u64 %0, [%1];" : "=l"(d[20]) : "r"(mine) : "memory");
  asm volatile("ld.shared.s8 %0, [%1+1];" : "=l"(d[21]) : "r"(mine) : "memory");
  asm volatile("{ .reg .b64 g; cvta.shared.u64 g, %1; ld.s32 %0, [g+12]; }" : "=l"(d[22]) : "l"(uint64_t(mine)) : "memory");
  int8_t local[40];
  for (int i = 0; i < 40; ++i) local[i] = int8_t(s[at + i % 32] + i);
  int8_t* volatile somewhere = local + (p.a[at] & 7);
  for (int i = 0; i < 8; ++i) somewhere[3 * i] ^= 0x55;
  long long sum = 0;
  for (int i = 0; i < 40; ++i) sum = sum * 5 + local[i];
  d[23] = sum;
  d[24] = kTable[p.a[at] & 31];
  d[25] = __isShared(s) + 2 * __isLocal(local) + 4 * __isGlobal(p.a) + 8 * __isShared(p.a) + 16 * __isLocal(s);
  uint8_t* bytes = p.bytes + at;
  asm volatile("st.global.u8 [%0], %1;\n st.global.cs.u16 [%0+2], %2;\n st.global.wt.u32 [%0+4], %3;\n st.global.v2.u8 [%0+8], {%1, %3};\n st.release.gpu.global.u32 [%0+12], %3;\n st.global.v2.b64 [%0+16], {%4, %5};"
               ::"l"(bytes), "r"(uint32_t(d[7])), "h"(uint16_t(d[10])), "r"(uint32_t(d[4])), "l"(d[8]), "l"(d[12]) : "memory");
  for (int i = 26; i < 32; ++i) d[i] = 0;
}
