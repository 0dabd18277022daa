// What came with sm_100: clusters that take over others' work, packed 4-bit tensors, a ring of stages that commits of
// tcgen05 free, lanes of an accumulator left out, pairs of CTAs.
#include "shared.h"

__device__ void fetch(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(to)), "l"(from), "r"(bytes), "r"(at(bar)) : "memory");
}
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Work is taken from clusters that have not started: each cluster marks its tile, one per CTA, until none is left.
// 1: asks again after the last answer; 2: reads the answer without waiting; 3: the CTA of an answer that was none.
struct Steal { int* owner; int* tiles; int defect; };
extern "C" __global__ void __launch_bounds__(32) steal(const __grid_constant__ Steal p) {
  __shared__ __align__(16) uint4 answer;
  __shared__ uint64_t bar;
  uint32_t rank, x = blockIdx.x, y = blockIdx.y;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int own = 1 + blockIdx.x - rank + blockIdx.y * gridDim.x;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  for (int round = 0;; ++round) {
    if (threadIdx.x == 0) {
      p.owner[y * gridDim.x + x] = own;
      atomicAdd(p.tiles, 1);
      expect(&bar, 16);
    }
    cluster_sync();
    if (threadIdx.x == 0 && rank == 0) {
      asm volatile("clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster::all.b128 [%0], [%1];" ::"r"(at(&answer)), "r"(at(&bar)) : "memory");
    }
    if (p.defect != 2) wait(&bar, round & 1);
    uint32_t more, first, row, unused;
    asm volatile(
        "{ .reg .pred p; .reg .b128 a; ld.shared.b128 a, [%4]; clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 p, a; selp.u32 %0, 1, 0, p; mov.u32 %1, 0; mov.u32 %2, 0;"
        " mov.u32 %3, 0; @p clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%1, %2, %3, _}, a; @p clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 %2, a; }"
        : "=r"(more), "=r"(first), "=r"(row), "=r"(unused) : "r"(at(&answer)) : "memory");
    if (p.defect == 3 && !more) {
      asm volatile("{ .reg .b128 a; ld.shared.b128 a, [%1]; clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %0, a; }" : "=r"(first) : "r"(at(&answer)) : "memory");
      p.tiles[0] = first;
    }
    if (!more && p.defect == 1 && rank == 0 && threadIdx.x == 0) {
      asm volatile("clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%0], [%1];" ::"r"(at(&answer)), "r"(at(&bar)) : "memory");
    }
    if (!more) break;
    x = first + rank;
    y = row;
    cluster_sync();
  }
  cluster_sync();
}

// A box of a packed tensor as it lies in shared memory.
struct Packed { Map from; uint8_t* seen; int x, y, moved, held; };
extern "C" __global__ void packed(const __grid_constant__ Packed p) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect(&bar, p.moved);
    asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(at(s)), "l"(&p.from), "r"(p.x), "r"(p.y), "r"(at(&bar)) : "memory");
  }
  __syncthreads();
  wait(&bar, 0);
  for (int i = threadIdx.x; i < p.held; i += 32) p.seen[i] = s[i];
}

// D [128][N] += A_r B_r^T over rounds of 16 columns of k in bf16, one warp fetching, one thread multiplying, one stage.
// Each round halves what was summed before it, and writes lanes 8-23 and 64-95 in the first round alone.
// 1: the stage is filled again without waiting for the products. 2 is right: two warps store B in turn, where it was copied;
// that the other one's stores are over they know through the products alone.
constexpr int kN = 32;
struct Ring { const uint8_t* a; const uint8_t* b; float* d; int rounds, defect; };
extern "C" __global__ void __launch_bounds__(128) ring(const __grid_constant__ Ring p) {
  __shared__ __align__(128) uint8_t sa[128 * 32], sb[kN * 32];
  __shared__ uint64_t full, empty, done;
  __shared__ uint32_t tensor;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    init(&full, p.defect == 2 ? 2 : 1);
    init(&empty, 1);
    init(&done, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (warp == 2) asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 32;" ::"r"(at(&tensor)) : "memory");
  __syncthreads();
  const uint32_t d = tensor;
  if (threadIdx.x == 0) {
    for (int r = 0; r < p.rounds; ++r) {
      if (r && p.defect != 1) wait(&empty, (r - 1) & 1);
      expect(&full, sizeof sa + (p.defect == 2 ? 0 : sizeof sb));
      fetch(sa, p.a + r * sizeof sa, sizeof sa, &full);
      if (p.defect != 2) fetch(sb, p.b + r * sizeof sb, sizeof sb, &full);
    }
  }
  if (p.defect == 2 && warp >= 2) {
    for (int r = 0; r < p.rounds; ++r) {
      if (r) wait(&empty, (r - 1) & 1);
      if (r % 2 != warp - 2) continue;
      for (int i = threadIdx.x % 32; i < int(sizeof sb); i += 32) sb[i] = p.b[r * sizeof sb + i];
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at(&full)) : "memory");
      __syncwarp();
    }
  }
  if (threadIdx.x == 32) {
    const uint64_t common = uint64_t(1) << 46 | uint64_t(8) << 32;
    const uint64_t a = common | uint64_t(at(sa) & 0x3FFFF) >> 4 | uint64_t(128) << 16, b = common | uint64_t(at(sb) & 0x3FFFF) >> 4 | uint64_t(kN) << 16;
    const uint32_t kind = 1 << 4 | 1 << 7 | 1 << 10 | kN / 8 << 17 | 128 / 16 << 24;
    for (int r = 0; r < p.rounds; ++r) {
      wait(&full, r & 1);
      asm volatile("tcgen05.fence::after_thread_sync;");
      if (r == 0) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, {%4, %4, %4, %4}, p; }" ::"r"(d), "l"(a), "l"(b), "r"(kind), "r"(0) : "memory");
      } else {
        asm volatile("{ .reg .pred p; setp.eq.b32 p, 0, 0; tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, {%4, %5, %6, %5}, p, 1; }" ::"r"(d), "l"(a), "l"(b), "r"(kind), "r"(0x00FFFF00),
                     "r"(0), "r"(0xFFFFFFFF) : "memory");
      }
      asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(at(&empty)) : "memory");
    }
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(at(&done)) : "memory");
  }
  __syncwarp();
  wait(&done, 0);
  asm volatile("tcgen05.fence::after_thread_sync;");
  for (int c = 0; c < kN; c += 2) {
    uint32_t v[2];
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(d + c + (warp * 32 << 16)));
    asm volatile("tcgen05.wait::ld.sync.aligned;");
    for (int i = 0; i < 2; ++i) p.d[threadIdx.x * kN + c + i] = __uint_as_float(v[i]);
  }
  asm volatile("tcgen05.fence::before_thread_sync;");
  __syncthreads();
  if (warp == 2) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 32;" ::"r"(d));
}

