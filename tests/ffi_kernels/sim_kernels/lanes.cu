// Lanes of a warp in groups, branches and loops of their own; barriers that reduce; special registers; instructions that only hint.
#include <cstdint>

struct Lanes { const int* a; const int* keys; int* d; };
#define PREDICATE(result, text) asm volatile("{ .reg .pred p, q; setp.gt.s32 p, %1, 0; " text " selp.b32 %0, 1, 0, q; }" : "=r"(result) : "r"(v), "r"(mask))
#define WORD(result, text) asm volatile(text : "=r"(result) : "r"(v), "r"(mask))

// Everything that lanes do together, for the lanes of equal keys at once.
extern "C" __global__ void groups(const __grid_constant__ Lanes p) {
  const int v = p.a[threadIdx.x], key = p.keys[threadIdx.x];
  const uint32_t mask = __match_any_sync(~0u, key);
  uint32_t r[20];
  asm volatile("{ .reg .pred p; setp.gt.s32 p, %1, 0; vote.sync.ballot.b32 %0, p, %2; }" : "=r"(r[0]) : "r"(v), "r"(mask));
  PREDICATE(r[1], "vote.sync.any.pred q, p, %2;");
  PREDICATE(r[2], "vote.sync.all.pred q, p, %2;");
  PREDICATE(r[3], "vote.sync.uni.pred q, p, %2;");
  WORD(r[4], "match.any.sync.b32 %0, %1, %2;");
  asm volatile("{ .reg .b64 x; mov.b64 x, {%1, %1}; match.any.sync.b64 %0, x, %2; }" : "=r"(r[5]) : "r"(v), "r"(mask));
  asm volatile("{ .reg .pred q; match.all.sync.b32 %0|q, %2, %3; selp.b32 %1, 1, 0, q; }" : "=r"(r[6]), "=r"(r[7]) : "r"(v & 1), "r"(mask));
  asm volatile("{ .reg .pred q; .reg .b64 x; mov.b64 x, {%2, 5}; match.all.sync.b64 %0|q, x, %3; selp.b32 %1, 1, 0, q; }" : "=r"(r[8]), "=r"(r[9]) : "r"(key), "r"(mask));
  WORD(r[10], "redux.sync.add.s32 %0, %1, %2;");
  WORD(r[11], "redux.sync.min.s32 %0, %1, %2;");
  WORD(r[12], "redux.sync.max.s32 %0, %1, %2;");
  WORD(r[13], "redux.sync.min.u32 %0, %1, %2;");
  WORD(r[14], "redux.sync.max.u32 %0, %1, %2;");
  WORD(r[15], "redux.sync.and.b32 %0, %1, %2;");
  WORD(r[16], "redux.sync.or.b32 %0, %1, %2;");
  WORD(r[17], "redux.sync.xor.b32 %0, %1, %2;");
  r[18] = __shfl_sync(mask, v, __ffs(mask) - 1);
  r[19] = __shfl_sync(mask, v, 31 - __clz(mask));
  for (int i = 0; i < 20; ++i) p.d[20 * threadIdx.x + i] = r[i];
}

// Lanes leave a loop one after the other; those that stay go on together.
extern "C" __global__ void leaving(const __grid_constant__ Lanes p) {
  const int v = p.a[threadIdx.x];
  uint32_t left = ~0u;
  int sum = 0;
  for (int k = 0;; ++k) {
    const bool stay = k < (v & 15);
    left = __ballot_sync(left, stay);
    if (!stay) break;
    sum += __reduce_add_sync(left, v) + __shfl_sync(left, v, __ffs(left) - 1) * k;
  }
  p.d[threadIdx.x] = sum;
}

// Branches within branches, each with an exchange through shared memory among its own lanes.
extern "C" __global__ void branches(const __grid_constant__ Lanes p) {
  __shared__ int s[32];
  const int lane = threadIdx.x, v = p.a[lane];
  int r = 0;
  const auto exchange = [&](uint32_t mask, int x, int from) {
    s[lane] = x;
    __syncwarp(mask);
    const int got = s[from];
    __syncwarp(mask);
    return got;
  };
  if (lane < 12) {
    r = exchange(0xFFF, v, 11 - lane);
    if (lane & 1) r += exchange(0xAAA, r, (lane + 2) % 12);
    else for (int k = 0; k < 3; ++k) r -= exchange(0x555, r + k, (lane + 4) % 12);
  } else if (lane < 20) {
    r = __shfl_xor_sync(0xFF000, v, 1, 4) * 3;
  } else {
    r = exchange(0xFFF00000, v, lane == 31 ? 20 : lane + 1);
    if (lane > 25) r ^= __shfl_xor_sync(0xFC000000, r, 1);
  }
  __syncwarp();
  p.d[lane] = r + __shfl_sync(~0u, r, 31 - lane);
}

// Some lanes of each warp are done early; the others go on without them.
extern "C" __global__ void early(const __grid_constant__ Lanes p) {
  const int lane = threadIdx.x & 31, v = p.a[threadIdx.x];
  const uint32_t mask = __ballot_sync(~0u, v > 0);
  if (v <= 0) {
    p.d[threadIdx.x] = -1;
    return;
  }
  __syncwarp(mask);
  const int place = __popc(mask & ((1u << lane) - 1)), next = __fns(mask, 0, (place + 1) % __popc(mask) + 1);
  p.d[threadIdx.x] = __shfl_sync(mask, v, next) + __reduce_max_sync(mask, v);
}

