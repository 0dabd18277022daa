// Hyper-connections (facts section 2, mHC): what lies between two sublayers, in one launch.
//
// A cluster of up to 16 CTAs serves one to four rows. CTA c owns kBlocks blocks of 128 channels of all four streams: the
// columns of `fn` for them, their slice of the sublayer input, its norm and its codes. `fn` is read once per cluster,
// through registers, with about 100 KB of each CTA's loads in flight, asked for before anything that another launch makes: what bounds this op is that a cluster lives in one
// GPC, which was measured to read about 1.3 TB/s from the L2 of an H200. Three sums cross the cluster (the mix, the mean square
// of the input, for NVFP4 its largest magnitude); each CTA sends its part to every other with st.async, which also counts
// it on the receiver's mbarrier, and all add what they received in the order of ranks. Sinkhorn runs in one lane of one
// CTA per row while the others go on with the norm. No sum depends on the number of rows, nor on which row of the cluster
// it belongs to: one row per cluster (up to four rows in all) has kernels of its own, which give the same bits.
#include "dependent.cuh"
#include "exchange.cuh"
#include "mma.cuh"
#include "sinkhorn.cuh"

using namespace dsv4;

namespace {

constexpr int kStreams = 4;
constexpr int kWarps = 24;  // of the mix: 6 groups of 4 of its 24 rows, times 4 streams
constexpr int kThreads = 32 * kWarps;
constexpr int kSinkhornWarp = kWarps - 1;  // at most 16 warps are busy with the sublayer input
constexpr int kMaxCluster = 16;

enum Quantize : int32_t { kNone = 0, kFp8 = 1, kNvfp4 = 2 };

struct HyperParams {
  const uint16_t* streams;      // bf16 [R, 4, D]
  const uint16_t* sublayer;     // bf16 [R, D], the output of the sublayer before; null: take `streams` as they are
  const float* last_post;       // fp32 [R, 4], with `sublayer`
  const float* last_comb;       // fp32 [R, 4, 4], with `sublayer`
  const float* fn;              // fp32 [24, 4 D]; the head's: [4, 4 D]
  const float* base;            // fp32 [24]; [4]
  const float* scale;           // fp32 [3]; [1]
  const uint16_t* norm_weight;  // bf16 [D]
  uint16_t* x;                  // bf16 [R, D], normed
  uint16_t* new_streams;        // bf16 [R, 4, D], with `sublayer`
  float* post;                  // fp32 [R, 4]; null for the head
  float* comb;                  // fp32 [R, 4, 4]; null for the head
  uint8_t* codes;               // FP8: e4m3 [R, D]; NVFP4: e2m1 [R, D/2]
  uint8_t* code_scale;          // FP8: e8m0 [R, ceil(D/128)]; NVFP4: e4m3 [R, D/16]
  float* global_scale;          // NVFP4: fp32 [R, 1]
  int32_t rows, channels, rows_per_cluster, cluster, iterations, quantize;
  float eps, norm_eps, inverse_channels;  // 1 / channels
};

// --- pieces of a row -----------------------------------------------------------------------------------------------

DSV4_D float4 unpack4(uint2 raw) { return {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y)}; }
DSV4_D uint2 pack4(float4 x) { return {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)}; }
DSV4_D float4 scaled(float4 x, float s) { return {x.x * s, x.y * s, x.z * s, x.w * s}; }
DSV4_D void add_scaled(float4& sum, float4 x, float s) {
  sum = {fmaf(x.x, s, sum.x), fmaf(x.y, s, sum.y), fmaf(x.z, s, sum.z), fmaf(x.w, s, sum.w)};
}
DSV4_D float add_products(float sum, float4 a, float4 b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// How a sublayer's output enters the streams: new X_k = post_k f + sum_j comb[j, k] X_j.
struct Mixing {
  float4 post, comb[kStreams];
  DSV4_D void load(const float* all_post, const float* all_comb, int64_t row) {
    post = reinterpret_cast<const float4*>(all_post)[row];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) comb[j] = reinterpret_cast<const float4*>(all_comb)[row * kStreams + j];
  }
};