// Two pairs of CTAs: one copy to all four signals the odd CTA of each pair; columns that a pair allocates are there for both
// as soon as one of them goes on, so that its copy into the tensor memory of both needs no barrier in between.
// 1: the signal goes to a CTA of another pair. 2 is right: each CTA copies to itself and signals the odd one of its pair.
struct Pairs { Map from; uint32_t* d; int defect; };
extern "C" __global__ void __launch_bounds__(128) pairs(const __grid_constant__ Pairs p) {
  __shared__ __align__(128) uint8_t s[512];
  __shared__ uint64_t full, done;
  __shared__ uint32_t tensor;
  uint32_t rank, signal;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    init(&full, 1);
    init(&done, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (rank & 1) expect(&full, 1024);
  }
  cluster_sync();
  if ((rank == 0 || p.defect == 2) && threadIdx.x == 0) {
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(at(&full)), "r"(p.defect == 1 ? 3 : rank | 1));
    if (p.defect == 2) {
      asm volatile("cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes.cta_group::2 [%0], [%1, {%2}], [%3];" ::"r"(at(s)), "l"(&p.from), "r"(0), "r"(signal) : "memory");
    } else if (p.defect == 1) {
      asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.cta_group::2 [%0], [%1, {%2}], [%3];" ::"r"(at(s)), "l"(&p.from), "r"(0), "r"(signal) : "memory");
    } else {
      asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.cta_group::2 [%0], [%1, {%2}], [%3], %4;" ::"r"(at(s)), "l"(&p.from), "r"(0),
                   "r"(signal), "h"(uint16_t(15)) : "memory");
    }
  }
  if (rank & 1) wait(&full, 0);
  cluster_sync();
  uint32_t d = 0;
  if (threadIdx.x < 32) {
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], 32;" ::"r"(at(&tensor)) : "memory");
    d = tensor;
  }
  __syncthreads();
  if (threadIdx.x >= 32) d = tensor;
  if (threadIdx.x == 0 && rank % 2 == 0) {
    const uint64_t from = uint64_t(1) << 46 | uint64_t(8) << 32 | uint64_t(at(s) & 0x3FFFF) >> 4;
    asm volatile("tcgen05.cp.cta_group::2.32x128b.warpx4 [%0], %1;" ::"r"(d), "l"(from) : "memory");
    asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(at(&done)), "h"(uint16_t(3 << rank)) : "memory");
  }
  __syncwarp();
  wait(&done, 0);
  asm volatile("tcgen05.fence::after_thread_sync;");
  uint32_t v[4];
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(d + (threadIdx.x / 32 * 32 << 16)));
  asm volatile("tcgen05.wait::ld.sync.aligned;");
  for (int i = 0; i < 4; ++i) p.d[(rank * 128 + threadIdx.x) * 4 + i] = v[i];
  asm volatile("tcgen05.fence::before_thread_sync;");
  cluster_sync();
  if (threadIdx.x < 32) asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, 32;" ::"r"(d));
}

// Four rows of a matrix into shared memory, and from there to four rows of another.
struct Rows { Map from, to; uint8_t* seen; int x, rows[4], bytes; };
extern "C" __global__ void rows(const __grid_constant__ Rows p) {
  extern __shared__ __align__(1024) uint8_t s[];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    expect(&bar, p.bytes);
    asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(at(s)), "l"(&p.from), "r"(p.x), "r"(p.rows[0]),
                 "r"(p.rows[1]), "r"(p.rows[2]), "r"(p.rows[3]), "r"(at(&bar)) : "memory");
  }
  __syncthreads();
  wait(&bar, 0);
  for (int i = threadIdx.x; i < p.bytes; i += 32) p.seen[i] = s[i];
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&p.to), "r"(at(s)), "r"(p.x), "r"(p.rows[3]), "r"(p.rows[2]),
                 "r"(p.rows[1]), "r"(p.rows[0]) : "memory");
    asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
