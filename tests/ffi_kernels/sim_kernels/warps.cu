// Lanes, warps and CTAs: divergence, shuffles, votes, barriers, calls, local memory, atomics. Each writes what tests compare.
#include <cstdint>

struct Ints { const int* a; int* d; int n; };

// Divergence three levels deep, loops with different trip counts, a switch, reconvergence before a shuffle.
extern "C" __global__ void diverge(const __grid_constant__ Ints p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int v = p.a[i];
  for (int k = 0; k < (threadIdx.x & 7); ++k) {
    if (v & 1) { v = 3 * v + 1; if (v % 5 == 0) continue; v -= 2; } else { v >>= 1; if (v < 3) break; }
    switch ((v + k) & 7) {
      case 0: v += 10; break;
      case 1: v ^= 77; break;
      case 2: v *= 3; break;
      case 5: v -= 1000; break;
      default: v += k;
    }
  }
  __syncwarp();
  p.d[i] = v + __shfl_xor_sync(~0u, v, 1);
}

// Shuffles inside divergent branches, each with its own member mask.
extern "C" __global__ void split_shuffle(const __grid_constant__ Ints p) {
  const unsigned lane = threadIdx.x & 31;
  int v = p.a[threadIdx.x];
  const unsigned odd = 0xAAAAAAAAu, even = 0x55555555u;
  if (lane & 1) v += __shfl_sync(odd, v, 31);
  else v -= __shfl_down_sync(even, v, 2, 8);
  const unsigned group = __match_any_sync(~0u, lane / 5);
  if (lane / 5 == 2) v += __popc(group) * 100;
  for (int k = 0; k < 5; ++k) v += __shfl_sync(group, v, __ffs(group) - 1 + k % __popc(group));
  p.d[threadIdx.x] = v;
}

struct Shuffle { const int* a; const int* b; int* d; int* valid; };
#define SHUFFLE(name, text)                                                                                                   \
  extern "C" __global__ void name(const __grid_constant__ Shuffle p) {                                                        \
    int d, q;                                                                                                                 \
    asm volatile("{ .reg .pred v; " text " %0|v, %2, %3, %4, -1; selp.b32 %1, 1, 0, v; }"                                     \
                 : "=r"(d), "=r"(q) : "r"(p.a[threadIdx.x]), "r"(p.b[threadIdx.x]), "r"(p.b[32 + threadIdx.x]));              \
    p.d[threadIdx.x] = d;                                                                                                     \
    p.valid[threadIdx.x] = q;                                                                                                 \
  }
SHUFFLE(shfl_up, "shfl.sync.up.b32") SHUFFLE(shfl_down, "shfl.sync.down.b32") SHUFFLE(shfl_bfly, "shfl.sync.bfly.b32") SHUFFLE(shfl_idx, "shfl.sync.idx.b32")

extern "C" __global__ void votes(const __grid_constant__ Ints p) {
  const int v = p.a[threadIdx.x];
  int* d = p.d + 12 * threadIdx.x;
  d[0] = __ballot_sync(~0u, v > 0);
  d[1] = __any_sync(~0u, v > 5);
  d[2] = __all_sync(~0u, v > -100);
  d[3] = __match_any_sync(~0u, v);
  int same;
  d[4] = __match_all_sync(~0u, v, &same);
  d[5] = same;
  d[6] = __reduce_add_sync(~0u, v);
  d[7] = __reduce_min_sync(~0u, v);
  d[8] = __reduce_max_sync(~0u, unsigned(v));
  d[9] = __reduce_xor_sync(~0u, unsigned(v));
  d[10] = v > 0 ? __activemask() : 0;
  int leader;
  asm volatile("{ .reg .pred q; elect.sync _|q, -1; selp.b32 %0, 1, 0, q; }" : "=r"(leader));
  d[11] = leader;
}

// A tree over the CTA, with barriers that only some warps take part in.
extern "C" __global__ void barriers(const __grid_constant__ Ints p) {
  __shared__ int s[1024];
  const int t = threadIdx.x, n = blockDim.x;
  s[t] = p.a[blockIdx.x * n + t];
  __syncthreads();
  for (int half = n / 2; half >= 32; half /= 2) {
    if (t < half) s[t] += s[t + half];
    asm volatile("bar.sync 1;");
  }
  if (t < 64) {
    asm volatile("barrier.sync 2, 64;");
    const int both = s[t & 31] + s[(t & 31) ^ 1];
    __syncwarp();
    asm volatile("barrier.sync 2, 64;");
    if (t < 32) s[t] = both;
    asm volatile("barrier.sync 2, 64;");
  }
  __syncthreads();
  const int count = __syncthreads_count(s[t & 31] > 0), any = __syncthreads_or(t == 5), all = __syncthreads_and(t != 5);
  p.d[blockIdx.x * n + t] = s[t & 31] + 1000 * count + 7 * any + all;
}

