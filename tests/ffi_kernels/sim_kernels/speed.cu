// Work for tests/sim_speed.py: loops of one kind of instruction. What they compute means nothing; sm_90a, and sm_100a for
// the products in tensor memory.
#include <cstdint>

struct Work { uint32_t* d; int rounds; };
__device__ uint32_t at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Integers and floats in registers, as address arithmetic and epilogues have them.
extern "C" __global__ void arithmetic(const __grid_constant__ Work p) {
  uint32_t a = threadIdx.x, b = threadIdx.x * 3 + 1;
  float x = threadIdx.x, y = 0.5f;
#pragma unroll 1
  for (int i = 0; i < p.rounds; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a = a * 5 + b;
      b ^= a >> (j + 3);
      x = fmaf(x, 0.25f, y);
      y = y * 0.5f + float(b & 255);
    }
  }
  p.d[threadIdx.x] = a + b + __float_as_uint(x + y);
}

// Shared memory behind barriers: each warp reads what another one wrote.
extern "C" __global__ void shared_memory(const __grid_constant__ Work p) {
  __shared__ float4 s[2][256];
  const int t = threadIdx.x;
  float4 x = {1.0f * t, 2, 3, 4};
#pragma unroll 1
  for (int i = 0; i < p.rounds; ++i) {
    s[i & 1][t] = x;
    __syncthreads();
    const float4 y = s[i & 1][(t * 7 + i) & 255];
    x.x += y.w, x.y += y.x, x.z += __shfl_xor_sync(0xFFFFFFFFu, y.y, 4), x.w = y.z;
  }
  p.d[t] = __float_as_uint(x.x + x.y + x.z + x.w);
}

// Global memory, streamed: 16 bytes in, 16 bytes out.
extern "C" __global__ void global_memory(const __grid_constant__ Work p) {
  uint4* d = reinterpret_cast<uint4*>(p.d) + blockIdx.x * blockDim.x * p.rounds;
#pragma unroll 1
  for (int i = 0; i < p.rounds; ++i) {
    uint4 x = d[i * blockDim.x + threadIdx.x];
    x.x += x.y, x.z ^= x.w;
    d[i * blockDim.x + threadIdx.x] = x;
  }
}

// Fragments by ldmatrix from shared memory, two chains of products: the inner loop of a product with mma.sync.
#define MMA_LOOP(name, text, sum_type, constraint)                                                                                             \
  extern "C" __global__ void name(const __grid_constant__ Work p) {                                                                            \
    __shared__ __align__(16) uint32_t s[2048];                                                                                                 \
    for (int i = threadIdx.x; i < 2048; i += blockDim.x) s[i] = 0x3C003C00u;                                                                   \
    __syncthreads();                                                                                                                           \
    sum_type d[2][4] = {};                                                                                                                     \
    const uint32_t from = at(s) + threadIdx.x % 32 * 16 + threadIdx.x / 32 * 1024;                                                             \
    _Pragma("unroll 1") for (int i = 0; i < p.rounds; ++i) {                                                                                   \
      uint32_t a[4], b[4];                                                                                                                     \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from)); \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(from + 512)); \
      _Pragma("unroll") for (int j = 0; j < 8; ++j)                                                                                            \
        asm volatile("mma.sync.aligned." text " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                         \
                     : constraint(d[j % 2][0]), constraint(d[j % 2][1]), constraint(d[j % 2][2]), constraint(d[j % 2][3])                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[j % 2 * 2]), "r"(b[j % 2 * 2 + 1]));                                  \
    }                                                                                                                                          \
    p.d[threadIdx.x] = uint32_t(d[0][0] + d[0][1] + d[0][2] + d[0][3] + d[1][0] + d[1][1] + d[1][2] + d[1][3]);                                \
  }
MMA_LOOP(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "+f")
MMA_LOOP(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "+f")
MMA_LOOP(mma_e4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32", float, "+f")
MMA_LOOP(mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", int, "+r")

// D [64, 128] of a warpgroup: four steps of k per group of products, as a swizzled tile of 128 bytes per row gives them.
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_LOOP(name, text, tail)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Work p) {                                                     \
    extern __shared__ __align__(1024) uint32_t s[];                                                                                            \
    for (int i = threadIdx.x; i < 6144; i += blockDim.x) s[i] = 0x3C003C00u;                                                                   \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                                               \
    __syncthreads();                                                                                                                           \
    float d[64] = {};                                                                                                                          \
    const uint64_t a = uint64_t(at(s)) >> 4 | uint64_t(64) << 32 | uint64_t(1) << 62, b = a + (8192 >> 4);                                     \
    _Pragma("unroll 1") for (int i = 0; i < p.rounds; ++i) {                                                                                   \
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                                                  \
      _Pragma("unroll") for (int k = 0; k < 4; ++k)                                                                                            \
        asm volatile("{ wgmma.mma_async.sync.aligned." text                                                                                    \
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"  \
                     "%62,%63}, %64, %65, 1" tail "; }"                                                                                        \
                     : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56) : "l"(a + 2 * k), "l"(b + 2 * k));                         \
      asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");                                        \
    }                                                                                                                                          \
    float sum = 0;                                                                                                                             \
    for (int i = 0; i < 64; ++i) sum += d[i];                                                                                                  \
    p.d[threadIdx.x] = __float_as_uint(sum);                                                                                                   \
  }
