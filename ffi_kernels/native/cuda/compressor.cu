// The compressor of a decode step (ffi_kernels/compressor.py): the rows that wait for commit and, where the open block
// closes, its entry: pooled, normed, rotated, and written in the format of the cache. At most one block closes, because a
// decode step has at most four tokens. Further CTAs of the same launch make the latent projections ready, which depend on
// nothing here. Not here: the products before all this, the copy into the rings (entries.cu).
//
// The weights of the pooling are __expf of scores x below their maximum, wrong by about |x| 2**-23 of themselves, and their
// quotient is __fdividef: both are far below the rounding to bf16 that follows.
#include "dependent.cuh"
#include "latent_rows.cuh"

using namespace dsv4;

constexpr int kMaxJobs = 2;  // the entries and the index keys of one layer
constexpr int kMaxTokens = 4;
constexpr int kThreads = 256;

struct JobInputs {
  const float* kv;              // [B, T, channels]
  const float* score;           // [B, T, channels], without ape
  const float* ape;             // [ratio, channels]
  const float* state_kv;        // [B, ring, channels]: 8 rows (ratio 4) or 128 (ratio 128), position p in row p % ring
  const float* state_score;     // [B, ring, channels]
  const uint16_t* norm_weight;  // bf16 [width]
  const void* before;           // the cache; JobOutputs::entries is the same memory
  const void* before_scale;
};

struct JobOutputs {
  uint8_t* entries;      // bf16 [B, capacity, width] | FP8KVCache.data | MXFP4Tensor.data
  uint8_t* scale;        // null | the scales of either
  float* pending_score;  // [B, T, channels] score + ape
};

struct JobShape {
  int32_t width;     // channels of an entry
  int32_t capacity;  // entries
  int32_t format;    // EntryFormat
  int32_t scales;    // scale bytes of an entry
  float hadamard_scale;
};

struct CompressParams {
  JobInputs in[kMaxJobs];
  const float* cos;  // [B, 1, rope/2], at the position of the entry
  const float* sin;
  const int32_t* start;   // [B]
  const int32_t* length;  // [B]
  LatentInputs latent_in;
  JobOutputs out[kMaxJobs];
  LatentOutputs latent_out;
  JobShape shape[kMaxJobs];
  int32_t sequences, jobs, tokens, rope;
  float eps;
  LatentShape latent;  // rows 0 for none
};

// Where a sequence stands. Positions are int32 and wrap around, as they do in arrays.
struct Block {
  uint32_t start;
  int index;    // of the entry
  int phase;    // rows of the block that lie in the ring; the others are the first of the new tokens
  bool closes;  // among the tokens that count (all its rows are there), and the entry has a place
};

template <int ratio>
DSV4_D Block open_block(const CompressParams& p, int sequence, int capacity) {
  Block block;
  block.start = uint32_t(p.start[sequence]);
  block.index = int(block.start) >> (ratio == 4 ? 2 : 7);  // rounds down
  block.phase = int(block.start % ratio);
  const int end = int(block.start + uint32_t(min(p.length[sequence], p.tokens)));
  block.closes = int((uint32_t(block.index) + 1) * ratio) <= end && block.index >= 0 && block.index < capacity;
  return block;
}

// score + ape of `count` tokens of a sequence from token `first` on, four channels to a thread, which a CTA has enough of.
template <int ratio, int most>
DSV4_D void pending_scores(const JobInputs& in, const JobOutputs& out, const Block& block, int sequence, int tokens, int first,
                           int count, int channels) {
  const int at = 4 * int(threadIdx.x);
  if (at >= channels) return;
  const size_t row = size_t(sequence) * tokens + first;
  float4 score[most], ape[most];
#pragma unroll
  for (int i = 0; i < most; ++i)
    if (i < count) {
      const uint32_t position = block.start + uint32_t(first + i);
      score[i] = *reinterpret_cast<const float4*>(in.score + (row + i) * channels + at);
      ape[i] = __ldg(reinterpret_cast<const float4*>(in.ape + (position % ratio) * channels + at));
    }
#pragma unroll
  for (int i = 0; i < most; ++i)
    if (i < count) {
      float4* const to = reinterpret_cast<float4*>(out.pending_score + (row + i) * channels + at);
      *to = make_float4(score[i].x + ape[i].x, score[i].y + ape[i].y, score[i].z + ape[i].z, score[i].w + ape[i].w);
    }
}

// What the entry's warp needs besides the pooled channels; loaded before they are there.
struct Finish {
  WarpRow weight;
  RowAngles angles;

