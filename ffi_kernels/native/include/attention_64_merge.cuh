// The end of decode attention for 64 heads at a time (sm90a/attention_64.cu): as `merge` of attention_merge.cuh, to which it is equal
// bit for bit, for a CTA that has many heads.
#pragma once

#include "attention_merge.cuh"

namespace dsv4 {

constexpr int kHeads = 64, kChannels = 512, kThreads = 256;  // of a CTA

// A slot is what a CTA of the cluster has left: a part, or a pair that it has joined; channels in the order of their places. The
// statistics come first and once: lane r kSlots + s has slot s of the r-th head that its warp merges.
template <int kParts, int kSlots>
DSV4_D void merge_slots(const AttentionParams& p, int row, int first_head, int rank) {
  constexpr int kAtOnce = kThreads * 4 / kChannels, kLoads = kSlots < 8 ? kSlots : 8;  // heads and slots at a time
  constexpr int kPair = kParts == 1 && kSlots > 1 ? 2 : 1;                             // slots that are joined
  const int place = int(threadIdx.x) * 4 % kChannels, channel = (place & ~63) + place % 16 * 4 + place % 64 / 16 * 4;
  const int end = min((rank + 1) * kHeads / kSlots, p.heads - first_head), lane = lane_id();
  int head = rank * kHeads / kSlots + int(threadIdx.x) * 4 / kChannels;
  if (head >= end) return cluster_arrive();
  const auto load = [&](int head, int first, float4 (&outs)[kLoads]) {
    const uint32_t from = address_in_shared(p.output + output_at<kHeads, 4>(head, place));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) outs[i] = load_peer4(peer_address(from, first + i));
  };
  float4 outs[kLoads];
  load(head, 0, outs);

  const int counted = 4 * min(head + lane / kSlots * kAtOnce, end - 1);
  float largest = load_peer(peer_address(address_in_shared(p.largest + counted), lane % kSlots)), own = 1.0f;
  float total = load_peer(peer_address(address_in_shared(p.total + counted), lane % kSlots));
  if (kPair == 2) {
    const Join both(largest, __shfl_xor_sync(kAll, largest, 1));
    total = both.total(total, __shfl_xor_sync(kAll, total, 1));
    own = both.own, largest = both.largest;
  }
  float most = largest;
#pragma unroll
  for (int offset = kSlots / 2; offset >= kPair; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
  const float factor = rescale(largest, most);
  total *= factor;
#pragma unroll
  for (int offset = kSlots / 2; offset >= kPair; offset /= 2) total += __shfl_xor_sync(kAll, total, offset);

#pragma unroll 1
  for (int from = 0; head < end; head += kAtOnce, from += kSlots) {  // from: the lane of the head's first slot
    float4 sum = {};
#pragma unroll
    for (int first = 0; first < kSlots; first += kLoads) {
      if (first) load(head, first, outs);
#pragma unroll
      for (int i = 0; i < kLoads; i += kPair) {
        const int slot = from + first + i;
        float4 x = outs[i];
        if (kPair == 2) {
          const float4 y = outs[i + 1];
          const float a = __shfl_sync(kAll, own, slot), b = __shfl_sync(kAll, own, slot + 1);
          x = {join(x.x, a, y.x, b), join(x.y, a, y.y, b), join(x.z, a, y.z, b), join(x.w, a, y.w, b)};
        }
        const float weight = __shfl_sync(kAll, factor, slot);
        sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
        sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
      }
    }
    if (head + kAtOnce < end)
      load(head + kAtOnce, 0, outs);
    else
      cluster_arrive();  // before the stores, for which it would wait
    leave(p, row, first_head + head, channel, sum, __shfl_sync(kAll, most, from), __shfl_sync(kAll, total, from), head);
  }
}

template <int kParts>
DSV4_D void merge_heads(const AttentionParams& p, int row, int first_head, int rank) {
  switch (p.cluster_log2) {
    case 0: merge_slots<kParts, 1>(p, row, first_head, rank); break;
    case 1: merge_slots<kParts, 2>(p, row, first_head, rank); break;
    case 2: merge_slots<kParts, 4>(p, row, first_head, rank); break;
    default: merge_slots<kParts, 8>(p, row, first_head, rank);
  }
}

}  // namespace dsv4
