// The end of sparse decode attention (cuda/attention.cu): the CTAs of a cluster add up their parts of the softmax and of the
// output by distributed shared memory. Also the arithmetic of scores in log2 units, shared with the softmax of a tile.
#pragma once

#include "attention.cuh"

namespace dsv4 {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr float kLn2 = 0.693147180559945309f, kLog2e = 1.44269504088896341f;

DSV4_D int rank_of(const AttentionParams& p) { return blockIdx.x & ((1 << p.cluster_log2) - 1); }

DSV4_D float infinity() { return bits_float(kInfBits); }

// 2**x; a result below 2**-126 is zero.
DSV4_D float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What exponents are taken relative to: the largest score, or 0 where it is no number to subtract.
DSV4_D float base_of(float largest) { return magnitude_bits(largest) < kInfBits ? largest : 0.0f; }

// The factor of what was summed relative to the old largest score.
DSV4_D float rescale(float old_largest, float new_largest) {
  return old_largest == -infinity() ? 0.0f : exp2(base_of(old_largest) - base_of(new_largest));
}

// Where a CTA leaves its output for the others: 16-byte chunks of 4 channels, rows of one head and warp.
template <int kHeads, int kSplit>
DSV4_D uint32_t output_at(int head, int channel) {
  constexpr int width = kPart<kSplit>;
  return ((channel / width * kHeads + head) * width + ((channel % width / 4) ^ ((head & 3) << 1)) * 4) * 4;
}

// One more part behind those that are summed up: what brings either to the larger of their largest scores. A chain is up to
// kMaxChain neighbouring parts, always added in this order and way, in the registers of a CTA that took all as between CTAs.
struct Link {
  float largest, before, own;  // of all; factor of the sum before; factor of the part

  DSV4_D Link(float largest_before, float largest_own) : largest(fmaxf(largest_before, largest_own)) {
    before = rescale(largest_before, largest), own = rescale(largest_own, largest);
  }
};

DSV4_D float linked(float sum, float before, float x, float own) { return fmaf(x, own, __fmul_rn(sum, before)); }

// The softmax of the slots of which the outputs are added up. A slot is a part, of chains of kChain parts, or it is a chain that
// somebody has added up (kChain 1). Lanes share them out: lane i has slot i % kSlots.
template <int kChain, int kSlots>
struct Slots {
  float most, total;  // of all
  float before, own;  // of the lane's slot in its chain: Link
  float factor;       // what brings this chain to the largest score of all

  DSV4_D Slots(float largest, float total_of_slot) : total(total_of_slot), before(0.0f), own(1.0f) {
    if (kChain > 1) {
      const int place = lane_id() % kChain, last = lane_id() | (kChain - 1);
      float chain = largest;  // the largest up to this part
#pragma unroll
      for (int offset = 1; offset < kChain; offset *= 2) {
        const float other = __shfl_up_sync(kAll, chain, offset);
        if (place >= offset) chain = fmaxf(chain, other);
      }
      const float previous = __shfl_up_sync(kAll, chain, 1);
      if (place > 0) before = rescale(previous, chain), own = rescale(largest, chain);
#pragma unroll
      for (int i = 1; i < kChain; ++i) {
        const float sum = __shfl_up_sync(kAll, total, 1);
        if (place == i) total = linked(sum, before, total, own);
      }
      largest = __shfl_sync(kAll, chain, last), total = __shfl_sync(kAll, total, last);
    }
    most = largest;
#pragma unroll
    for (int offset = kSlots / 2; offset >= kChain; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
    factor = rescale(largest, most);
    total = __fmul_rn(total, factor);
#pragma unroll
    for (int offset = kSlots / 2; offset >= kChain; offset /= 2) total += __shfl_xor_sync(kAll, total, offset);
  }

  // sum += outputs of the slots from `first` on, in order.
  template <int kCount>
  DSV4_D void add(int first, const float4 (&outs)[kCount], float4& sum) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kChain) {
      float4 x = outs[i];
#pragma unroll
      for (int k = 1; k < kChain; ++k) {
        const float4 y = outs[i + k];
        const float a = __shfl_sync(kAll, before, first + i + k), b = __shfl_sync(kAll, own, first + i + k);
        x = {linked(x.x, a, y.x, b), linked(x.y, a, y.y, b), linked(x.z, a, y.z, b), linked(x.w, a, y.w, b)};
      }
      const float weight = __shfl_sync(kAll, factor, first + i);
      sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
      sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
    }
  }
};

// Where part `slot` of the cluster lies in its CTA, with two teams of two parts each: behind what is at the same place of the first part.
template <int kParts>
DSV4_D uint32_t beside(const AttentionParams& p, int slot, uint32_t bytes) {
  return kParts == 1 ? 0 : slot / 2 % 2 * p.team_bytes + slot % 2 * bytes;
}

// Sum over the parts of the cluster, of which a CTA has kParts, of their outputs at `from`. `largest` and `total` lie beside: those of
// all come back.
template <int kHeads, int kParts, int kSlots>
DSV4_D float4 sum_slots(const AttentionParams& p, uint32_t from, uint32_t largest_at, uint32_t total_at, float& most, float& total) {
  const int slot = lane_id() % kSlots;
  const uint32_t statistics = beside<kParts>(p, slot, 4 * kHeads);
  const float largest = load_peer(peer_address(largest_at + statistics, slot / kParts));
  const Slots<(kSlots < kMaxChain ? kSlots : kMaxChain), kSlots> slots(largest, load_peer(peer_address(total_at + statistics, slot / kParts)));
  most = slots.most, total = slots.total;
  float4 outs[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) outs[i] = load_peer4(peer_address(from + beside<kParts>(p, i, 4 * kHeads * p.channels), i / kParts));
  float4 sum = {};
  slots.add(0, outs, sum);
  return sum;
}