  DSV4_D void load(const CompressParams& p, const JobInputs& in, int sequence, int width) {
    weight.width = width;
    weight.load(in.norm_weight);
    const size_t at = size_t(sequence) * (p.rope / 2);
    angles.load(p.cos + at, p.sin + at, width, p.rope);
  }

  // pooled [width] fp32 in shared memory -> entry `row` of the cache; one warp.
  DSV4_D void store(const CompressParams& p, const JobOutputs& out, const JobShape& shape, const float* pooled, size_t row) {
    WarpRow x;
    x.width = shape.width;
    x.round_from(pooled);
    x.norm(&weight, p.eps);
    angles.rotate(x);
    if (shape.format == kFp8Entry) {
      x.store_fp8(out.entries + row * (shape.width + p.rope), out.scale + row * shape.scales, p.rope, shape.scales);
    } else if (shape.format == kFp4Entry) {
      x.hadamard(shape.hadamard_scale);
      x.store_fp4(out.entries + row * (shape.width / 2), out.scale + row * shape.scales);
    } else {
      x.store_plain(reinterpret_cast<uint16_t*>(out.entries) + row * shape.width);
    }
  }
};

// --- ratio 4: eight rows, one CTA per sequence and job --------------------------------------------------------------

// Pools two channels per thread: the rows of the block before with the first half of the channels, this block's with the
// second half. The rows of the block before always lie in the ring, this block's in the ring or among the new tokens.
extern "C" __global__ void __launch_bounds__(kThreads, 1) compress_append_4(const __grid_constant__ CompressParams p) {
  __shared__ __align__(16) float pooled[kRowChannels];
  start_after_previous();
  const int work = p.sequences * p.jobs - int(blockIdx.x) - 1;
  if (work < 0) return latent_row(p.latent_in, p.latent_out, p.latent, -1 - work);
  const int job = work >= p.sequences, sequence = work - job * p.sequences, tokens = p.tokens;
  const JobInputs& in = p.in[job];
  const JobOutputs& out = p.out[job];
  const JobShape& shape = p.shape[job];
  const int width = shape.width, channels = 2 * width, at = 2 * int(threadIdx.x);
  const Block block = open_block<4>(p, sequence, shape.capacity);

  const auto store_pending = [&] { pending_scores<4, kMaxTokens>(in, out, block, sequence, tokens, 0, tokens, channels); };
  if (!block.closes) return store_pending();  // most steps end here

  // What an entry needs is on its way before anything is stored.
  Finish finish;
  float2 kv[8], score[8], ape[4];
  if (warp_id() == 0) finish.load(p, in, sequence, width);
  if (at < width) {
    // Rows follow each other in either place, so that one offset each leads to all of them.
    const int half = 4 * (block.index & 1);
    const int64_t before = (int64_t(sequence) * 8 + (4 - half)) * channels + at;
    const int64_t ring = (int64_t(sequence) * 8 + half) * channels + width + at;
    const int64_t fresh = (int64_t(sequence) * tokens - block.phase) * channels + width + at;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = i * channels;
      const bool old = i < block.phase;
      const auto pair = [step](const float* from, int64_t offset) { return *reinterpret_cast<const float2*>(from + offset + step); };
      kv[i] = pair(in.state_kv, before);
      score[i] = pair(in.state_score, before);
      kv[4 + i] = pair(old ? in.state_kv : in.kv, old ? ring : fresh);
      score[4 + i] = pair(old ? in.state_score : in.score, old ? ring : fresh);
      ape[i] = pair(in.ape, width + at);
    }
  }
  store_pending();

  if (at < width) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (block.index == 0) score[i] = {-INFINITY, -INFINITY};  // there is no block before
      if (i >= block.phase) score[4 + i].x += ape[i].x, score[4 + i].y += ape[i].y;
    }
    float2 top = score[0], sum = {0.0f, 0.0f}, total = {0.0f, 0.0f};
#pragma unroll
    for (int i = 1; i < 8; ++i) top = {fmaxf(top.x, score[i].x), fmaxf(top.y, score[i].y)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 weight = {__expf(score[i].x - top.x), __expf(score[i].y - top.y)};
      sum.x += weight.x, sum.y += weight.y;
      total.x = fmaf(weight.x, kv[i].x, total.x), total.y = fmaf(weight.y, kv[i].y, total.y);
    }
    *reinterpret_cast<float2*>(pooled + at) = {__fdividef(total.x, sum.x), __fdividef(total.y, sum.y)};
  }
  __syncthreads();
  if (warp_id() == 0) finish.store(p, out, shape, pooled, size_t(sequence) * shape.capacity + block.index);
}

