// The second launch of sparse decode attention, where one follows: adds up what the CTAs of the first have left in device memory, of
// several clusters (cuda/attention.cu) or each for itself (sm90a/attention_64.cu). Grid (H, T, B), a thread to 4 channels.
#pragma once

#include "attention_merge.cuh"

namespace dsv4 {

struct JoinParams {
  const float* partial;          // of AttentionParams
  const float2* partial_softmax;
  const float* sink;             // [H]
  const int32_t* length;         // [B]
  const float* cos;              // [B, T, R/2]
  const float* sin;              // [B, T, R/2]
  uint16_t* out;                 // bf16 [B, T, H, K]
  float* lse;                    // [B, T, H] or null
  int32_t heads, channels, rope, clusters;
};

// A CTA for 64 heads leaves an image of its output, fp32 [2][2][64 heads][128]: half of the channels of a warpgroup;
// warpgroup; head; places in the order in which threads have them. So `partial` is
// [B, T, clusters, slots, groups of 64 heads, image], `partial_softmax` [B, T, clusters, slots, 64 groups].
struct Join64Params : JoinParams {
  int32_t slots, parts;  // what each cluster has left: slots of one part, or of a chain of so many
};
constexpr int kMaxClusters = 7;                           // _CLUSTERS in decode_attention.py
constexpr int kHeads = 64, kChannels = 512;               // of a CTA that leaves an image
constexpr int kImage = kHeads * kChannels, kBlock = 128;  // numbers in an image; and in each of its rows

// What clusters have left, relative to the largest score of all.
struct Clusters {
  float most, total = 0.0f;
  float4 sum = {};

