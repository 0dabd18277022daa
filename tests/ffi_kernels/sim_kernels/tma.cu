// Tensor copies in tile mode, of one to five dimensions: loads as they lie in shared memory, stores, reductions, multicast.
#include "shared.h"

__device__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ void drain() { asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ uint8_t* aligned(uint8_t* p) { return p + (1024 - (at(p) & 1023)) % 1024; }  // the launch asks for 1024 bytes more

#define COORDINATES(p) "r"(p.x[0]), "r"(p.x[1]), "r"(p.x[2]), "r"(p.x[3]), "r"(p.x[4])

// A box as it lies `shift` bytes behind a multiple of 1024, all of it and what surrounds it up to `bytes`; then, if told, back
// into another tensor from another place.
struct Box { Map from, to; uint8_t* seen; int x[5], y[5], shift, box_bytes, bytes, store; };
#define BOX(rank, coordinates)                                                                                                  \
  extern "C" __global__ void box##rank(const __grid_constant__ Box p) {                                                         \
    extern __shared__ __align__(1024) uint8_t dynamic[];                                                                        \
    uint8_t* s = aligned(dynamic);                                                                                              \
    __shared__ uint64_t bar;                                                                                                    \
    for (int i = threadIdx.x; i < p.bytes; i += 32) s[i] = 0xEE;                                                                \
    if (threadIdx.x == 0) init(&bar, 1);                                                                                        \
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");                         \
    __syncthreads();                                                                                                            \
    if (threadIdx.x == 0) {                                                                                                     \
      expect(&bar, p.box_bytes);                                                                                                \
      asm volatile("cp.async.bulk.tensor." #rank "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " coordinates "], [%2];" \
                   ::"r"(at(s + p.shift)), "l"(&p.from), "r"(at(&bar)), COORDINATES(p) : "memory");                             \
    }                                                                                                                           \
    wait(&bar, 0);                                                                                                              \
    for (int i = threadIdx.x; i < p.bytes; i += 32) p.seen[i] = s[i];                                                           \
    const int* const y = p.y;                                                                                                   \
    if (threadIdx.x == 0 && p.store) {                                                                                          \
      asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.tile.bulk_group [%0, " coordinates "], [%1];"            \
                   ::"l"(&p.to), "r"(at(s + p.shift)), "r"(0), "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3]), "r"(y[4]) : "memory"); \
      drain();                                                                                                                  \
    }                                                                                                                           \
  }
BOX(1, "{%3}") BOX(2, "{%3, %4}") BOX(3, "{%3, %4, %5}") BOX(4, "{%3, %4, %5, %6}") BOX(5, "{%3, %4, %5, %6, %7}")

// A box from threads, reduced into a tensor.
struct Reduction { Map to; const uint8_t* values; int x, y, bytes; };
#define REDUCTION(name, op)                                                                                               \
  extern "C" __global__ void reduce_##name(const __grid_constant__ Reduction p) {                                         \
    extern __shared__ __align__(1024) uint8_t dynamic[];                                                                  \
    uint8_t* s = aligned(dynamic);                                                                                        \
    for (int i = threadIdx.x; i < p.bytes; i += 32) s[i] = p.values[i];                                                   \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                          \
    __syncwarp();                                                                                                         \
    if (threadIdx.x) return;                                                                                              \
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta." op ".tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&p.to), "r"(at(s)), "r"(p.x), "r"(p.y) : "memory"); \
    drain();                                                                                                              \
  }
REDUCTION(add, "add") REDUCTION(min, "min") REDUCTION(max, "max") REDUCTION(inc, "inc") REDUCTION(dec, "dec") REDUCTION(and, "and") REDUCTION(or, "or") REDUCTION(xor, "xor")

// Each CTA of a cluster loads rows of its own and gives them to the CTAs of its mask; every CTA shows what it has got.
struct Multicast { Map from; uint8_t* seen; int box_bytes, masks[8]; };
extern "C" __global__ void multicast(const __grid_constant__ Multicast p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  uint8_t* s = aligned(dynamic);
  __shared__ uint64_t bar;
  uint32_t rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n mov.u32 %1, %%cluster_nctarank;" : "=r"(rank), "=r"(size));
  int expected = 0;
  for (uint32_t r = 0; r < size; ++r) expected += p.masks[r] >> rank & 1;
  for (int i = threadIdx.x; i < int(size) * p.box_bytes; i += 32) s[i] = 0xEE;
  if (threadIdx.x == 0) init(&bar, 1);
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0) expect(&bar, expected * p.box_bytes);
  cluster_sync();
  if (threadIdx.x == 0 && p.masks[rank]) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(at(s + rank * p.box_bytes)), "l"(&p.from), "r"(0), "r"(int(rank) * 4), "r"(at(&bar)), "h"(uint16_t(p.masks[rank])) : "memory");
  }
  wait(&bar, 0);
  for (int i = threadIdx.x; i < int(size) * p.box_bytes; i += 32) p.seen[rank * size * p.box_bytes + i] = s[i];
  cluster_sync();
}

// A load with a cache policy, of a tensor that was prefetched.
struct Hints { Map from; uint8_t* seen; int x, y, bytes; };
extern "C" __global__ void hints(const __grid_constant__ Hints p) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  uint8_t* s = aligned(dynamic);
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    init(&bar, 1);
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("fence.mbarrier_init.release.cluster;\n prefetch.tensormap [%0];\n cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&p.from), "r"(p.x), "r"(p.y) : "memory");
    expect(&bar, p.bytes);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(at(s)), "l"(&p.from), "r"(p.x), "r"(p.y), "r"(at(&bar)), "l"(policy) : "memory");
  }
  __syncwarp();
  wait(&bar, 0);
  for (int i = threadIdx.x; i < p.bytes; i += 32) p.seen[i] = s[i];
}
