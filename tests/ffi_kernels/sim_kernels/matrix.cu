// mma.sync, ldmatrix, stmatrix, movmatrix: registers in and out as they lie, so that tests check the fragments themselves.
#include <cstdint>

struct Mma { const uint32_t* a; const uint32_t* b; const uint32_t* c; uint32_t* d; };  // [register][lane]

#define R(p, i) "r"(p[(i) * 32 + threadIdx.x])
#define MMA_4_2_4(name, text)                                                                                                        \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    uint32_t d[4];                                                                                                                   \
    asm volatile("mma.sync.aligned." text " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                               \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                                    \
                 : R(p.a, 0), R(p.a, 1), R(p.a, 2), R(p.a, 3), R(p.b, 0), R(p.b, 1), R(p.c, 0), R(p.c, 1), R(p.c, 2), R(p.c, 3));    \
    for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = d[i];                                                                    \
  }
#define MMA_2_1_4(name, text)                                                                                                        \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    uint32_t d[4];                                                                                                                   \
    asm volatile("mma.sync.aligned." text " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                                           \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                                                    \
                 : R(p.a, 0), R(p.a, 1), R(p.b, 0), R(p.c, 0), R(p.c, 1), R(p.c, 2), R(p.c, 3));                                     \
    for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = d[i];                                                                    \
  }
#define MMA_F(name, text)                                                                                                            \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    float d[4];                                                                                                                      \
    const float* c = reinterpret_cast<const float*>(p.c) + threadIdx.x;                                                              \
    asm volatile("mma.sync.aligned." text " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                               \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                    \
                 : R(p.a, 0), R(p.a, 1), R(p.a, 2), R(p.a, 3), R(p.b, 0), R(p.b, 1), "f"(c[0]), "f"(c[32]), "f"(c[64]), "f"(c[96])); \
    for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = __float_as_uint(d[i]);                                                   \
  }
#define MMA_F_HALF(name, text)                                                                                                       \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    float d[4];                                                                                                                      \
    const float* c = reinterpret_cast<const float*>(p.c) + threadIdx.x;                                                              \
    asm volatile("mma.sync.aligned." text " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                                           \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                    \
                 : R(p.a, 0), R(p.a, 1), R(p.b, 0), "f"(c[0]), "f"(c[32]), "f"(c[64]), "f"(c[96]));                                  \
    for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = __float_as_uint(d[i]);                                                   \
  }
MMA_F(bf16_k16, "m16n8k16.row.col.f32.bf16.bf16.f32")
MMA_F(f16_k16, "m16n8k16.row.col.f32.f16.f16.f32")
MMA_F(tf32_k8, "m16n8k8.row.col.f32.tf32.tf32.f32")
MMA_F(e4m3_k32, "m16n8k32.row.col.f32.e4m3.e4m3.f32")
MMA_F(e5m2_e4m3_k32, "m16n8k32.row.col.f32.e5m2.e4m3.f32")
MMA_F_HALF(bf16_k8, "m16n8k8.row.col.f32.bf16.bf16.f32")
MMA_F_HALF(f16_k8, "m16n8k8.row.col.f32.f16.f16.f32")
MMA_F_HALF(tf32_k4, "m16n8k4.row.col.f32.tf32.tf32.f32")
MMA_4_2_4(s8_k32, "m16n8k32.row.col.s32.s8.s8.s32")
MMA_4_2_4(s8_u8_k32, "m16n8k32.row.col.satfinite.s32.s8.u8.s32")
MMA_2_1_4(u8_k16, "m16n8k16.row.col.s32.u8.u8.s32")
MMA_4_2_4(s4_k64, "m16n8k64.row.col.s32.s4.s4.s32")
MMA_4_2_4(u8_k32, "m16n8k32.row.col.s32.u8.u8.s32")
MMA_4_2_4(u8_s8_sat_k32, "m16n8k32.row.col.satfinite.s32.u8.s8.s32")
MMA_2_1_4(s8_k16, "m16n8k16.row.col.s32.s8.s8.s32")
MMA_4_2_4(u4_s4_k64, "m16n8k64.row.col.s32.u4.s4.s32")
MMA_2_1_4(u4_k32, "m16n8k32.row.col.s32.u4.u4.s32")
MMA_F_HALF(e4m3_k16, "m16n8k16.row.col.f32.e4m3.e4m3.f32")
MMA_F_HALF(e5m2_k16, "m16n8k16.row.col.f32.e5m2.e5m2.f32")

#define MMA_SUMS_4_2(name, text)                                                                                                      \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    uint32_t d[2];                                                                                                                   \
    asm volatile("mma.sync.aligned." text " {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"                                               \
                 : "=r"(d[0]), "=r"(d[1]) : R(p.a, 0), R(p.a, 1), R(p.a, 2), R(p.a, 3), R(p.b, 0), R(p.b, 1), R(p.c, 0), R(p.c, 1)); \
    for (int i = 0; i < 2; ++i) p.d[32 * i + threadIdx.x] = d[i];                                                                    \
  }
#define MMA_SUMS_2_1(name, text)                                                                                                      \
  extern "C" __global__ void name(const __grid_constant__ Mma p) {                                                                   \
    uint32_t d[2];                                                                                                                   \
    asm volatile("mma.sync.aligned." text " {%0,%1}, {%2,%3}, {%4}, {%5,%6};"                                                        \
                 : "=r"(d[0]), "=r"(d[1]) : R(p.a, 0), R(p.a, 1), R(p.b, 0), R(p.c, 0), R(p.c, 1));                                  \
    for (int i = 0; i < 2; ++i) p.d[32 * i + threadIdx.x] = d[i];                                                                    \
  }
MMA_SUMS_4_2(f16_sums, "m16n8k16.row.col.f16.f16.f16.f16")
MMA_SUMS_2_1(f16_sums_k8, "m16n8k8.row.col.f16.f16.f16.f16")
MMA_SUMS_4_2(e4m3_sums, "m16n8k32.row.col.f16.e4m3.e4m3.f16")
MMA_SUMS_4_2(e5m2_e4m3_sums, "m16n8k32.row.col.f16.e5m2.e4m3.f16")

struct MmaDouble { const double* a; const double* b; const double* c; double* d; };  // [register][lane]
#define X(p, i) "d"(p[(i) * 32 + threadIdx.x])
extern "C" __global__ void f64_m8_k4(const __grid_constant__ MmaDouble p) {
  double d[2];
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%4,%5};" : "=d"(d[0]), "=d"(d[1]) : X(p.a, 0), X(p.b, 0), X(p.c, 0), X(p.c, 1));
  for (int i = 0; i < 2; ++i) p.d[32 * i + threadIdx.x] = d[i];
}
#define F64_OUT : "=d"(d[0]), "=d"(d[1]), "=d"(d[2]), "=d"(d[3]) : X(p.c, 0), X(p.c, 1), X(p.c, 2), X(p.c, 3)
extern "C" __global__ void f64_m16_k4(const __grid_constant__ MmaDouble p) {
  double d[4];
  asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%8,%9}, {%10}, {%4,%5,%6,%7};" F64_OUT, X(p.a, 0), X(p.a, 1), X(p.b, 0));
  for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = d[i];
}
extern "C" __global__ void f64_m16_k8(const __grid_constant__ MmaDouble p) {
  double d[4];
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%8,%9,%10,%11}, {%12,%13}, {%4,%5,%6,%7};" F64_OUT, X(p.a, 0), X(p.a, 1), X(p.a, 2), X(p.a, 3), X(p.b, 0),
               X(p.b, 1));
  for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = d[i];
}
extern "C" __global__ void f64_m16_k16(const __grid_constant__ MmaDouble p) {
  double d[4];
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, {%4,%5,%6,%7};" F64_OUT, X(p.a, 0), X(p.a, 1), X(p.a, 2),
               X(p.a, 3), X(p.a, 4), X(p.a, 5), X(p.a, 6), X(p.a, 7), X(p.b, 0), X(p.b, 1), X(p.b, 2), X(p.b, 3));
  for (int i = 0; i < 4; ++i) p.d[32 * i + threadIdx.x] = d[i];
}

