// Clusters: shared memory of other CTAs by loads, stores, atomics, asynchronous stores, reductions and bulk copies; barriers there.
#include <cstdint>

struct Ints { const int* a; int* d; int n; };
__device__ uint32_t at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ uint32_t remote(const void* local, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(at(local)), "r"(rank));
  return out;
}
__device__ uint32_t rank_of_cta() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ uint32_t size_of_cluster() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
__device__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void init(uint64_t* bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(count) : "memory"); }
__device__ void wait(uint64_t* bar, int parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(at(bar)), "r"(parity) : "memory");
}
__device__ void expect(uint64_t* bar, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(bar)), "r"(bytes) : "memory"); }

// Each CTA works on the memory of the next one: atomics that give what was there, vectors, bytes, generic addresses.
extern "C" __global__ void dsmem(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[8][32];
  const uint32_t rank = rank_of_cta(), next = (rank + 1) % size_of_cluster(), t = threadIdx.x;
  const int* a = p.a + 256 * blockIdx.x;
  int* d = p.d + 512 * blockIdx.x;
  for (int i = 0; i < 8; ++i) s[i][t] = a[32 * i + t];
  cluster_sync();
  int r[14];
#define ATOM(i, op) asm volatile("atom.relaxed.cluster.shared::cluster." op " %0, [%1], %2;" : "=r"(r[i]) : "r"(remote(&s[i][t], next)), "r"(a[t]) : "memory");
  ATOM(0, "add.s32") ATOM(1, "min.s32") ATOM(2, "max.u32") ATOM(3, "exch.b32") ATOM(4, "xor.b32") ATOM(5, "inc.u32")
  asm volatile("atom.acq_rel.cluster.shared::cluster.cas.b32 %0, [%1], %2, 77;" : "=r"(r[6]) : "r"(remote(&s[6][t], next)), "r"(a[32 * 6 + t]) : "memory");
  cluster_sync();
  uint64_t generic;
  asm volatile("{ .reg .b64 g; mapa.u64 %0, %1, %2; }" : "=l"(generic) : "l"(&s[4 * (t & 1)][0]), "r"(next));
  asm volatile("ld.v2.b32 {%0,%1}, [%2+8];" : "=r"(r[7]), "=r"(r[8]) : "l"(generic) : "memory");
  asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]) : "r"(remote(&s[7][t / 4 * 4], next)) : "memory");
  cluster_sync();
  asm volatile("st.shared::cluster.u8 [%0+1], %1;\n st.shared::cluster.u16 [%0+2], %2;" ::"r"(remote(&s[7][t], next)), "r"(a[t]), "h"(uint16_t(a[t] * 3)) : "memory");
  uint32_t owner, other;
  asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(owner) : "r"(remote(&s[0][t], next)));
  asm volatile("getctarank.u64 %0, %1;" : "=r"(other) : "l"(generic));
  asm volatile("{ .reg .pred p, q; .reg .b32 u; isspacep.shared::cta p, %1; isspacep.shared::cluster q, %1; selp.b32 %0, 1, 0, p; selp.b32 u, 2, 0, q; or.b32 %0, %0, u; }" : "=r"(r[13]) : "l"(generic));
  r[13] += 10 * owner + 1000 * other;
  cluster_sync();
  for (int i = 0; i < 14; ++i) d[32 * i + t] = r[i];
  d[32 * 14 + t] = s[0][t] + 3 * s[1][t] + 5 * s[2][t] + 7 * s[3][t] + 11 * s[4][t] + 13 * s[5][t] + 17 * s[6][t];
  d[32 * 15 + t] = s[7][t];
}

// st.async of every width to the next CTA, which waits for all the bytes.
extern "C" __global__ void stores(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[16][32];
  __shared__ uint64_t bar;
  const uint32_t t = threadIdx.x, next = (rank_of_cta() + 1) % size_of_cluster();
  const int* a = p.a + 32 * blockIdx.x;
  if (t == 0) init(&bar, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  for (int i = 0; i < 16; ++i) s[i][t] = 0;
  __syncwarp();
  if (t == 0) expect(&bar, 32 * (4 + 8 + 8 + 16 + 16 + 4));
  cluster_sync();
  const int v = a[t];
  const uint32_t to = remote(&bar, next);
#define PLACE(row, words) "r"(remote(&s[row][0] + (words) * t, next))
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::PLACE(0, 1), "r"(v), "r"(to) : "memory");
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::PLACE(1, 2), "l"((long long)v * 1000003), "r"(to) : "memory");
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.s32 [%0], {%1, %2}, [%3];" ::PLACE(3, 2), "r"(v + 1), "r"(v + 2), "r"(to) : "memory");
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::PLACE(5, 4), "r"(v), "r"(-v), "r"(v ^ 5), "r"(7), "r"(to) : "memory");
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, [%3];" ::PLACE(9, 4), "l"((long long)v << 33), "l"((long long)-v), "r"(to) : "memory");
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::PLACE(13, 1), "f"(v * 0.5f), "r"(to) : "memory");
  wait(&bar, 0);
  for (int i = 0; i < 16; ++i) p.d[512 * blockIdx.x + 32 * i + t] = s[i][t];
  cluster_sync();
}

