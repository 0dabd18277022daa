// The end of sparse decode attention (cuda/attention.cu): the CTAs of a cluster add up their parts of the softmax and of the
// output by distributed shared memory. Also the arithmetic of scores in log2 units, shared with the softmax of a tile.
#pragma once

#include "attention.cuh"

namespace dsv4 {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr float kLn2 = 0.693147180559945309f, kLog2e = 1.44269504088896341f;

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
template <int kHeads>
DSV4_D uint32_t output_at(int head, int channel) {
  return ((channel / kPart * kHeads + head) * kPart + ((channel % kPart / 4) ^ ((head & 3) << 1)) * 4) * 4;
}

// Sum over the parts, in rank order, of their outputs at `from`, times what brings them to the largest score of all.
// `largest` and `total` lie beside: those of all parts come back.
template <int kParts>
DSV4_D float4 sum_parts(uint32_t from, uint32_t largest_at, uint32_t total_at, float& most, float& total) {
  float4 outs[kParts], sum = {};
  const uint32_t peer = lane_id() % kParts;  // lanes share out the statistics
  const float largest = load_peer(peer_address(largest_at, peer));
  total = load_peer(peer_address(total_at, peer));
#pragma unroll
  for (int i = 0; i < kParts; ++i) outs[i] = load_peer4(peer_address(from, i));
  most = largest;
#pragma unroll
  for (int offset = kParts / 2; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
  const float factor = rescale(largest, most);
  total = warp_sum<kParts>(total * factor);
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float weight = __shfl_sync(kAll, factor, i);
    sum.x += weight * outs[i].x, sum.y += weight * outs[i].y, sum.z += weight * outs[i].z, sum.w += weight * outs[i].w;
  }
  return sum;
}

// For this CTA's share of the heads: sums the parts, divides, rotates back, stores. A thread takes 4 channels of every
// kSplit-th head.
template <int kHeads>
DSV4_D void merge(const AttentionParams& p, int row, int first_head, int rank) {
  const int share = kHeads >> p.parts_log2, width = p.channels / 4, thread = threadIdx.x;
  const int group = (thread >= width) + (thread >= 2 * width) + (thread >= 3 * width);
  const int channel = 4 * (thread - group * width);
#pragma unroll 1
  for (int local = rank * share + group; local < (rank + 1) * share; local += kSplit) {
    const int head = first_head + local;
    if (head >= p.heads) continue;
    const uint32_t from = address_in_shared(p.output + output_at<kHeads>(local, channel));
    const uint32_t largest_at = address_in_shared(p.largest + 4 * local), total_at = address_in_shared(p.total + 4 * local);
    float most, total;
    float4 sum;
    switch (p.parts_log2) {
      case 0: sum = sum_parts<1>(from, largest_at, total_at, most, total); break;
      case 1: sum = sum_parts<2>(from, largest_at, total_at, most, total); break;
      case 2: sum = sum_parts<4>(from, largest_at, total_at, most, total); break;
      case 3: sum = sum_parts<8>(from, largest_at, total_at, most, total); break;
      default: sum = sum_parts<16>(from, largest_at, total_at, most, total);
    }
    const size_t to = size_t(row) * p.heads + head;
    if (p.lse != nullptr && channel == 0) p.lse[to] = base_of(most) * kLn2 + logf(total);
    total += exp2(p.sink[head] * kLog2e - base_of(most));
    const float inverse = 1.0f / (total == 0.0f ? 1.0f : total);
    float x[4] = {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int turned = channel + i - (p.channels - p.rope);
      if (turned < 0) continue;
      const float a = round_bf16(x[i]), b = round_bf16(x[i + 1]);
      const float cos = in_shared<float>(p.angles + 2 * turned), sin = in_shared<float>(p.angles + 2 * (p.rope + turned));
      x[i] = a * cos + b * sin;
      x[i + 1] = b * cos - a * sin;
    }
    *reinterpret_cast<uint2*>(p.out + to * p.channels + channel) = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
  }
}

// A token that does not count yields zeros and an lse of -inf.
template <int kHeads>
DSV4_D void store_nothing(const AttentionParams& p, int row, int rank) {
  const int share = kHeads * p.passes >> p.parts_log2, first = blockIdx.y * kHeads * p.passes + rank * share, count = min(share, p.heads - first);
  for (int i = threadIdx.x; i < count * p.channels / 8; i += blockDim.x)
    reinterpret_cast<uint4*>(p.out + (size_t(row) * p.heads + first) * p.channels)[i] = {};
  if (p.lse != nullptr && int(threadIdx.x) < count) p.lse[size_t(row) * p.heads + first + threadIdx.x] = -infinity();
}

}  // namespace dsv4