__device__ __noinline__ int ackermann(int m, int n) { return m == 0 ? n + 1 : n == 0 ? ackermann(m - 1, 1) : ackermann(m - 1, ackermann(m, n - 1)); }
// A jump through a table, and recursion, each lane its own way.
extern "C" __global__ void jumps(const __grid_constant__ Lanes p) {
  int v = p.a[threadIdx.x];
  for (int k = 0; k < 6; ++k) {
    switch (v & 15) {
      case 0: v = v * 5 + 1; break;
      case 1: v ^= 0x55; break;
      case 2: v += k; [[fallthrough]];
      case 3: v -= 11; break;
      case 4: v = __popc(v) + 9; break;
      case 5: v = v << 2 | k; break;
      case 6: v = -v; break;
      case 7: v >>= 1; break;
      case 8: v += 100; break;
      case 9: v = v * v & 0xFFFF; break;
      case 10: v |= 3; break;
      case 11: v = __brev(v) >> 20; break;
      case 12: v = 7; break;
      case 13: v = v / 3; break;
      case 14: v %= 77; break;
      default: v += 1;
    }
  }
  p.d[threadIdx.x] = v + 100000 * ackermann(threadIdx.x % 3, threadIdx.x % 4);
}

// Barriers with counts, numbers in registers and reductions over the threads that take part.
extern "C" __global__ void reductions(const __grid_constant__ Lanes p) {
  const int t = threadIdx.x, v = p.a[t], group = t / 64, id = 3 + group;
  int count, all, any, whole;
  asm volatile("{ .reg .pred p; setp.gt.s32 p, %1, 0; barrier.red.popc.u32 %0, %2, 64, p; }" : "=r"(count) : "r"(v), "r"(id) : "memory");
  asm volatile("{ .reg .pred p, q; setp.gt.s32 p, %1, -900; barrier.red.and.pred q, %2, 64, p; selp.b32 %0, 1, 0, q; }" : "=r"(all) : "r"(v), "r"(id) : "memory");
  asm volatile("{ .reg .pred p, q; setp.gt.s32 p, %1, 900; barrier.red.or.pred q, %2, 64, p; selp.b32 %0, 1, 0, q; }" : "=r"(any) : "r"(v), "r"(id) : "memory");
  asm volatile("{ .reg .pred p; setp.lt.s32 p, %1, 0; bar.red.popc.u32 %0, 1, p; }" : "=r"(whole) : "r"(v) : "memory");
  p.d[t] = count + 1000 * all + 10000 * any + 100000 * whole;
}

struct Places { int* d; };
#define SPECIAL(i, name) { uint32_t x; asm volatile("mov.u32 %0, " name ";" : "=r"(x)); d[i] = x; }
extern "C" __global__ void registers(const __grid_constant__ Places p) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* d = p.d + 36 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  SPECIAL(0, "%%tid.x") SPECIAL(1, "%%tid.y") SPECIAL(2, "%%tid.z") SPECIAL(3, "%%ntid.x") SPECIAL(4, "%%ntid.y") SPECIAL(5, "%%ntid.z")
  SPECIAL(6, "%%ctaid.x") SPECIAL(7, "%%ctaid.y") SPECIAL(8, "%%ctaid.z") SPECIAL(9, "%%nctaid.x") SPECIAL(10, "%%nctaid.y") SPECIAL(11, "%%nctaid.z")
  SPECIAL(12, "%%laneid") SPECIAL(13, "%%lanemask_eq") SPECIAL(14, "%%lanemask_le") SPECIAL(15, "%%lanemask_lt") SPECIAL(16, "%%lanemask_ge") SPECIAL(17, "%%lanemask_gt")
  SPECIAL(18, "%%clusterid.x") SPECIAL(19, "%%clusterid.y") SPECIAL(20, "%%clusterid.z") SPECIAL(21, "%%nclusterid.x") SPECIAL(22, "%%nclusterid.y") SPECIAL(23, "%%nclusterid.z")
  SPECIAL(24, "%%cluster_ctaid.x") SPECIAL(25, "%%cluster_ctaid.y") SPECIAL(26, "%%cluster_ctaid.z") SPECIAL(27, "%%cluster_nctaid.x") SPECIAL(28, "%%cluster_nctaid.y")
  SPECIAL(29, "%%cluster_nctaid.z") SPECIAL(30, "%%cluster_ctarank") SPECIAL(31, "%%cluster_nctarank") SPECIAL(32, "%%dynamic_smem_size")
  uint32_t explicit_cluster;
  asm volatile("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.b32 %0, 1, 0, p; }" : "=r"(explicit_cluster));
  d[33] = explicit_cluster;
  d[34] = d[35] = 0;
}

// Registers move from one warpgroup to another; fences, waits and prefetches that change no result.
extern "C" __global__ void __launch_bounds__(256, 1) hints(const __grid_constant__ Lanes p) {
  __shared__ int s[256];
  const int t = threadIdx.x;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("prefetch.global.L1 [%0];\n prefetch.global.L2 [%0];\n prefetchu.L1 [%0];" ::"l"(p.a + t));
  if (t < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    s[t] = p.a[t] + 1;
    asm volatile("fence.acq_rel.cta;\n fence.acq_rel.cluster;\n fence.acq_rel.gpu;\n fence.acq_rel.sys;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    s[t] = p.a[t] * 2;
    asm volatile("fence.sc.cta;\n fence.sc.gpu;\n membar.cta;\n membar.gl;\n membar.sys;" ::: "memory");
  }
  asm volatile("fence.proxy.alias;\n fence.proxy.async;\n fence.proxy.async.global;\n fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("nanosleep.u32 20;");
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  p.d[t] = s[255 - t];
}