// Four 8x8 matrices of 16-bit elements: plain and transposed loads, stores, a transpose in registers.
struct Tiles { const uint16_t* a; uint32_t* d; uint16_t* stored; };
extern "C" __global__ void tiles(const __grid_constant__ Tiles p) {
  __shared__ __align__(16) uint16_t s[256], u[256];
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) s[i] = p.a[i];
  __syncwarp();
  const uint32_t at = uint32_t(__cvta_generic_to_shared(s + 8 * t)), to = uint32_t(__cvta_generic_to_shared(u + 8 * t));
  uint32_t d[11];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(d[4]), "=r"(d[5]), "=r"(d[6]), "=r"(d[7]) : "r"(at) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(d[8]), "=r"(d[9]) : "r"(at) : "memory");
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d[10]) : "r"(d[1]));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
  __syncwarp();
  for (int i = 0; i < 11; ++i) p.d[32 * i + t] = d[i];
  for (int i = t; i < 256; i += 32) p.stored[i] = u[i];
}

// One, two or four matrices, read at the rows that `rows` names, and stored at them.
struct Some { const uint16_t* a; const int* rows; uint32_t* d; uint16_t* stored; };
#define SOME(name, count, outs, names, store_names, how)                                                                      \
  extern "C" __global__ void name(const __grid_constant__ Some p) {                                                                \
    __shared__ __align__(16) uint16_t s[256], u[256];                                                                              \
    const int t = threadIdx.x;                                                                                                     \
    for (int i = t; i < 256; i += 32) { s[i] = p.a[i]; u[i] = 0xEEEE; }                                                            \
    __syncwarp();                                                                                                                  \
    const uint32_t at = uint32_t(__cvta_generic_to_shared(s + 8 * p.rows[t])), to = uint32_t(__cvta_generic_to_shared(u + 8 * p.rows[t])); \
    uint32_t d[4] = {};                                                                                                            \
    asm volatile("ldmatrix.sync.aligned.m8n8." count how ".shared.b16 {" names "}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at) : "memory"); \
    asm volatile("stmatrix.sync.aligned.m8n8." count how ".shared.b16 [%0], {" store_names "};" ::"r"(to), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory"); \
    __syncwarp();                                                                                                                  \
    for (int i = 0; i < 4; ++i) p.d[32 * i + t] = i < outs ? d[i] : 0;                                                             \
    for (int i = t; i < 256; i += 32) p.stored[i] = u[i];                                                                          \
  }
