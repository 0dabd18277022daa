// A GEMM of tensor copies and wgmma. Operands arrive in the swizzled layouts that descriptors name.
#include <cstdint>

struct alignas(64) Map { uint64_t opaque[16]; };
__device__ uint32_t at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(count) : "memory"); }
__device__ void wait(uint64_t* bar, int parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(at(bar)), "r"(parity) : "memory");
}
__device__ void expect(uint64_t* bar, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(bar)), "r"(bytes) : "memory"); }
__device__ void arrive(uint64_t* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at(bar)) : "memory"); }
__device__ void load(void* to, const Map* map, int x, int y, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(at(to)), "l"(map), "r"(x), "r"(y), "r"(at(bar)) : "memory");
}

struct Box { Map from, to; uint8_t* seen; int x, y, z, bytes; };
// CTA 0 copies a box to its own shared memory and lets CTA 1's mbarrier count the bytes: that takes .cta_group::2, which sm_90 lacks.
extern "C" __global__ void foreign(const __grid_constant__ Box p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  __shared__ uint64_t bar;
  uint32_t rank, other;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    init(&bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
  asm volatile("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(other) : "r"(at(&bar)));
  if (rank == 1 && threadIdx.x == 0) expect(&bar, p.bytes);
  if (rank == 0 && threadIdx.x == 0)
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(at(dynamic)), "l"(&p.from), "r"(p.x), "r"(p.y),
                 "r"(p.z), "r"(other) : "memory");
  if (rank == 1) wait(&bar, 0);
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// d[m][n] (f32) = a[m][k] b[n][k]: a warp that loads, a warpgroup that multiplies; tiles of 64 x N x (rows of SW bytes).
template <int N, int Kind> __device__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {
  static_assert(N == 32);
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA(shape, tail)                                                                                                    \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned." shape                                   \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p" tail "; }"                             \
               : D4(0), D4(4), D4(8), D4(12) : "l"(a), "l"(b), "r"(add))
  if (Kind == 0) WGMMA("m64n32k16.f32.bf16.bf16", ", 1, 1, 0, 0");
  if (Kind == 1) WGMMA("m64n32k16.f32.f16.f16", ", 1, -1, 0, 0");
  if (Kind == 2) WGMMA("m64n32k8.f32.tf32.tf32", ", 1, 1");
  if (Kind == 3) WGMMA("m64n32k32.f32.e4m3.e4m3", ", 1, 1");
}
__device__ uint64_t descriptor(uint32_t start, int leading, int stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t(start & 0x3FFFF) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | mode << 62;
}

struct Gemm { Map a, b; float* d; int m, n, k, element, swizzle, defect; };
constexpr int kStages = 2;
template <int Kind> __device__ void gemm(const Gemm& p, const Map* map_a, const Map* map_b) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  uint8_t* s = dynamic + (1024 - (at(dynamic) & 1023)) % 1024;  // the launch asks for 1024 bytes more
  __shared__ uint64_t full[kStages], empty[kStages];
  const int row_bytes = p.swizzle, per_row = row_bytes / p.element, steps = (p.k + per_row - 1) / per_row;
  const int tiles_n = (p.n + 31) / 32, tiles = (p.m + 63) / 64 * tiles_n, stage_bytes = 96 * 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) { init(&full[i], 1); init(&empty[i], 4); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;  // uniform, as the compiler must see for wgmma
  int count = 0;
  if (warp == 4) {
    if (lane == 0) for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      for (int k = 0; k < steps; ++k, ++count) {
        const int stage = count % kStages;
        uint8_t* to = s + stage * stage_bytes;
        if (count >= kStages && p.defect != 1) wait(&empty[stage], (count / kStages - 1) & 1);
        expect(&full[stage], 96 * row_bytes);
        load(to, map_a, k * per_row, tile / tiles_n * 64, &full[stage]);
        load(to + 64 * 128, map_b, k * per_row, tile % tiles_n * 32 + (p.defect == 2), &full[stage]);
      }
    }
    return;
  }
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float d[16] = {};
    for (int k = 0; k < steps; ++k, ++count) {
      const int stage = count % kStages;
      if (p.defect != 3) wait(&full[stage], (count / kStages) & 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      for (int i = 0; i < row_bytes / 32; ++i) {
        const uint32_t a = at(s + stage * stage_bytes) + 32 * i, b = a + 64 * 128;
        multiply<32, Kind>(d, descriptor(a, 16, 8 * row_bytes, p.swizzle), descriptor(b, 16, (p.defect == 4 ? 4 : 8) * row_bytes, p.swizzle), k + i > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (p.defect != 5) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) arrive(&empty[stage]);
    }
    if (p.defect == 5) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(d[i])::"memory");  // read after the wait, not before
    for (int i = 0; i < 16; ++i) {
      const int row = tile / tiles_n * 64 + 16 * warp + lane / 4 + 8 * (i / 2 & 1), col = tile % tiles_n * 32 + i / 4 * 8 + lane % 4 * 2 + (i & 1);
      if (row < p.m && col < p.n) p.d[row * p.n + col] = d[i];
    }
  }
}
extern "C" __global__ void __launch_bounds__(160) gemm_bf16(const __grid_constant__ Gemm p) { gemm<0>(p, &p.a, &p.b); }
extern "C" __global__ void __launch_bounds__(160) gemm_f16(const __grid_constant__ Gemm p) { gemm<1>(p, &p.a, &p.b); }
extern "C" __global__ void __launch_bounds__(160) gemm_tf32(const __grid_constant__ Gemm p) { gemm<2>(p, &p.a, &p.b); }
extern "C" __global__ void __launch_bounds__(160) gemm_e4m3(const __grid_constant__ Gemm p) { gemm<3>(p, &p.a, &p.b); }
