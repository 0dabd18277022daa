// mbarriers: phases, counts, transactions, states; cp.async and bulk copies in all their forms and reductions.
#include <cstdint>

struct Ints { const int* a; int* d; int n; };
__device__ uint32_t at(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(count) : "memory"); }
__device__ void wait(uint64_t* bar, int parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, 1000; @p bra done; bra again; done: }" ::"r"(at(bar)), "r"(parity) : "memory");
}
__device__ int test(uint64_t* bar, int parity) {
  int done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(at(bar)), "r"(parity) : "memory");
  return done;
}
__device__ int test_state(uint64_t* bar, uint64_t state) {
  int done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(at(bar)), "l"(state) : "memory");
  return done;
}
__device__ uint64_t arrive(uint64_t* bar, int count) {
  uint64_t state;
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1], %2;" : "=l"(state) : "r"(at(bar)), "r"(count) : "memory");
  return state;
}
// What was pending when these arrivals came, which must not complete the phase.
__device__ int pending(uint64_t* bar, int count, bool drop) {
  int n;
  if (drop) asm volatile("{ .reg .b64 s; mbarrier.arrive_drop.noComplete.shared::cta.b64 s, [%1], %2; mbarrier.pending_count.b64 %0, s; }" : "=r"(n) : "r"(at(bar)), "r"(count) : "memory");
  else asm volatile("{ .reg .b64 s; mbarrier.arrive.noComplete.shared::cta.b64 s, [%1], %2; mbarrier.pending_count.b64 %0, s; }" : "=r"(n) : "r"(at(bar)), "r"(count) : "memory");
  return n;
}
__device__ void transactions(uint64_t* bar, int expect, int complete) {
  if (expect) asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(expect) : "memory");
  if (complete) asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(complete) : "memory");
}

// One thread goes through everything that a barrier can be told, and asks it after each step.
extern "C" __global__ void states(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  if (threadIdx.x) return;
  int* d = p.d;
  const auto look = [&] { *d++ = test(&bar, 0) + 2 * test(&bar, 1); };
  init(&bar, 5);
  look();                                                // a barrier in its first phase: parity 1 has passed
  *d++ = pending(&bar, 1, false);
  *d++ = pending(&bar, 1, false);
  look();
  uint64_t state = arrive(&bar, 3);                      // completes the phase
  *d++ = test_state(&bar, state);
  look();
  transactions(&bar, 96, 0);                             // bytes keep the next phase open
  state = arrive(&bar, 5);
  *d++ = test_state(&bar, state);
  look();
  transactions(&bar, 0, 64);
  *d++ = test_state(&bar, state);
  transactions(&bar, 0, 32);
  *d++ = test_state(&bar, state);
  look();
  transactions(&bar, 0, 48);                             // bytes may come before they are expected
  transactions(&bar, 48, 0);
  look();
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %0, [%1], 16;" : "=l"(state) : "r"(at(&bar)) : "memory");
  arrive(&bar, 4);
  *d++ = test_state(&bar, state);
  transactions(&bar, 0, 16);
  *d++ = test_state(&bar, state);
  look();
  *d++ = pending(&bar, 2, true);                         // drops: three are left for later phases
  *d++ = pending(&bar, 2, false);
  arrive(&bar, 1);
  look();
  *d++ = pending(&bar, 1, false);
  arrive(&bar, 2);
  look();
  asm volatile("mbarrier.arrive_drop.expect_tx.shared::cta.b64 %0, [%1], 32;" : "=l"(state) : "r"(at(&bar)) : "memory");
  transactions(&bar, 0, 32);
  *d++ = test_state(&bar, state);
  arrive(&bar, 2);
  look();
  *d++ = pending(&bar, 1, false);
  asm volatile("mbarrier.arrive_drop.release.cta.shared::cta.b64 %0, [%1];" : "=l"(state) : "r"(at(&bar)) : "memory");
  look();
  arrive(&bar, 1);                                       // one is left
  look();
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(at(&bar)) : "memory");
  init(&bar, 1);
  look();
  arrive(&bar, 1);
  look();
}

// A ring between four warps: everybody waits for everybody, phase after phase, by parity and by state.
extern "C" __global__ void phases(const __grid_constant__ Ints p) {
  __shared__ uint64_t bar;
  __shared__ int s[2][128];
  const int t = threadIdx.x;
  if (t == 0) init(&bar, 128);
  __syncthreads();
  int v = p.a[t];
  for (int k = 0; k < p.n; ++k) {
    s[k & 1][t] = v;
    if (k % 3 == 2) {
      const uint64_t state = arrive(&bar, 1);
      while (!test_state(&bar, state)) {}
    } else {
      arrive(&bar, 1);
      wait(&bar, k & 1);
    }
    v = v * 3 + s[k & 1][(t + 32) % 128];
  }
  p.d[t] = v;
}