SOME(tiles_x1, "x1", 1, "%0", "%1", "") SOME(tiles_x2, "x2", 2, "%0,%1", "%1,%2", "") SOME(tiles_x4, "x4", 4, "%0,%1,%2,%3", "%1,%2,%3,%4", "")
SOME(tiles_x1_trans, "x1", 1, "%0", "%1", ".trans") SOME(tiles_x2_trans, "x2", 2, "%0,%1", "%1,%2", ".trans") SOME(tiles_x4_trans, "x4", 4, "%0,%1,%2,%3", "%1,%2,%3,%4", ".trans")

// A GEMM: d[m][n] = a[m][k] b[n][k], bf16, one warp per 16 x 8 tile, fragments through ldmatrix.
struct Gemm { const uint16_t* a; const uint16_t* b; float* d; int m, n, k; };
extern "C" __global__ void gemm(const __grid_constant__ Gemm p) {
  __shared__ __align__(16) uint16_t sa[16 * 16], sb[8 * 16];
  const int row = blockIdx.y * 16, col = blockIdx.x * 8, t = threadIdx.x;
  float d[4] = {};
  for (int k = 0; k < p.k; k += 16) {
    __syncwarp();
    for (int i = t; i < 256; i += 32) sa[i] = p.a[(row + i / 16) * p.k + k + i % 16];
    for (int i = t; i < 128; i += 32) sb[i] = p.b[(col + i / 16) * p.k + k + i % 16];
    __syncwarp();
    uint32_t a[4], b[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(sa + (t & 15) * 16 + t / 16 * 8))) : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(b[0]), "=r"(b[1])
                 : "r"(uint32_t(__cvta_generic_to_shared(sb + (t & 7) * 16 + (t / 8 & 1) * 8))) : "memory");
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  for (int i = 0; i < 4; ++i) p.d[(row + t / 4 + 8 * (i / 2)) * p.n + col + t % 4 * 2 + i % 2] = d[i];
}
