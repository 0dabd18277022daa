// tcgen05: one tile per CTA or pair. The host lays the operands out; four warps copy them to shared memory, one thread
// multiplies, four warps read tensor memory.
#include "shared.h"

struct Tile {
  const uint8_t* a; const uint8_t* b; const uint8_t* scales;  // per CTA: operands of all k steps, scale factor tiles of 512 bytes
  uint32_t* d;                                                 // [cta][128 lanes][columns]
  int a_bytes, b_bytes, steps, a_step, b_step, scale_tiles_a, scale_tiles_b, columns, leading, stride, swizzle;
  uint32_t idesc;
  int defect;
};
__device__ uint64_t descriptor(uint32_t start, const Tile& p) {
  const uint64_t mode = p.swizzle == 128 ? 2 : p.swizzle == 64 ? 4 : p.swizzle == 32 ? 6 : 0;
  return uint64_t(start & 0x3FFFF) >> 4 | uint64_t(p.leading >> 4) << 16 | uint64_t(p.stride >> 4) << 32 | uint64_t(1) << 46 | mode << 61;
}
__device__ uint64_t scale_descriptor(uint32_t start) { return uint64_t(start & 0x3FFFF) >> 4 | uint64_t(1) << 16 | uint64_t(8) << 32 | uint64_t(1) << 46; }
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#define GROUP1 "cta_group::1"
#define GROUP2 "cta_group::2"
#define PLAIN(group, kind)                                                                                                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma." group ".kind::" kind " [%0], %1, %2, %3, p; }" ::"r"(d), "l"(a), "l"(b), "r"(p.idesc), "r"(add))
#define SCALED(group, kind, vec)                                                                                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0; tcgen05.mma." group ".kind::" kind ".block_scale.scale_vec::" vec " [%0], %1, %2, %3, [%4], [%5], p; }" ::"r"(d), "l"(a), \
               "l"(b), "r"(p.idesc), "r"(sa), "r"(sb), "r"(add))

// Rows of A [rows][32 bytes of each step] from shared memory to columns `to` of tensor memory, again in every `rows` lanes.
__device__ void to_tensor(const uint8_t* s, const Tile& p, int rows, uint32_t to) {
  const int row = threadIdx.x % rows;
  for (int k = 0; k < p.steps; ++k) {
    uint32_t v[8];
    for (int w = 0; w < 8; ++w) v[w] = *reinterpret_cast<const uint32_t*>(s + k * p.a_step + row / 8 * 128 + row % 8 * 16 + w % 4 * 4 + w / 4 * p.leading);
    asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};" ::"r"(to + 8 * k + (threadIdx.x / 32 * 32 << 16)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(v[4]),
                 "r"(v[5]), "r"(v[6]), "r"(v[7]) : "memory");
  }
  asm volatile("tcgen05.wait::st.sync.aligned;\n tcgen05.fence::before_thread_sync;" ::: "memory");
  __syncthreads();
  asm volatile("tcgen05.fence::after_thread_sync;");
}

