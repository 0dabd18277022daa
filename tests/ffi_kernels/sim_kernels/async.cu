// Asynchronous copies, mbarriers, clusters and distributed shared memory.
#include <cstdint>

struct Ints { const int* a; int* d; int n; };
__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory"); }
__device__ void wait(uint64_t* bar, int parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(shared_address(bar)), "r"(parity) : "memory");
}
__device__ void expect(uint64_t* bar, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory"); }
__device__ void arrive(uint64_t* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory"); }

// A ring of three stages filled by cp.async; the tail is filled with zeros (source size).
extern "C" __global__ void ring(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[3][128];
  const int t = threadIdx.x, tiles = (p.n + 127) / 128;
  const auto fetch = [&](int tile) {
    const int left = p.n - tile * 128 - 4 * t, bytes = left >= 4 ? 16 : left > 0 ? 4 * left : 0;
    const int* from = p.a + (bytes ? tile * 128 + 4 * t : 0);
    if (tile < tiles) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&s[tile % 3][4 * t])), "l"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 2);
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    __syncthreads();
    for (int k = 0; k < 4; ++k) p.d[tile * 128 + 32 * k + t] = s[tile % 3][(32 * k + t) ^ 1] + 1;
    __syncthreads();
  }
}

// A warp-specialised pipeline of bulk copies: full and empty mbarriers, two stages.
extern "C" __global__ void pipeline(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[2][256];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) for (int k = 0; k < 2; ++k) { init(&full[k], 1); init(&empty[k], 2); }
  asm volatile("fence.mbarrier_init.release.cluster;");
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  if (warp == 0) {
    if (lane == 0) for (int k = 0; k < p.n; ++k) {
      if (k >= 2) wait(&empty[k % 2], (k / 2 - 1) & 1);
      expect(&full[k % 2], 1024);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(s[k % 2])), "l"(p.a + 256 * k), "r"(1024),
                   "r"(shared_address(&full[k % 2])) : "memory");
    }
  } else {
    for (int k = 0; k < p.n; ++k) {
      wait(&full[k % 2], (k / 2) & 1);
      for (int i = (warp - 1) * 32 + lane; i < 256; i += 64) p.d[256 * k + i] = s[k % 2][255 - i];
      __syncwarp();
      if (lane == 0) arrive(&empty[k % 2]);
    }
  }
}

// Results leave through shared memory by a bulk copy, and a bulk reduction.
extern "C" __global__ void bulk_out(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[256];
  s[threadIdx.x] = p.a[blockIdx.x * 256 + threadIdx.x] * 5;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(p.d + 256 * blockIdx.x), "r"(shared_address(s)), "r"(1024) : "memory");
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(p.d + p.n), "r"(shared_address(s)), "r"(1024) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

// cp.async arrives on an mbarrier, with and without noinc; states instead of parities.
extern "C" __global__ void arrive_later(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[64];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) init(&bar, 64);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(&s[threadIdx.x])), "l"(p.a + threadIdx.x) : "memory");
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)) : "memory");
  uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(&bar)) : "memory");
  int done = 0;
  while (!done) asm volatile("{ .reg .pred q; mbarrier.test_wait.shared::cta.b64 q, [%1], %2; selp.b32 %0, 1, 0, q; }" : "=r"(done) : "r"(shared_address(&bar)), "l"(state) : "memory");
  const int first = s[63 - threadIdx.x];
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(&s[threadIdx.x])), "l"(p.a + 64 + threadIdx.x) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&bar)) : "memory");
  wait(&bar, 1);
  p.d[threadIdx.x] = first + 1000 * s[63 - threadIdx.x];
}

__device__ uint32_t remote(const void* local, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(shared_address(local)), "r"(rank));
  return out;
}
__device__ uint32_t cluster_rank() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ uint32_t cluster_size() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Every CTA reads its neighbours' shared memory, adds atomically to the first one, and stores to the next one.
extern "C" __global__ void neighbours(const __grid_constant__ Ints p) {
  __shared__ int s[32], sum[32], box[32];
  const uint32_t rank = cluster_rank(), size = cluster_size();
  s[threadIdx.x] = p.a[blockIdx.x * 32 + threadIdx.x];
  sum[threadIdx.x] = 0;
  cluster_sync();
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(remote(&s[threadIdx.x], (rank + 1) % size)) : "memory");
  asm volatile("red.relaxed.cluster.shared::cluster.add.s32 [%0], %1;" ::"r"(remote(&sum[threadIdx.x], 0)), "r"(s[threadIdx.x]) : "memory");
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(remote(&box[threadIdx.x], (rank + 1) % size)), "r"(int(rank)) : "memory");
  cluster_sync();
  p.d[blockIdx.x * 32 + threadIdx.x] = v + 100 * (rank == 0 ? sum[threadIdx.x] : 0) + 100000 * box[threadIdx.x];
}

// st.async to the next CTA, a multicast bulk copy from the first one, remote arrivals.
extern "C" __global__ void remote_async(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int box[32], tile[64];
  __shared__ uint64_t bar, wide, ready;
  const uint32_t rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) { init(&bar, 1); init(&wide, 1); init(&ready, size); }
  asm volatile("fence.mbarrier_init.release.cluster;");
  __syncthreads();
  if (threadIdx.x == 0) { expect(&bar, 128); expect(&wide, 256); }
  cluster_sync();
  const uint32_t next = (rank + 1) % size;
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote(&box[threadIdx.x], next)), "r"(p.a[blockIdx.x * 32 + threadIdx.x]),
               "r"(remote(&bar, next)) : "memory");
  if (threadIdx.x == 0) asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote(&ready, 0)) : "memory");
  if (rank == 0 && threadIdx.x == 0) {
    wait(&ready, 0);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(tile)), "l"(p.a), "r"(256),
                 "r"(shared_address(&wide)), "h"(uint16_t((1u << size) - 1)) : "memory");
  }
  wait(&bar, 0);
  wait(&wide, 0);
  p.d[blockIdx.x * 32 + threadIdx.x] = box[threadIdx.x] + 1000 * tile[63 - threadIdx.x];
  cluster_sync();
}

// Faults.
extern "C" __global__ void arrive_too_often(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) init(&bar, 2);
  __syncthreads();
  if (threadIdx.x < 3) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 2;" ::"r"(shared_address(&bar) + 8 * p.n) : "memory");
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 3;" ::"r"(shared_address(&bar)) : "memory");
}
extern "C" __global__ void never_completes(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) { init(&bar, 1); expect(&bar, 64); }
  __syncthreads();
  wait(&bar, 0);
  p.d[threadIdx.x] = 1;
}
extern "C" __global__ void overwritten(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) { init(&bar, 1); reinterpret_cast<volatile uint64_t&>(bar) = p.n; arrive(&bar); }
}
extern "C" __global__ void bulk_misaligned(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[64];
  __shared__ uint64_t bar;
  if (threadIdx.x) return;
  init(&bar, 1);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(s)), "l"(p.a + p.n), "r"(64), "r"(shared_address(&bar)) : "memory");
}
extern "C" __global__ void foreign_memory(const __grid_constant__ Ints p) {
  __shared__ int s[32];
  s[threadIdx.x] = 1;
  cluster_sync();
  int v;
  asm volatile("ld.shared::cta.s32 %0, [%1];" : "=r"(v) : "r"(remote(&s[threadIdx.x], 1 - cluster_rank())) : "memory");
  p.d[threadIdx.x] = v;
}