// cp.async of 4, 8 and 16 bytes with fewer source bytes, with an ignored source, with hints; waits for some groups and for all.
extern "C" __global__ void copies(const __grid_constant__ Ints p) {
  __shared__ __align__(16) int s[5][128];
  const int t = threadIdx.x;
  for (int i = 0; i < 5; ++i) for (int k = 0; k < 4; ++k) s[i][4 * t + k] = -7;
  __syncwarp();
  const int* a = p.a + 4 * t;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n cp.async.ca.shared.global [%0+4], [%1+4], 4;" ::"r"(at(&s[0][4 * t])), "l"(a), "r"(t & 1 ? 4 : 0) : "memory");
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at(&s[1][4 * t])), "l"(a), "r"(t % 3 * 4) : "memory");
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at(&s[2][4 * t])), "l"(a), "r"(t % 5 * 4) : "memory");
  asm volatile("cp.async.commit_group;\n cp.async.commit_group;");
  asm volatile("cp.async.wait_group 2;" ::: "memory");
  p.d[t] = s[0][4 * t] + 3 * s[0][4 * t + 1] + 5 * s[0][4 * t + 2] + 7 * s[1][4 * t] + 11 * s[1][4 * t + 1];
  asm volatile("{ .reg .pred q; setp.ne.b32 q, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, q; }" ::"r"(at(&s[3][4 * t])), "l"(a), "r"(t & 4) : "memory");
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(at(&s[4][4 * t])), "l"(a), "l"(policy) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  for (int i = 2; i < 5; ++i) p.d[32 * (i - 1) + t] = s[i][4 * t] + 3 * s[i][4 * t + 1] + 5 * s[i][4 * t + 2] + 7 * s[i][4 * t + 3];
}

// Bulk copies of any size, both ways, several on one barrier and in several groups.
extern "C" __global__ void bulk(const __grid_constant__ Ints p) {
  __shared__ __align__(128) int s[1024];
  __shared__ uint64_t bar;
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = -5;
  if (threadIdx.x == 0) init(&bar, 1);
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.a), "r"(16 * p.n) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(&bar)), "r"(16 * p.n + 32 + 48) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(s)), "l"(p.a), "r"(16 * p.n), "r"(at(&bar)) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(at(s + 900)), "l"(p.a + 8), "r"(32), "r"(at(&bar)), "l"(policy) : "memory");
    asm volatile("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(s + 1000)), "l"(p.a + 4), "r"(48), "r"(at(&bar)) : "memory");
  }
  wait(&bar, 0);
  __syncwarp();
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = s[i] * 2 + 1;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(p.d), "r"(at(s)), "r"(16 * p.n) : "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n cp.async.bulk.commit_group;" ::"l"(p.d + 896), "r"(at(s + 896)), "r"(512) : "memory");
    asm volatile("cp.async.bulk.wait_group 1;\n cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

// A bulk reduction into global memory.
struct Reduction { const uint8_t* values; uint8_t* to; int bytes; };
#define REDUCTION(name, op)                                                                                              \
  extern "C" __global__ void reduce_##name(const __grid_constant__ Reduction p) {                                        \
    __shared__ __align__(128) uint8_t s[1024];                                                                           \
    for (int i = threadIdx.x; i < p.bytes; i += 32) s[i] = p.values[i];                                                  \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                         \
    __syncwarp();                                                                                                        \
    if (threadIdx.x) return;                                                                                             \
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group." op " [%0], [%1], %2;" ::"l"(p.to), "r"(at(s)), "r"(p.bytes) : "memory"); \
    asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group 0;" ::: "memory");                              \
  }
REDUCTION(add_u32, "add.u32") REDUCTION(add_s32, "add.s32") REDUCTION(add_u64, "add.u64") REDUCTION(add_f32, "add.f32") REDUCTION(add_f64, "add.f64") REDUCTION(add_f16, "add.noftz.f16")
REDUCTION(add_bf16, "add.noftz.bf16") REDUCTION(min_u32, "min.u32") REDUCTION(min_s32, "min.s32") REDUCTION(min_u64, "min.u64") REDUCTION(min_s64, "min.s64") REDUCTION(min_f16, "min.f16")
REDUCTION(min_bf16, "min.bf16") REDUCTION(max_u32, "max.u32") REDUCTION(max_s32, "max.s32") REDUCTION(max_u64, "max.u64") REDUCTION(max_s64, "max.s64") REDUCTION(max_f16, "max.f16")
REDUCTION(max_bf16, "max.bf16") REDUCTION(inc_u32, "inc.u32") REDUCTION(dec_u32, "dec.u32") REDUCTION(and_b32, "and.b32") REDUCTION(or_b32, "or.b32") REDUCTION(xor_b32, "xor.b32")
REDUCTION(and_b64, "and.b64") REDUCTION(or_b64, "or.b64") REDUCTION(xor_b64, "xor.b64")