// Four channels of the four streams.
DSV4_D void after_sublayer(float4 (&x)[kStreams], float4 f, const Mixing& mixing) {
  const float4 weight = mixing.post;
  float4 sum[kStreams] = {scaled(f, weight.x), scaled(f, weight.y), scaled(f, weight.z), scaled(f, weight.w)};
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float4 c = mixing.comb[j];
    add_scaled(sum[0], x[j], c.x), add_scaled(sum[1], x[j], c.y), add_scaled(sum[2], x[j], c.z), add_scaled(sum[3], x[j], c.w);
  }
#pragma unroll
  for (int k = 0; k < kStreams; ++k) x[k] = sum[k];
}

// Numbers that no launch writes, asked for where this stands and not where they are used.
DSV4_D float4 constant4(const float* from) {
  float4 x;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
  return x;
}
DSV4_D void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// n values per lane (a power of two), each summed over `lanes` lanes: lane i * lanes / n and those behind it hold the sum of the
// i-th. Each step halves the values of a lane, and so the shuffles of the next; every value is added up in the order of warp_sum.
template <int n, int lanes = 32>
DSV4_D float transposed_sum(const float (&x)[n]) {
  if constexpr (n == 1) {
    return warp_sum<lanes>(x[0]);
  } else {
    const bool upper = lane_id() & lanes / 2;
    float kept[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float low = x[i], high = x[i + n / 2];
      kept[i] = (upper ? high : low) + __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, lanes / 2);
    }
    return transposed_sum<n / 2, lanes / 2>(kept);
  }
}

// --- one cluster -------------------------------------------------------------------------------------------------------

template <int kGroups, int kBlocks, int kRows>
struct Shared {
  static constexpr int kQuads = kGroups + 1;  // the mix of 4 kGroups rows, the sum of squares, padding
  uint2 tile[kRows][kStreams][kBlocks * 32];  // bf16, four channels each
  Mixing mixing[kRows][kBlocks];            // a copy for every warp that needs one
  float4 part[kRows][kStreams][kQuads];     // of this CTA, per stream
  float4 mix[kRows][kMaxCluster][kQuads];   // received
  float squares[kRows][kMaxCluster * kBlocks];     // of the sublayer input per block, received
  uint32_t largest[kRows][kMaxCluster * kBlocks];  // magnitude per block, received
  alignas(16) float shares[kRows][16];  // what Sinkhorn begins with
  uint64_t barrier[3];
};