// red.async of every operation from all CTAs into the first one: the order does not matter.
extern "C" __global__ void reductions(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[12][32];
  __shared__ uint64_t bar;
  const uint32_t t = threadIdx.x, rank = rank_of_cta(), size = size_of_cluster();
  const int v = p.a[32 * blockIdx.x + t];
  if (t == 0) init(&bar, 1);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  for (int i = 0; i < 12; ++i) s[i][t] = 1000 + i;
  __syncwarp();
  if (t == 0) expect(&bar, rank == 0 ? size * 32 * 48 : 0);
  cluster_sync();
  const uint32_t to = remote(&bar, 0);
#define RED(row, op) asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes." op " [%0], %1, [%2];" ::"r"(remote(&s[row][t], 0)), "r"(v), "r"(to) : "memory");
  RED(0, "add.u32") RED(1, "add.s32") RED(2, "min.u32") RED(3, "min.s32") RED(4, "max.u32") RED(5, "max.s32") RED(6, "and.b32") RED(7, "or.b32") RED(8, "xor.b32")
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.inc.u32 [%0], %1, [%2];" ::"r"(remote(&s[9][t], 0)), "r"(100000), "r"(to) : "memory");
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64 [%0], %1, [%2];" ::"r"(remote(&s[10][0] + 2 * t, 0)), "l"((long long)v << 20), "r"(to) : "memory");
  wait(&bar, 0);
  if (rank == 0) for (int i = 0; i < 12; ++i) p.d[384 * (blockIdx.x / size) + 32 * i + t] = s[i][t];
  cluster_sync();
}

// Bulk copies and bulk reductions from shared memory to shared memory of the next CTA.
extern "C" __global__ void bulk(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int from[3][64], to[6][64];
  __shared__ uint64_t bar;
  const uint32_t t = threadIdx.x, next = (rank_of_cta() + 1) % size_of_cluster();
  for (int i = 0; i < 6; ++i) for (int k = t; k < 64; k += 32) { to[i][k] = 50 + i; if (i < 3) from[i][k] = p.a[192 * blockIdx.x + 64 * i + k]; }
  if (t == 0) init(&bar, 1);
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (t == 0) expect(&bar, 6 * 256);
  cluster_sync();
  if (t == 0) {
    const uint32_t signal = remote(&bar, next);
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(remote(to[0], next)), "r"(at(from[0])), "r"(256), "r"(signal) : "memory");
#define REDUCE(row, source, op) asm volatile("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes." op " [%0], [%1], %2, [%3];" \
                                             ::"r"(remote(to[row], next)), "r"(at(from[source])), "r"(256), "r"(signal) : "memory");
    REDUCE(1, 1, "add.u32") REDUCE(2, 2, "min.s32") REDUCE(3, 0, "max.u32") REDUCE(4, 1, "xor.b32") REDUCE(5, 2, "add.u64")
  }
  wait(&bar, 0);
  for (int i = 0; i < 6; ++i) for (int k = t; k < 64; k += 32) p.d[384 * blockIdx.x + 64 * i + k] = to[i][k];
  cluster_sync();
}

// Arrivals with counts and bytes on barriers of the first CTA; relaxed arrivals at the cluster's barrier with a fence.
extern "C" __global__ void arrivals(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  __shared__ int s[64];
  const uint32_t t = threadIdx.x, rank = rank_of_cta(), size = size_of_cluster();
  if (t == 0) init(&bar, 3 * size);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait;" ::: "memory");
  const int v = p.a[32 * blockIdx.x + t];
  const uint32_t there = remote(&bar, 0);
  if (t == 0) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], 2;" ::"r"(there) : "memory");
    asm volatile("mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(there), "r"(128) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(there), "r"(0) : "memory");
  }
  __syncwarp();
  if (rank < 2) asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote(&s[32 * rank + t], 0)), "r"(v), "r"(there) : "memory");
  else if (t == 0) asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(there), "r"(128) : "memory");
  int sum = 0;
  if (rank == 0) {
    wait(&bar, 0);
    sum = s[t] * 2 + s[32 + t];
  }
  s[t] = rank == 0 ? s[t] : v;
  asm volatile("fence.acq_rel.cluster;\n barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
  int got;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(got) : "r"(remote(&s[31 - t], size - 1)) : "memory");
  p.d[32 * blockIdx.x + t] = sum * 1000 + got;
  cluster_sync();
}