#if __CUDA_ARCH__ == 900
WGMMA_LOOP(wgmma_bf16, "m64n128k16.f32.bf16.bf16", ", 1, 1, 0, 0")
WGMMA_LOOP(wgmma_e4m3, "m64n128k32.f32.e4m3.e4m3", ", 1, 1")
#endif

// D [128, 128] in tensor memory, without swizzle: cores of 8 rows of 16 bytes, 128 bytes apart, halves of k 2048 bytes apart.
#define TENSOR_LOOP(name, product, idesc)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(128) name(const __grid_constant__ Work p) {                                                     \
    extern __shared__ __align__(1024) uint32_t s[];                                                                                            \
    __shared__ uint64_t done;                                                                                                                  \
    __shared__ uint32_t tensor;                                                                                                                \
    for (int i = threadIdx.x; i < 2176; i += blockDim.x) s[i] = i < 2048 ? 0x3C003C00u : 0x38383838u;                                          \
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n fence.mbarrier_init.release.cluster;" ::"r"(at(&done)) : "memory"); \
    if (threadIdx.x < 32) asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 256;" ::"r"(at(&tensor)) : "memory");     \
    asm volatile("fence.proxy.async.shared::cta;\n tcgen05.fence::before_thread_sync;" ::: "memory");                                          \
    __syncthreads();                                                                                                                           \
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");                                                                            \
    const uint32_t d = tensor, sa = d + 128, sb = d + 132;                                                                                     \
    const uint64_t a = uint64_t(at(s)) >> 4 | uint64_t(2048 >> 4) << 16 | uint64_t(8) << 32 | uint64_t(1) << 46, b = a + (4096 >> 4);          \
    if (threadIdx.x == 0) {                                                                                                                    \
      const uint64_t scales = uint64_t(at(s) + 8192) >> 4 | uint64_t(1) << 16 | uint64_t(8) << 32 | uint64_t(1) << 46;                         \
      asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;\n tcgen05.cp.cta_group::1.32x128b.warpx4 [%2], %1;" ::"r"(sa), "l"(scales), "r"(sb)); \
      _Pragma("unroll 1") for (int i = 0; i < p.rounds; ++i)                                                                                   \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.cta_group::1.kind::" product ", p; }" ::"r"(d), "l"(a), "l"(b),        \
                     "r"(uint32_t(idesc)), "r"(i), "r"(sa), "r"(sb));                                                                          \
      asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(at(&done)) : "memory");                 \
    }                                                                                                                                          \
    __syncwarp();                                                                                                                              \
    asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @p bra done; bra again; done: }" ::"r"(at(&done)) : "memory"); \
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");                                                                            \
    uint32_t v;                                                                                                                                \
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];\n tcgen05.wait::ld.sync.aligned;" : "=r"(v) : "r"(d + (threadIdx.x / 32 * 32 << 16))); \
    p.d[threadIdx.x] = v;                                                                                                                      \
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");                                                                           \
    __syncthreads();                                                                                                                           \
    if (threadIdx.x < 32) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 256;" ::"r"(d));                                     \
  }
#if __CUDA_ARCH__ == 1000
TENSOR_LOOP(tensor_bf16, "f16 [%0], %1, %2, %3", 1 << 4 | 1 << 7 | 1 << 10 | 128 / 8 << 17 | 128 / 16 << 24)
TENSOR_LOOP(tensor_e4m3, "f8f6f4 [%0], %1, %2, %3", 1 << 4 | 128 / 8 << 17 | 128 / 16 << 24)
TENSOR_LOOP(tensor_nvfp4, "mxf4nvf4.block_scale.scale_vec::4X [%0], %1, %2, %3, [%5], [%6]", 1 << 7 | 1 << 10 | 128 / 8 << 17 | 128 / 128 << 27)
#endif