// Of the two pairs of channels that a thread finishes, from `channel` and from kSecond further on.
struct Angles {
  float cos[2], sin[2];
};

template <int kSecond = 2, class Params>
DSV4_D Angles angles_of(const Params& p, int channel, const float* cos, const float* sin) {
  Angles found = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int turned = channel + i * kSecond - (p.channels - p.rope);
    if (turned >= 0) found.cos[i] = cos[turned / 2], found.sin[i] = sin[turned / 2];
  }
  return found;
}

// Two pairs of channels of head and row `to` from the sum over all parts: divides, rotates back, stores. Roundings are spelt out,
// because several kernels do the same.
template <int kSecond = 2, class Params>
DSV4_D void finish(const Params& p, size_t to, int channel, const float4& sum, float most, float total, float sink, const Angles& angles) {
  if (p.lse != nullptr && channel == 0) p.lse[to] = fmaf(base_of(most), kLn2, logf(total));
  total += exp2(fmaf(sink, kLog2e, -base_of(most)));
  const float inverse = 1.0f / (total == 0.0f ? 1.0f : total);
  const float x[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
    if (channel + i * kSecond < p.channels - p.rope) continue;
    const float a = round_bf16(x[2 * i]), b = round_bf16(x[2 * i + 1]), cos = angles.cos[i], sin = angles.sin[i];
    pairs[i] = pack_bf16(fmaf(a, cos, __fmul_rn(b, sin)), fmaf(b, cos, -__fmul_rn(a, sin)));
  }
  uint16_t* const out = p.out + to * p.channels + channel;
  if constexpr (kSecond == 2) {
    *reinterpret_cast<uint2*>(out) = {pairs[0], pairs[1]};
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) *reinterpret_cast<uint32_t*>(out + i * kSecond) = pairs[i];
  }
}

// The same from the sum over the parts of this cluster, if there are no others; else leaves it for them. `sink` counts the CTA's heads.
DSV4_D void leave(const AttentionParams& p, int row, int head, int channel, const float4& sum, float most, float total, int sink) {
  if (p.partial == nullptr) {
    const float* cos = &in_shared<float>(p.angles);
    const Angles angles = angles_of(p, channel, cos, cos + p.rope / 2);
    return finish(p, size_t(row) * p.heads + head, channel, sum, most, total, in_shared<float>(p.sinks + 4 * sink), angles);
  }
  const size_t to = (size_t(row) * (gridDim.x >> p.cluster_log2) + (blockIdx.x >> p.cluster_log2)) * p.heads + head;
  *reinterpret_cast<float4*>(p.partial + to * p.channels + channel) = sum;
  if (channel == 0) p.partial_softmax[to] = {most, total};
}

// For this CTA's share of the heads: sums the parts of the cluster and leaves the result. A thread takes 4 channels of every
// fourth head. Arrives at the barrier of the cluster once it has read all parts, before it stores: the arrival would wait for that.
template <int kHeads, int kSplit>
DSV4_D void merge(const AttentionParams& p, int row, int first_head, int pass, int rank) {
  constexpr int parts = kSplit == 4 ? 1 : 4;  // of a CTA
  const int share = kHeads >> p.cluster_log2, width = p.channels / 4, thread = threadIdx.x;
  const int group = (thread >= width) + (thread >= 2 * width) + (thread >= 3 * width);
  const int channel = 4 * (thread - group * width);
  const int end = min((rank + 1) * share, p.heads - first_head);
  int local = rank * share + group;
  if (local >= end) cluster_arrive();
#pragma unroll 1
  for (; local < end; local += 4) {
    const int head = first_head + local;
    const uint32_t from = address_in_shared(p.output + output_at<kHeads, kSplit>(local, channel));
    const uint32_t largest_at = address_in_shared(p.largest + 4 * local), total_at = address_in_shared(p.total + 4 * local);
    float most, total;
    float4 sum;
    switch (p.cluster_log2) {
      case 0: sum = sum_slots<kHeads, parts, parts>(p, from, largest_at, total_at, most, total); break;
      case 1: sum = sum_slots<kHeads, parts, 2 * parts>(p, from, largest_at, total_at, most, total); break;
      case 2: sum = sum_slots<kHeads, parts, (parts == 1 ? 4 : 8)>(p, from, largest_at, total_at, most, total); break;
      default: sum = sum_slots<kHeads, parts, 8>(p, from, largest_at, total_at, most, total);
    }
    if (local + 4 >= end) cluster_arrive();
    leave(p, row, head, channel, sum, most, total, pass * kHeads + local);
  }
}

// A token that does not count yields zeros and an lse of -inf.
template <int kHeads>
DSV4_D void store_nothing(const AttentionParams& p, int row, int rank) {
  if (p.partial != nullptr) return;  // decode_attention_join does it
  const int share = kHeads * p.passes >> p.cluster_log2, first = blockIdx.y * kHeads * p.passes + rank * share, count = min(share, p.heads - first);
  for (int i = threadIdx.x; i < count * p.channels / 8; i += blockDim.x)
    reinterpret_cast<uint4*>(p.out + (size_t(row) * p.heads + first) * p.channels)[i] = {};
  if (p.lse != nullptr && int(threadIdx.x) < count) p.lse[size_t(row) * p.heads + first + threadIdx.x] = -infinity();
}

}  // namespace dsv4