// --- ratio 128: a cluster per sequence, each CTA pools an eighth of the channels ------------------------------------

constexpr int kCluster = 8, kLanes = 16, kGroups = kThreads / kLanes, kRowsEach = 128 / kGroups;

// Softmax pooling of some rows of one channel: their largest score, the sum of exp(score - top), and of that times kv.
struct Pool {
  float top, sum, total;
};

// Thread (group, lane) pools rows group, group + 16, ... of the channels 4 lane .. 4 lane + 3 of its CTA.
extern "C" __global__ void __launch_bounds__(kThreads, 1) compress_append_128(const __grid_constant__ CompressParams p) {
  __shared__ __align__(16) float pooled[kRowChannels];  // of the first CTA, written by all
  __shared__ Pool parts[kGroups][4 * kLanes + 1];
  start_after_previous();
  const int work = p.sequences * p.jobs - int(blockIdx.x) / kCluster - 1;
  if (work < 0) return latent_row(p.latent_in, p.latent_out, p.latent, int(blockIdx.x) - kCluster * p.sequences * p.jobs);
  const int job = work >= p.sequences, sequence = work - job * p.sequences, tokens = p.tokens, rank = int(cluster_rank());
  const JobInputs& in = p.in[job];
  const JobOutputs& out = p.out[job];
  const JobShape& shape = p.shape[job];
  const int width = shape.width, each = width / kCluster, lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
  const Block block = open_block<128>(p, sequence, shape.capacity);
  const auto store_pending = [&] {  // a token to a CTA
    if (rank < tokens) pending_scores<128, 1>(in, out, block, sequence, tokens, rank, 1, width);
  };
  if (!block.closes) return store_pending();  // as the whole cluster does, in most steps

  cluster_arrive();  // its wait says that every CTA runs, so that its shared memory may be written
  // What an entry needs is on its way before anything is stored.
  Finish finish;
  float4 kv[kRowsEach], score[kRowsEach], ape[kRowsEach];  // ape zero where the ring holds the sum
  if (rank == 0 && warp_id() == 0) finish.load(p, in, sequence, width);
  if (4 * lane < each) {
    const int64_t place = int64_t(group) * width + rank * each + 4 * lane;
    const int64_t ring = int64_t(sequence) * 128 * width + place;
    const int64_t fresh = (int64_t(sequence) * tokens - block.phase) * width + place;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int step = i * kGroups * width;
      const bool old = i * kGroups + group < block.phase;
      const auto four = [step](const float* from, int64_t offset) { return *reinterpret_cast<const float4*>(from + offset + step); };
      kv[i] = four(old ? in.state_kv : in.kv, old ? ring : fresh);
      score[i] = four(old ? in.state_score : in.score, old ? ring : fresh);
      ape[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (!old) ape[i] = four(in.ape, place);
    }
  }
  store_pending();

  if (4 * lane < each) {
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i)
      score[i].x += ape[i].x, score[i].y += ape[i].y, score[i].z += ape[i].z, score[i].w += ape[i].w;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const auto of = [c](const float4& x) { return c == 0 ? x.x : c == 1 ? x.y : c == 2 ? x.z : x.w; };
      Pool part = {of(score[0]), 0.0f, 0.0f};
#pragma unroll
      for (int i = 1; i < kRowsEach; ++i) part.top = fmaxf(part.top, of(score[i]));
      const float top = part.top == -INFINITY ? 0.0f : part.top;  // rows that are all dropped weigh nothing
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
        const float weight = __expf(of(score[i]) - top);
        part.sum += weight;
        part.total = fmaf(weight, of(kv[i]), part.total);
      }
      parts[group][4 * lane + c] = part;
    }
  }
  __syncthreads();
  cluster_wait();
  if (int(threadIdx.x) < each) {
    const int channel = int(threadIdx.x);
    float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) top = fmaxf(top, parts[g][channel].top);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Pool part = parts[g][channel];
      const float weight = __expf(part.top - top);
      sum = fmaf(weight, part.sum, sum);
      total = fmaf(weight, part.total, total);
    }
    store_peer(peer_address(shared_address(pooled + rank * each + channel), 0), __fdividef(total, sum));
  }
  __syncwarp();  // the barrier takes whole warps
  cluster_arrive();
  if (rank != 0) return;
  cluster_wait();
  if (warp_id() == 0) finish.store(p, out, shape, pooled, size_t(sequence) * shape.capacity + block.index);
}