template <int Kind, int Group> __device__ void tile(const Tile& p) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ uint64_t done;
  __shared__ uint32_t tensor;
  uint32_t rank = 0;
  if (Group == 2) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int t = threadIdx.x, cta = blockIdx.x, scale_bytes = 512 * p.steps * (p.scale_tiles_a + p.scale_tiles_b);
  uint8_t *sb = s + p.a_bytes, *ss = sb + p.b_bytes;
  for (int i = t; i < p.a_bytes; i += 128) s[i] = p.a[int64_t(cta) * p.a_bytes + i];
  for (int i = t; i < p.b_bytes; i += 128) sb[i] = p.b[int64_t(cta) * p.b_bytes + i];
  for (int i = t; i < scale_bytes; i += 128) ss[i] = p.scales[int64_t(cta) * scale_bytes + i];
  if (t == 0) {
    init(&done, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (t < 32) {
    if (Group == 1) asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 512;" ::"r"(at(&tensor)) : "memory");
    else asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], 512;" ::"r"(at(&tensor)) : "memory");
  }
  if (p.defect != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("tcgen05.fence::before_thread_sync;");
  __syncthreads();
  if (Group == 2) cluster_sync();
  asm volatile("tcgen05.fence::after_thread_sync;");
  const uint32_t d = tensor, sa0 = d + 256, sb0 = d + 384;
  if (Kind == 5) to_tensor(s, p, (p.idesc >> 24 & 31) * 16, sa0);
  if (t == 0 && rank == 0) {
    for (int k = 0; k < p.steps; ++k) {
      const uint32_t sa = sa0 + (k % 2) * 16, sb_ = sb0 + (k % 2) * 16, sb = sb_;
      const uint32_t tiles = at(ss) + 512 * k * (p.scale_tiles_a + p.scale_tiles_b);
      for (int i = 0; i < p.scale_tiles_a + p.scale_tiles_b; ++i) {
        const uint32_t to = i < p.scale_tiles_a ? sa + 4 * i : sb + 4 * (i - p.scale_tiles_a);
        if (p.defect == 2 && i > 0) continue;
        if (Group == 1) asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(scale_descriptor(tiles + 512 * i)));
        else asm volatile("tcgen05.cp.cta_group::2.32x128b.warpx4 [%0], %1;" ::"r"(to), "l"(scale_descriptor(tiles + 512 * i)));
      }
      const uint64_t a = descriptor(at(s) + k * p.a_step, p), b = descriptor(at(s) + p.a_bytes + k * p.b_step, p);
      const int add = k > 0;
      if (Kind == 0 && Group == 1) PLAIN(GROUP1, "f16");
      if (Kind == 0 && Group == 2) PLAIN(GROUP2, "f16");
      if (Kind == 1 && Group == 1) PLAIN(GROUP1, "f8f6f4");
      if (Kind == 4) asm volatile("{ .reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.ws.cta_group::1.kind::f16.collector::b1::discard [%0], %1, %2, %3, p, 0; }" ::"r"(d), "l"(a), "l"(b), "r"(p.idesc), "r"(add));
      if (Kind == 5) asm volatile("{ .reg .pred p; setp.ne.b32 p, %4, 0; tcgen05.mma.ws.cta_group::1.kind::f16 [%0], [%1], %2, %3, p; }" ::"r"(d), "r"(sa0 + 8 * k), "l"(b), "r"(p.idesc), "r"(add));
      if (Kind == 2 && Group == 1) SCALED(GROUP1, "mxf4nvf4", "4X");
      if (Kind == 2 && Group == 2) SCALED(GROUP2, "mxf4nvf4", "4X");
      if (Kind == 3 && Group == 1) SCALED(GROUP1, "mxf8f6f4", "1X");
    }
    if (Group == 1 && p.defect != 3) asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(at(&done)) : "memory");
    if (Group == 2) asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(at(&done)), "h"(uint16_t(3)) : "memory");
  }
  __syncwarp();
  if (p.defect != 4) wait(&done, 0);
  asm volatile("tcgen05.fence::after_thread_sync;");
  const uint32_t lane = (t / 32 * 32) << 16;
  for (int c = 0; c < p.columns; c += 8) {
    uint32_t v[8];
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7])
                 : "r"((p.defect == 5 ? 0 : lane) + d + c));
    if (p.defect != 7) asm volatile("tcgen05.wait::ld.sync.aligned;");
    for (int i = 0; i < 8; ++i) p.d[(cta * 128 + t) * p.columns + c + i] = v[i];
  }
  asm volatile("tcgen05.fence::before_thread_sync;");
  __syncthreads();
  if (Group == 2) cluster_sync();
  if (t < 32 && p.defect != 6) {
    if (Group == 1) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 512;\n tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::"r"(d));
    else asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, 512;\n tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;" ::"r"(d));
  }
}
extern "C" __global__ void __launch_bounds__(128) tile_bf16(const __grid_constant__ Tile p) { tile<0, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_bf16_pair(const __grid_constant__ Tile p) { tile<0, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_fp8(const __grid_constant__ Tile p) { tile<1, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_nvfp4(const __grid_constant__ Tile p) { tile<2, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_nvfp4_pair(const __grid_constant__ Tile p) { tile<2, 2>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_mxfp8(const __grid_constant__ Tile p) { tile<3, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_bf16_ws(const __grid_constant__ Tile p) { tile<4, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_bf16_ws_ts(const __grid_constant__ Tile p) { tile<5, 1>(p); }
