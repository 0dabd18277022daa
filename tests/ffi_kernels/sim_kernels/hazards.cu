// One kernel per construct, with the defect that p.n selects (0: none). Every defect must be found under every schedule.
#include "shared.h"

struct Ints { const int* a; int* d; int n; };
__device__ void arrive(uint64_t* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at(bar)) : "memory"); }
__device__ void load(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(to)), "l"(from), "r"(bytes), "r"(at(bar)) : "memory");
}
__device__ uint32_t remote(const void* local, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(at(local)), "r"(rank));
  return out;
}
__device__ void cluster_sync() { asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Reduction over warps. 1: no barrier before the read; 2: none before the reuse.
extern "C" __global__ void reduce(const __grid_constant__ Ints p) {
  __shared__ int s[8];
  int total = 0;
  for (int k = 0; k < 2; ++k) {
    const int v = __reduce_add_sync(~0u, p.a[k * blockDim.x + threadIdx.x]);
    if ((threadIdx.x & 31) == 0) s[threadIdx.x / 32] = v;
    if (p.n != 1) __syncthreads();
    for (int w = 0; w < int(blockDim.x) / 32; ++w) total += s[w];
    if (p.n != 2) __syncthreads();
  }
  p.d[threadIdx.x] = total;
}
// Exchange within a warp. 1: no __syncwarp before the read; 2: none before the next write.
extern "C" __global__ void exchange(const __grid_constant__ Ints p) {
  __shared__ int s[64];
  int* mine = s + (threadIdx.x & 32);
  int v = p.a[threadIdx.x];
  for (int k = 0; k < 3; ++k) {
    mine[threadIdx.x & 31] = v;
    if (p.n != 1) __syncwarp();
    v = mine[(threadIdx.x + 1) & 31];
    if (p.n != 2) __syncwarp();
  }
  p.d[threadIdx.x] = v;
}
// Lanes that share a word, each with a half of its own. 1: reads the half of a lane of another word without __syncwarp.
extern "C" __global__ void halves(const __grid_constant__ Ints p) {
  __shared__ short s[64];
  volatile int skip = p.n == 1 ? 2 : 0;
  for (int k = 0; k < 3; ++k) {
    s[threadIdx.x] = short(p.a[threadIdx.x] + k);
    p.d[64 * k + threadIdx.x] = s[threadIdx.x ^ skip];
  }
}
// cp.async. 1: no wait; 2: waits for one group too few; 3: no barrier after the wait.
extern "C" __global__ void copies(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[2][256];
  for (int k = 0; k < 2; ++k) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at(&s[k][4 * threadIdx.x])), "l"(p.a + 256 * k + 4 * threadIdx.x) : "memory");
    asm volatile("cp.async.commit_group;");
  }
  if (p.n == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else if (p.n != 1) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (p.n != 3) __syncthreads();
  for (int i = threadIdx.x; i < 512; i += 64) p.d[i] = s[1 - i / 256][i % 256 ^ 128];
}
// cp.async within a warp. 1: no __syncwarp after the wait; 2: none before the next copies.
extern "C" __global__ void warp_copies(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[128];
  for (int k = 0; k < 3; ++k) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at(&s[4 * threadIdx.x])), "l"(p.a + 128 * k + 4 * threadIdx.x) : "memory");
    asm volatile("cp.async.commit_group;\n cp.async.wait_group 0;" ::: "memory");
    if (p.n != 1) __syncwarp();
    for (int i = 0; i < 4; ++i) p.d[128 * k + 32 * i + threadIdx.x] = s[(32 * i + threadIdx.x) ^ 5];
    if (p.n != 2) __syncwarp();
  }
}
// A warp writes, another one reads, behind an mbarrier. 1: no __syncwarp before one lane arrives; 2: one lane waits for all
// without __syncwarp; 3: half of the lanes arrive; 4: no __syncwarp between the reads and the arrival that frees the place.
extern "C" __global__ void handoff(const __grid_constant__ Ints p) {
  __shared__ int s[32];
  __shared__ uint64_t full, empty;
  if (threadIdx.x == 0) {
    init(&full, p.n == 3 ? 16 : 1);
    init(&empty, 1);
  }
  __syncthreads();
  const int lane = threadIdx.x & 31;
  for (int k = 0; k < 3; ++k) {
    if (threadIdx.x < 32) {
      if (k) wait(&empty, (k - 1) & 1);
      s[lane] = p.a[32 * k + lane];
      if (p.n != 1 && p.n != 3) __syncwarp();
      if (lane < (p.n == 3 ? 16 : 1)) arrive(&full);
    } else {
      if (p.n != 2 || lane == 0) wait(&full, k & 1);
      p.d[32 * k + lane] = s[31 - lane];
      if (p.n != 4) __syncwarp();
      if (lane == 0) arrive(&empty);
    }
  }
}
// Bulk loads into two stages. 1: no init fence; 2: no barrier after init; 3: waits for no phase before the second use; 4: the
// consumer does not wait; 5: consumer's arrival comes before its read; 6: expects too few bytes; 7: wrong parity; 8: no
// __syncwarp before the arrival.
extern "C" __global__ void stages(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[2][64];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) { init(&full[k], 1); init(&empty[k], 1); }
    if (p.n != 1) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (p.n != 2) __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 0; k < 6; ++k) {
      if (k >= 2 && p.n != 3) wait(&empty[k % 2], p.n == 7 ? (k / 2) & 1 : (k / 2 - 1) & 1);
      expect(&full[k % 2], p.n == 6 ? 128 : 256);
      load(s[k % 2], p.a + 64 * k, 256, &full[k % 2]);
    }
  } else if (threadIdx.x >= 32) {
    const int lane = threadIdx.x & 31;
    for (int k = 0; k < 6; ++k) {
      if (p.n != 4) wait(&full[k % 2], (k / 2) & 1);
      if (p.n == 5 && lane == 0) arrive(&empty[k % 2]);
      p.d[64 * k + lane] = s[k % 2][63 - lane];
      p.d[64 * k + 32 + lane] = s[k % 2][31 - lane];
      if (p.n != 8) __syncwarp();
      if (p.n != 5 && lane == 0) arrive(&empty[k % 2]);
    }
  }
}
// Bulk store. 1: no proxy fence; 2: no barrier before the store; 3: no wait before the reuse; 4: no wait before the end.
extern "C" __global__ void stores(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[128];
  for (int k = 0; k < 2; ++k) {
    s[threadIdx.x] = p.a[128 * k + threadIdx.x] + 1;
    if (p.n != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (p.n != 2) __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(p.d + 128 * k), "r"(at(s)), "r"(512) : "memory");
      asm volatile("cp.async.bulk.commit_group;");
      if ((p.n != 3 || k == 1) && (p.n != 4 || k == 0)) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    __syncthreads();
  }
}
// Distributed shared memory. 1: no barrier at the start; 2: none between write and read; 3: none before the end.
extern "C" __global__ void peers(const __grid_constant__ Ints p) {
  __shared__ int s[32];
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (p.n != 1) cluster_sync();
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(remote(&s[threadIdx.x], rank ^ 1)), "r"(p.a[blockIdx.x * 32 + threadIdx.x]) : "memory");
  if (p.n != 2) cluster_sync();
  int v;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(remote(&s[31 - threadIdx.x], p.n >= 2 ? rank ^ 1 : rank)) : "memory");
  p.d[blockIdx.x * 32 + threadIdx.x] = v;
  if (p.n != 3) cluster_sync();
}
// Arrivals at the other CTA's mbarrier. 1: a CTA does not wait for those at its own before it ends; 2: no barrier of the cluster at the start.
extern "C" __global__ void arrivals(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    init(&bar, 32);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  if (p.n != 2) cluster_sync();
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote(&bar, rank ^ 1)) : "memory");
  if (p.n != 1) wait(&bar, 0);
  p.d[blockIdx.x * 32 + threadIdx.x] = p.a[blockIdx.x * 32 + threadIdx.x];
}
// A flag in shared memory. 1: no fence by the writer; 2: none by the reader.
extern "C" __global__ void flag(const __grid_constant__ Ints p) {
  __shared__ int value[32];
  __shared__ int ready;
  if (threadIdx.x == 0) ready = 0;
  __syncthreads();
  const int lane = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    value[lane] = p.a[lane];
    __syncwarp();
    if (p.n != 1) __threadfence_block();
    if (lane == 0) atomicExch(&ready, 1);
  } else {
    if (lane == 0) while (atomicAdd(&ready, 0) == 0) {}
    __syncwarp();
    if (p.n != 2) __threadfence_block();
    p.d[lane] = value[31 - lane];
  }
}
// Between CTAs, through global memory: each writes its row, the last one to arrive sums all. 1: no fence before the ticket;
// 2: rows overlap by an element; 3: nobody waits for anybody.
extern "C" __global__ void handover(const __grid_constant__ Ints p) {
  __shared__ bool last;
  int* rows = p.d + 2;
  for (int i = threadIdx.x; i < 64 + (p.n == 2); i += 32) rows[64 * blockIdx.x + i] = p.a[64 * blockIdx.x + i] + int(blockIdx.x);
  if (p.n != 1) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = p.n == 3 ? blockIdx.x == gridDim.x - 1 : atomicAdd(p.d, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
  int sum = 0;
  for (int i = threadIdx.x; i < 64 * int(gridDim.x); i += 32) sum += rows[i];
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x == 0) p.d[1] = sum;
}
// What devices are known to do though the ISA does not promise it (strict=off). 1: a relaxed arrival at the cluster barrier
// orders shared memory; 2: a member mask names lanes that have exited; 3: the lowest lane is elected; 4: a bulk store is in
// flight at the end; 5: lanes that run together see each other's stores; 6: one lane's bulk store sees them too.
extern "C" __global__ void habits(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[64];
  if (p.n == 2 && threadIdx.x >= 20) return;
  s[threadIdx.x] = p.a[threadIdx.x];
  if (p.n == 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
  else if (p.n < 5) __syncwarp();
  int elected = 0, leads = 0;
  if (p.n == 3) asm volatile("{ .reg .pred p; elect.sync %0|p, -1; selp.b32 %1, 1, 0, p; }" : "=r"(elected), "=r"(leads));
  if (p.n != 4 && p.n != 6) {
    p.d[threadIdx.x] = p.n == 3 ? elected : s[threadIdx.x ^ (p.n == 1 ? 32 : p.n == 5 ? 1 : 0)];
    return;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (p.n == 4) __syncwarp();
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;\n cp.async.bulk.commit_group;" ::"l"(p.d), "r"(at(s)) : "memory");
}