template <int kGroups, int kBlocks, int kRows>
__device__ void hyper(const HyperParams& p) {
  __shared__ __align__(16) Shared<kGroups, kBlocks, kRows> shared;
  constexpr int kQuads = kGroups + 1, kMixes = 4 * kGroups;
  constexpr int kAhead = kBlocks < 2 ? 1 : 2;  // blocks of `fn` in registers
  const int thread = threadIdx.x, lane = lane_id(), warp = warp_id();
  const int rank = cluster_rank(), d = p.channels;
  const int cluster = kBlocks > 1 ? kMaxCluster : p.cluster;  // wide rows fill the largest cluster
  const int first_row = cluster_number() * p.rows_per_cluster;
  const int rows = kRows == 1 ? 1 : min(p.rows_per_cluster, p.rows - first_row);
  const int first_channel = rank * kBlocks * 128;

  // `fn`: this warp takes four rows of one stream; a block is four consecutive channels per lane.
  const int group = warp / kStreams, stream = warp % kStreams;
  float4 weights[kAhead][4];
  const float* fn = p.fn + (4 * group * kStreams + stream) * d + first_channel + 4 * lane;
  const auto fetch = [&](int block) {
    const bool there = group < kGroups && first_channel + block * 128 + 4 * lane < d;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[block % kAhead][i] = there ? constant4(fn + i * kStreams * d + block * 128) : float4{};
  };
#pragma unroll
  for (int block = 0; block < kAhead; ++block) fetch(block);

  // Of the streams and of the sublayer input one warp takes a block of 128 channels of one row, four per lane.
  const int block_row = warp / kBlocks, own_block = warp % kBlocks;
  const int own_channel = first_channel + 128 * own_block + 4 * lane;
  const bool mine = own_channel < d;
  if (block_row == 0 && mine) prefetch(p.norm_weight + own_channel);  // there are no registers for more yet
  if (warp == kSinkhornWarp) prefetch(lane ? p.base : p.scale);

  if (thread == 0) {
    barrier_init(&shared.barrier[0], rows * cluster * kQuads * 16);
    barrier_init(&shared.barrier[1], rows * cluster * kBlocks * 4);
    barrier_init(&shared.barrier[2], p.quantize == kNvfp4 ? rows * cluster * kBlocks * 4 : 0);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_arrive_relaxed();  // all that it must order is the fence above
  wait_for_previous();

  // The slice of the streams, into shared memory: the warp takes its four channels of all of them.
  if (block_row < rows) {
    const int row = first_row + block_row, at = row * kStreams * d + own_channel;
    const bool mixes = kGroups > 1 && p.sublayer;
    Mixing& mixing = shared.mixing[block_row][own_block];  // twenty numbers for which there are no registers
    if (mixes && lane <= kStreams) {
      const float* from = lane == 0 ? p.last_post + row * kStreams : p.last_comb + (row * kStreams + lane - 1) * kStreams;
      copy_async_16(shared_address(&mixing.post + lane), from, true);
    }
    uint2 packed[kStreams] = {}, f = {};
    if (mine) {
#pragma unroll
      for (int m = 0; m < kStreams; ++m) packed[m] = *reinterpret_cast<const uint2*>(p.streams + at + m * d);
      if (mixes) f = *reinterpret_cast<const uint2*>(p.sublayer + row * d + own_channel);
    }
    if (mixes) {
      copy_async_commit();
      copy_async_wait<0>();
      __syncwarp();
      float4 x[kStreams];
#pragma unroll
      for (int m = 0; m < kStreams; ++m) x[m] = unpack4(packed[m]);
      after_sublayer(x, unpack4(f), mixing);
#pragma unroll
      for (int m = 0; m < kStreams; ++m) packed[m] = pack4(x[m]);
    }
#pragma unroll
    for (int m = 0; m < kStreams; ++m) shared.tile[block_row][m][own_block * 32 + lane] = packed[m];
    if (mixes && mine) {
#pragma unroll
      for (int m = 0; m < kStreams; ++m) *reinterpret_cast<uint2*>(p.new_streams + at + m * d) = packed[m];
    }
  }
  __syncthreads();
  let_next_start();  // not earlier: the weights of the next kernel would delay those above

  float sums[kRows * 4] = {}, square = 0.0f;  // squares: of the row that is numbered as this warp's group
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const float4 v = unpack4(shared.tile[r][stream][block * 32 + lane]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * r + i] = add_products(sums[4 * r + i], v, weights[block % kAhead][i]);
      if (group == r) square = add_products(square, v, v);
    }
    if (block + kAhead < kBlocks) fetch(block + kAhead);
  }
  float total;
  if (group < kRows) {  // both at once: each waits for its shuffles
    total = transposed_sum(sums);
    square = warp_sum(square);
    if (lane < 4) reinterpret_cast<float*>(shared.part[group][stream])[kMixes + lane] = lane ? 0.0f : square;
  } else {
    total = transposed_sum(sums);
  }
  if (group < kGroups && lane % (8 / kRows) == 0) {
    const int value = lane / (8 / kRows);
    reinterpret_cast<float*>(shared.part[value / 4][stream])[4 * group + value % 4] = total;
  }
  cluster_wait();  // from here on every CTA may send to every other
  __syncthreads();

  {
    const int r = thread / (kMaxCluster * 8), peer = thread / 8 % kMaxCluster, quad = thread % 8;
    if (r < rows && peer < cluster && quad < kQuads) {
      float4 sum = shared.part[r][0][quad];
#pragma unroll
      for (int m = 1; m < kStreams; ++m) {
        const float4 other = shared.part[r][m][quad];
        sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
      }
      send(&shared.mix[r][rank][quad], &shared.barrier[0], peer, sum);
    }
  }

  // Value `lane` of the mix of a row, over the whole cluster and scaled by the root mean square of the streams.
  const auto mix_of = [&](int r) {
    const float* received = reinterpret_cast<const float*>(shared.mix[r]);
    float sum[4] = {};
#pragma unroll
    for (int from = 0; from < kMaxCluster; ++from)
      if (from < cluster && lane < 4 * kQuads) sum[from % 4] += received[from * 4 * kQuads + lane];
    const float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const float square = __shfl_sync(0xFFFFFFFFu, total, kMixes);
    return total * rsqrtf(fmaf(square, p.inverse_channels / kStreams, p.norm_eps));
  };

  // post and comb of the rows that this CTA answers for. The head has neither, but its messages must have arrived, too.
  if (warp == kSinkhornWarp) {
    if constexpr (kGroups > 1) {
      const int part = lane < 4 ? 0 : lane < 8 ? 1 : 2;
      const float base = lane < kMixes ? __ldg(p.base + lane) : 0.0f, scale = __ldg(p.scale + part);
      barrier_wait(&shared.barrier[0]);
      for (int r = rank; r < rows; r += cluster) {
        const float value = fmaf(mix_of(r), scale, base);
        if (part == 1) p.post[(first_row + r) * kStreams + lane - 4] = 2.0f * quick_sigmoid(value);
        const float share = softmax_of_four(value, p.eps);  // of the last 16 values of the mix
        if (part == 2 && lane < kMixes) shared.shares[r][lane - 8] = share;
      }
      __syncwarp();
      if (lane < rows && lane % cluster == rank) {
        float c[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) c[i] = shared.shares[lane][i];
        sinkhorn(c, p.iterations, p.eps);
        float4* out = reinterpret_cast<float4*>(p.comb + (first_row + lane) * 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
      }
    } else {
      barrier_wait(&shared.barrier[0]);
    }
    return;
  }

  // The sublayer input.
  if (block_row < rows) {
    const int r = block_row, block = own_block, channel = own_channel, slot = rank * kBlocks + block;
    const int out_row = first_row + r;
    const float base = lane < kStreams ? __ldg(p.base + lane) : 0.0f, scale = __ldg(p.scale);
    const float4 weight = mine ? unpack4(__ldg(reinterpret_cast<const uint2*>(p.norm_weight + channel))) : float4{};
    barrier_wait(&shared.barrier[0]);
    const float pre = quick_sigmoid(fmaf(mix_of(r), scale, base)) + p.eps;
    float4 y = {};
#pragma unroll
    for (int m = 0; m < kStreams; ++m)
      add_scaled(y, unpack4(shared.tile[r][m][block * 32 + lane]), __shfl_sync(0xFFFFFFFFu, pre, m));
    y = unpack4(pack4(y));
    const float square = warp_sum(add_products(0.0f, y, y));
    if (lane < cluster) send(&shared.squares[r][slot], &shared.barrier[1], lane, float_bits(square));

    barrier_wait(&shared.barrier[1]);
    const int slots = cluster * kBlocks;
    float total = lane < slots ? shared.squares[r][lane] : 0.0f;
    if (kBlocks * kMaxCluster > 32 && lane + 32 < slots) total += shared.squares[r][lane + 32];
    const float factor = rsqrtf(fmaf(warp_sum(total), p.inverse_channels, p.norm_eps));
    const uint2 normed = pack4({y.x * factor * weight.x, y.y * factor * weight.y, y.z * factor * weight.z, y.w * factor * weight.w});
    if (mine) *reinterpret_cast<uint2*>(p.x + out_row * d + channel) = normed;
    if (p.quantize == kNone) return;

    const float4 v = unpack4(normed);
    const float values[4] = {v.x, v.y, v.z, v.w};
    uint32_t largest = max(max(magnitude_bits(v.x), magnitude_bits(v.y)), max(magnitude_bits(v.z), magnitude_bits(v.w)));
    if (p.quantize == kFp8) {
      const int exponent = fp8_exponent(warp_max(largest));
      const float inverse = power_of_two(-exponent);
      if (!mine) return;
      *reinterpret_cast<uint32_t*>(p.codes + out_row * d + channel) =
          pack_e4m3(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
      if (lane == 0) p.code_scale[out_row * ((d + 127) / 128) + channel / 128] = encode_e8m0(exponent);
    } else {
      const uint32_t of_block = warp_max<4>(largest);
      largest = warp_max(of_block);
      if (lane < cluster) send(&shared.largest[r][slot], &shared.barrier[2], lane, largest);
      barrier_wait(&shared.barrier[2]);
      largest = lane < slots ? shared.largest[r][lane] : 0u;
      if (kBlocks * kMaxCluster > 32 && lane + 32 < slots) largest = max(largest, shared.largest[r][lane + 32]);
      const float global_scale = nvfp4_global_scale(warp_max(largest));
      const Nvfp4Scale block_scale = nvfp4_block_scale(of_block, global_scale);
      if (channel == 0) p.global_scale[out_row] = global_scale;
      if (!mine) return;
      *reinterpret_cast<uint16_t*>(p.codes + (out_row * d + channel) / 2) = uint16_t(nvfp4_codes(values, block_scale));
      if (lane % 4 == 0) p.code_scale[(out_row * d + channel) / 16] = block_scale.code;
    }
  }
}

}  // namespace