  DSV4_D explicit Clusters(float largest) : most(largest) {}
  DSV4_D void add(const float4& out, float2 softmax) {  // in order
    const float factor = rescale(softmax.x, most);
    total = fmaf(factor, softmax.y, total);
    sum.x = fmaf(factor, out.x, sum.x), sum.y = fmaf(factor, out.y, sum.y);
    sum.z = fmaf(factor, out.z, sum.z), sum.w = fmaf(factor, out.w, sum.w);
  }
};

// Of clusters that have added up their parts.
DSV4_D void join_clusters(const JoinParams& p) {
  const int row = blockIdx.z * gridDim.y + blockIdx.y, channel = 4 * threadIdx.x;
  const size_t to = size_t(row) * p.heads + blockIdx.x;
  if (int(blockIdx.y) >= p.length[blockIdx.z]) {
    *reinterpret_cast<uint2*>(p.out + to * p.channels + channel) = {};
    if (p.lse != nullptr && channel == 0) p.lse[to] = -infinity();
    return;
  }
  float4 outs[kMaxClusters];
  float2 softmax[kMaxClusters];
#pragma unroll
  for (int i = 0; i < kMaxClusters; ++i) {
    const size_t from = (size_t(row) * p.clusters + min(i, p.clusters - 1)) * p.heads + blockIdx.x;
    outs[i] = *reinterpret_cast<const float4*>(p.partial + from * p.channels + channel);
    softmax[i] = i < p.clusters ? p.partial_softmax[from] : float2{-infinity(), 0.0f};
  }
  __syncwarp();  // all loads are in flight: the compiler does not move them behind the branches on `clusters`
  float most = softmax[0].x;
#pragma unroll
  for (int i = 1; i < kMaxClusters; ++i) most = fmaxf(most, softmax[i].x);
  Clusters all(most);
#pragma unroll
  for (int i = 0; i < kMaxClusters; ++i) {
    if (i >= p.clusters) break;
    all.add(outs[i], softmax[i]);
  }
  const size_t angles = size_t(row) * (p.rope / 2);
  finish(p, to, channel, all.sum, most, all.total, p.sink[blockIdx.x], angles_of(p, channel, p.cos + angles, p.sin + angles));
}

// Of CTAs for 64 heads: those of a cluster as `merge` does it, and the clusters, if there are several, as above. The loads of a
// cluster are in flight at once, and those of the next one.
template <bool kSeveral, int kChain, int kSlots>
DSV4_D void join_slots(const Join64Params& p) {
  const int row = blockIdx.z * gridDim.y + blockIdx.y, head = blockIdx.x, groups = (p.heads + kHeads - 1) / kHeads;
  const int block = warp_id(), chunk = lane_id(), half = kBlock * (block / 2), c = chunk % 4;
  // The thread that left the chunk had places 2 c, 2 c + 1 of 8, and of the next 8: `store_row` of attention_64.cu says which channels.
  const int channel = block % 2 * (kChannels / 2) + half + chunk / 16 * kSlice + c / 2 * 16 + chunk / 4 % 4 * 4 + c % 2 * 2;
  const size_t first = size_t(row) * p.clusters * kSlots * groups, to = size_t(row) * p.heads + head;
  const float* const from = p.partial + (first + head / kHeads) * kImage + (block * kHeads + head % kHeads) * kBlock + 4 * lane_id();
  const float2* const softmax = p.partial_softmax + first * kHeads + head + lane_id() % kSlots * groups * kHeads;
  const auto load = [&](int cluster, float4 (&outs)[kSlots]) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      outs[i] = load_now(reinterpret_cast<const float4*>(from + size_t(cluster * kSlots + i) * groups * kImage));
  };
  const int length = load_now(p.length + blockIdx.z);
  float4 outs[kSlots];
  load(0, outs);
  float2 own = load_now(softmax);
  const float sink = load_now(p.sink + head);
  Angles angles;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int turned = row * (p.rope / 2) + max(0, channel + 32 * i - (p.channels - p.rope)) / 2;
    angles.cos[i] = load_now(p.cos + turned), angles.sin[i] = load_now(p.sin + turned);
  }
  if (int(blockIdx.y) >= length) {
#pragma unroll
    for (int i = 0; i < 2; ++i) *reinterpret_cast<uint32_t*>(p.out + to * p.channels + channel + 32 * i) = 0;
    if (p.lse != nullptr && channel == 0) p.lse[to] = -infinity();
    return;
  }
  if (!kSeveral) {
    const Slots<kChain, kSlots> slots(own.x, own.y);
    float4 sum = {};
    slots.add(0, outs, sum);
    return finish<32>(p, to, channel, sum, slots.most, slots.total, sink, angles);
  }
  float most = own.x;
  for (int i = 1; i < p.clusters; ++i) most = fmaxf(most, softmax[i * kSlots * groups * kHeads].x);
#pragma unroll
  for (int offset = kSlots / 2; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
  Clusters all(most);
#pragma unroll 1
  for (int i = 0; i < p.clusters; ++i) {
    float4 next[kSlots];
    const float2 mine = own;
    if (i + 1 < p.clusters) load(i + 1, next), own = softmax[(i + 1) * kSlots * groups * kHeads];
    const Slots<kChain, kSlots> slots(mine.x, mine.y);
    float4 sum = {};
    slots.add(0, outs, sum);
    all.add(sum, {slots.most, slots.total});
#pragma unroll
    for (int k = 0; k < kSlots; ++k) outs[k] = next[k];
  }
  finish<32>(p, to, channel, all.sum, most, all.total, sink, angles);
}

template <bool kSeveral>
DSV4_D void join_images(const Join64Params& p) {
  if (p.slots == 1) return join_slots<kSeveral, 1, 1>(p);
  if (p.parts > 1) return join_slots<kSeveral, 1, 2>(p);
  switch (p.slots) {
    case 2: return join_slots<kSeveral, 2, 2>(p);
    case 4: return join_slots<kSeveral, 4, 4>(p);
    default: return join_slots<kSeveral, 4, 8>(p);
  }
}

}  // namespace dsv4