// One warp fills, another one drains: bar.arrive and bar.sync with counts.
extern "C" __global__ void producer_consumer(const __grid_constant__ Ints p) {
  __shared__ int s[32];
  const int lane = threadIdx.x & 31;
  for (int k = 0; k < p.n; ++k) {
    if (threadIdx.x < 32) {
      asm volatile("bar.sync 4, 64;" ::: "memory");
      s[lane] = p.a[k * 32 + lane] * 2;
      asm volatile("bar.arrive 3, 64;" ::: "memory");
    } else {
      asm volatile("bar.arrive 4, 64;" ::: "memory");
      asm volatile("bar.sync 3, 64;" ::: "memory");
      p.d[k * 32 + lane] = s[31 - lane];
    }
  }
}

__device__ __noinline__ int collatz(int v, int* steps) {
  while (v != 1 && *steps < 200) { v = v & 1 ? 3 * v + 1 : v / 2; ++*steps; }
  return v;
}
__device__ __noinline__ int weigh(int v) {
  int table[16];
  for (int k = 0; k < 16; ++k) table[(k * 7) & 15] = v * k;
  int steps = 0;
  if (v & 1) steps += collatz(v, &steps);
  else collatz(v + 2, &steps);
  return table[v & 15] + steps;
}
extern "C" __global__ void calls(const __grid_constant__ Ints p) {
  int v = p.a[threadIdx.x];
  if (v % 3) v = weigh(v);
  else v = -weigh(v + 1);
  p.d[threadIdx.x] = v;
}

struct Atomic { int* sum; int* d; float* f; int n; };
extern "C" __global__ void atomics(const __grid_constant__ Atomic p) {
  __shared__ unsigned bins[8];
  if (threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[threadIdx.x & 7], threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(p.sum + threadIdx.x, int(bins[threadIdx.x]));
  atomicMax(p.sum + 8, int(threadIdx.x));
  atomicMin(p.sum + 9, -int(threadIdx.x));
  atomicOr(p.sum + 10, 1 << (threadIdx.x & 31));
  atomicInc(reinterpret_cast<unsigned*>(p.sum + 11), 100);
  atomicCAS(p.sum + 12, 0, 7);
  atomicAdd(p.f, 0.25f);
  const int ticket = atomicAdd(p.sum + 13, 1);
  p.d[ticket] = ticket;
}

// The last CTA to arrive sums what the others wrote.
extern "C" __global__ void last_block(const __grid_constant__ Atomic p) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    p.d[blockIdx.x] = blockIdx.x * blockIdx.x;
    __threadfence();
    last = atomicAdd(p.sum, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int s = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) s += p.d[i];
    p.sum[1] = s;
  }
}

// Every CTA waits for all others through a flag: needs them resident together.
extern "C" __global__ void grid_barrier(const __grid_constant__ Atomic p) {
  if (threadIdx.x == 0) {
    atomicAdd(p.sum, 1);
    while (*reinterpret_cast<volatile int*>(p.sum) < int(gridDim.x)) {}
  }
  __syncthreads();
  p.d[blockIdx.x * blockDim.x + threadIdx.x] = *reinterpret_cast<volatile int*>(p.sum);
}

extern "C" __global__ void three_dimensions(const __grid_constant__ Ints p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));  // %warpid is a slot of the SM on a device: it tells nothing
  p.d[block * blockDim.x * blockDim.y * blockDim.z + thread] = int(lane) + thread / 32 * 32 + 10000 * block;
}

// Faults.
extern "C" __global__ void out_of_bounds(const __grid_constant__ Ints p) { p.d[threadIdx.x + p.n] = 1; }
extern "C" __global__ void write_input(const __grid_constant__ Ints p) { const_cast<int*>(p.a)[threadIdx.x] = 1; }
extern "C" __global__ void misaligned(const __grid_constant__ Ints p) { *reinterpret_cast<int2*>(p.d + 1 + 2 * threadIdx.x) = make_int2(1, 2); }
extern "C" __global__ void shared_overflow(const __grid_constant__ Ints p) {
  extern __shared__ int s[];
  s[threadIdx.x + p.n] = 3;
  p.d[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void null_pointer(const __grid_constant__ Ints p) { p.d[threadIdx.x] = *reinterpret_cast<int*>(uintptr_t(p.n)); }
extern "C" __global__ void stuck(const __grid_constant__ Ints p) {
  if (threadIdx.x >= 32) asm volatile("bar.sync 6, 96;");
  else asm volatile("bar.sync 7, 64;");
  p.d[threadIdx.x] = 1;
}
extern "C" __global__ void stuck_lane(const __grid_constant__ Ints p) {
  if (threadIdx.x == 3) return;
  p.d[threadIdx.x] = __shfl_sync(~0u, threadIdx.x, 0);
}
extern "C" __global__ void endless(const __grid_constant__ Ints p) {
  while (*reinterpret_cast<volatile int*>(p.d) == 0) {}
}
extern "C" __global__ void trapped(const __grid_constant__ Ints p) { if (p.n) __trap(); }
extern "C" __global__ void __launch_bounds__(64) bounded(const __grid_constant__ Ints p) { p.d[threadIdx.x] = 1; }