// Named for the blocks of a CTA and the most rows of a cluster.
#define DSV4_HYPER(name, groups, blocks, rows) \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ HyperParams p) { hyper<groups, blocks, rows>(p); }
DSV4_HYPER(hc_pre_norm_1_1, 6, 1, 1)
DSV4_HYPER(hc_pre_norm_2_1, 6, 2, 1)
DSV4_HYPER(hc_pre_norm_4_1, 6, 4, 1)
DSV4_HYPER(hc_pre_norm_1_4, 6, 1, 4)
DSV4_HYPER(hc_pre_norm_2_4, 6, 2, 4)
DSV4_HYPER(hc_pre_norm_4_4, 6, 4, 4)
DSV4_HYPER(hc_head_norm_1_4, 1, 1, 4)
DSV4_HYPER(hc_head_norm_2_4, 1, 2, 4)
DSV4_HYPER(hc_head_norm_4_4, 1, 4, 4)

struct HyperPostParams {
  const void* streams;   // T [R, 4, D]
  const void* sublayer;  // T [R, D]
  const float* post;     // fp32 [R, 4]
  const float* comb;     // fp32 [R, 4, 4]
  void* new_streams;     // T [R, 4, D]
  int32_t rows, channels;
};

DSV4_D float4 load4(const uint2* from) { return unpack4(*from); }
DSV4_D float4 load4(const float4* from) { return *from; }
DSV4_D void store4(uint2* to, float4 x) { *to = pack4(x); }
DSV4_D void store4(float4* to, float4 x) { *to = x; }

// One thread: four channels of all streams. T4: four channels of bf16 (uint2) or fp32 (float4).
template <typename T4>
DSV4_D void hyper_post(const HyperPostParams& p) {
  const int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int vectors = p.channels / 4;
  const int64_t row = item / vectors;
  if (row >= p.rows) return;
  const int64_t at = row * kStreams * vectors + item % vectors;
  float4 x[kStreams];
#pragma unroll
  for (int m = 0; m < kStreams; ++m) x[m] = load4(static_cast<const T4*>(p.streams) + at + m * vectors);
  Mixing mixing;
  mixing.load(p.post, p.comb, row);
  after_sublayer(x, load4(static_cast<const T4*>(p.sublayer) + item), mixing);
#pragma unroll
  for (int m = 0; m < kStreams; ++m) store4(static_cast<T4*>(p.new_streams) + at + m * vectors, x[m]);
}

extern "C" __global__ void __launch_bounds__(128) hc_post_bf16(const __grid_constant__ HyperPostParams p) { start_after_previous(); hyper_post<uint2>(p); }
extern "C" __global__ void __launch_bounds__(128) hc_post_fp32(const __grid_constant__ HyperPostParams p) { start_after_previous(); hyper_post<float4>(p); }
