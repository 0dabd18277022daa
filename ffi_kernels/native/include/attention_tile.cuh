// What a team of warps does with one tile of entries in sparse decode attention (cuda/attention.cu): the copies from the cache,
// the product with K, the softmax, the product with V. Not here: which entries and heads, the merge.
#pragma once

#include "attention_merge.cuh"

namespace dsv4 {

DSV4_D void copy_async_4(uint32_t shared_address, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address), "l"(from) : "memory");
}

DSV4_D void copy_async_8(uint32_t shared_address, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address), "l"(from) : "memory");
}

// The part, computed where it is needed: kept in registers it would make the products spill.
DSV4_D Part part_anew(const AttentionParams& p, int number) {
  int row = blockIdx.z;
  asm volatile("" : "+r"(row), "+r"(number));
  const Token token(p, row);
  Part part(p, token.number, number);
  part.set_position(p, load_now(p.start + token.sequence), number);
  return part;
}

// Tells the L2 cache that an entry will be copied.
DSV4_D void announce(const AttentionParams& p, const Entry& entry) {
  if (entry.data == nullptr) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(entry.data), "r"(p.entry_bytes) : "memory");
}

// What the merge will need: the angles, and the sinks of the CTA's heads.
DSV4_D void load_constants(const AttentionParams& p, int row, int heads) {
  for (int i = threadIdx.x; i < p.rope / 2; i += blockDim.x) {
    copy_async_4(address_in_shared(p.angles + 4 * i), p.cos + size_t(row) * (p.rope / 2) + i);
    copy_async_4(address_in_shared(p.angles + 2 * p.rope + 4 * i), p.sin + size_t(row) * (p.rope / 2) + i);
  }
  for (int i = threadIdx.x; i < heads * p.passes; i += blockDim.x)
    copy_async_4(address_in_shared(p.sinks + 4 * i), p.sink + min(int(blockIdx.y) * heads * p.passes + i, p.heads - 1));
}

// Whether registers are short: 32 heads, or the wide parts of a team of which there are two.
template <int kHeadTiles, int kSplit>
constexpr bool kLean = kHeadTiles > 1 || kSplit < 4;

// Whether a slice of channels is stored as e4m3.
template <bool kFp8>
DSV4_D bool in_fp8(const AttentionParams& p, int slice) {
  return kFp8 && slice * kSlice < p.channels - p.rope;
}

// The role of this thread. A pair of slices has kSplit warps of each team; 4 / kSplit teams make up the CTA.
template <int kSplit>
struct Role {
  static constexpr int kTeams = 4 / kSplit;
  int thread, team;      // number within the team
  int warp, lane, g, c;  // warp within the team; g = lane / 4, c = lane % 4
  int pair, turn;        // in the product with K
  uint32_t base;         // of the team's shared memory

  DSV4_D Role(const AttentionParams& p) : thread(threadIdx.x), team(0), lane(lane_id()), g(lane / 4), c(lane % 4), base(0) {
    if (kTeams > 1 && thread >= p.channels / kTeams) thread -= p.channels / kTeams, team = 1, base = p.team_bytes;
    warp = thread / 32, pair = warp / kSplit, turn = warp % kSplit;
  }
  DSV4_D int threads(const AttentionParams& p) const { return p.channels / kTeams; }
  // The key, within a tile, of lane group g in a round.
  DSV4_D int key(int round) const { return 8 * (round * kSplit + turn) + g; }
  DSV4_D void sync(const AttentionParams& p) const {  // the team
    if (kTeams == 1)
      __syncthreads();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(threads(p)) : "memory");
  }
};

DSV4_D int keys_of_tile(int count, int tile) {  // rounded up to whole groups of 16
  return min(kTileKeys, (count - tile * kTileKeys + 15) & ~15);
}

// Starts the copies of one tile: the two slices and the groups of 8 keys that this warp multiplies with q. Lane (g, c)
// copies just what it will read itself. Raw e4m3 rows of 64 bytes lie in either half of their bf16 row by parity.
template <bool kFp8, int kSplit>
DSV4_D void load_tile(const AttentionParams& p, const Role<kSplit>& role, int tile, int keys, uint32_t (&scales)[kRounds<kSplit>]) {
  const int nope = kFp8 ? p.channels - p.rope : 0, c = role.c, g = role.g, first = 2 * role.pair;
  const uint32_t rows = role.base + p.rows + ((tile & 1) * kTileKeys + role.key(0)) * sizeof(Entry);
  const uint32_t to = address_in_shared(role.base + (p.stages == 2 ? tile & 1 : 0) * p.stage_bytes + first * kSliceBytes + role.key(0) * kRowBytes);
  const uint32_t raw = to + 16 * (c + 4 * (g & 1)), low = to + 16 * ((2 * c) ^ g), high = to + 16 * ((2 * c + 1) ^ g);
  const bool fp8[2] = {in_fp8<kFp8>(p, first), in_fp8<kFp8>(p, first + 1)};
  const int offset[2] = {fp8[0] ? first * kSlice + 16 * c : nope + 2 * (first * kSlice - nope) + 32 * c,
                         fp8[1] ? (first + 1) * kSlice + 16 * c : nope + 2 * ((first + 1) * kSlice - nope) + 32 * c};
#pragma unroll
  for (int n = 0; n < kRounds<kSplit>; ++n) {
    if (role.key(n) >= keys) continue;  // the same for all lanes
    const Entry entry = in_shared<Entry>(rows + n * (8 * kSplit * sizeof(Entry)));
    const bool present = entry.data != nullptr;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t at = n * (8 * kSplit * kRowBytes) + s * kSliceBytes;
      const uint8_t* from = entry.data + offset[s];
      copy_async_16((fp8[s] ? raw : low) + at, from, present);
      if (!fp8[s]) copy_async_16(high + at, from + 16, present);
    }
    if (kFp8) scales[n] = present ? *reinterpret_cast<const uint16_t*>(entry.scale + first) : 0x7F7Fu;
  }
  copy_async_commit();
}

// Fragments of q in slice s of the pair: lane (g, c) holds channels 16 c .. 16 c + 15 for heads g and g + 8 of each tile of
// 16, like those of the entries. Loaded for each tile anew (from L1), because the output needs the registers.
template <int kHeadTiles, int kSplit>
DSV4_D void load_queries(const AttentionParams& p, const Role<kSplit>& role, int row, int first_head, int s, uint32_t (&q)[kHeadTiles][16]) {
#pragma unroll
  for (int m = 0; m < kHeadTiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = min(first_head + 16 * m + role.g + 8 * i, p.heads - 1);  // nothing is stored of a head too many
      const size_t at = (size_t(row) * p.heads + head) * p.channels + (2 * role.pair + s) * kSlice + 16 * role.c;
      const uint4* from = reinterpret_cast<const uint4*>(p.q + at);
      // Zero, which only the launch knows: else the compiler keeps the registers of the loads and moves them before every product.
      const uint32_t zero = uint32_t(p.heads) >> 31;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 words = from[half];
        q[m][8 * half + i] = words.x ^ zero, q[m][8 * half + 2 + i] = words.y ^ zero;
        q[m][8 * half + 4 + i] = words.z ^ zero, q[m][8 * half + 6 + i] = words.w ^ zero;
      }
    }
}

// sum += q[heads, one slice] times the warp's groups of keys. Leaves bf16 entries behind. Lane (g, c) has channels
// 16 c .. 16 c + 15 of key g, in e4m3 or in bf16; `row` is that key's row of the slice.
template <bool kFp8, int kHeadTiles, int kSplit>
DSV4_D void multiply_slice(const Role<kSplit>& role, uint32_t row, int s, int keys, const uint32_t (&q)[kHeadTiles][16],
                           const uint32_t (&scales)[kRounds<kSplit>], float (&sum)[kRounds<kSplit>][kHeadTiles][4]) {
  constexpr int kRound = 8 * kSplit * kRowBytes;
  const int g = role.g, c = role.c;
  const uint32_t raw_at = row + 16 * (c + 4 * (g & 1)), low_at = row + 16 * ((2 * c) ^ g), high_at = row + 16 * ((2 * c + 1) ^ g);
  constexpr int kAhead = kLean<kHeadTiles, kSplit> ? 1 : kRounds<kSplit>;  // raw rows at a time, as registers allow
  uint4 raw[kAhead];
#pragma unroll
  for (int n = 0; n < kRounds<kSplit>; ++n) {
    if (kFp8 && n % kAhead == 0) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (role.key(n + i) < keys) raw[i] = in_shared<uint4>(raw_at + (n + i) * kRound);
      __syncwarp();  // every lane has read its part of the raw rows
    }
    if (role.key(n) >= keys) continue;
    uint4 &low = in_shared<uint4>(low_at + n * kRound), &high = in_shared<uint4>(high_at + n * kRound);
    uint32_t b[8];
    if (kFp8) {
      decode_e4m3(raw[n % kAhead], scale_bf16x2((scales[n] >> (8 * s)) & 0xFFu), b);
      low = {b[0], b[1], b[2], b[3]};
      high = {b[4], b[5], b[6], b[7]};
    } else {
      b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
      b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int m = 0; m < kHeadTiles; ++m)
        mma_bf16(sum[n][m], q[m][4 * j], q[m][4 * j + 1], q[m][4 * j + 2], q[m][4 * j + 3], b[2 * j], b[2 * j + 1]);
  }
}

// Partial scores of one tile over the 128 channels of the warp's pair, for its groups of keys.
template <bool kFp8, int kHeadTiles, int kSplit>
DSV4_D void multiply_keys(const AttentionParams& p, const Role<kSplit>& role, int row, int first_head, int stage, int keys, bool decoded,
                          const uint32_t (&scales)[kRounds<kSplit>]) {
  float sum[kRounds<kSplit>][kHeadTiles][4] = {};
  uint32_t q[2][kHeadTiles][16];
  load_queries(p, role, row, first_head, 0, q[0]);
  if (!kLean<kHeadTiles, kSplit>) load_queries(p, role, row, first_head, 1, q[1]);
  copy_async_wait<0>();
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t entries = role.base + stage * p.stage_bytes + (2 * role.pair + s) * kSliceBytes + role.key(0) * kRowBytes;
    if (!decoded && in_fp8<kFp8>(p, 2 * role.pair + s))
      multiply_slice<true>(role, entries, s, keys, q[s], scales, sum);
    else
      multiply_slice<false>(role, entries, s, keys, q[s], scales, sum);
    if (kLean<kHeadTiles, kSplit> && s == 0) load_queries(p, role, row, first_head, 1, q[1]);
  }
  const uint32_t to = role.base + p.scores + ((role.pair * 16 * kHeadTiles + role.g) * kPitch + 8 * role.turn + 2 * role.c) * 4;
#pragma unroll
  for (int n = 0; n < kRounds<kSplit>; ++n) {
    if (role.key(n) >= keys) continue;
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        in_shared<float2>(to + ((16 * m + 8 * i) * kPitch + n * 8 * kSplit) * 4) = {sum[n][m][2 * i], sum[n][m][2 * i + 1]};
  }
}

// Scores of one tile -> weights in bf16 relative to the running maximum; updates largest, total and factor. Weights are
// added over keys that are equal modulo 32, and these sums in a tree: the same whatever the number of lanes per head.
template <int kHeads, int kLanes, int kSplit>
DSV4_D void softmax_tile(const AttentionParams& p, const Role<kSplit>& role, uint32_t statistics, int tile, bool first, int keys) {
  constexpr int classes = 32 / kLanes, steps = (kTileKeys + 31) / 32;
  const int lane = lane_id() % kLanes, pairs = p.channels / 128;
#pragma unroll 1
  for (int head = role.thread / kLanes; head < kHeads; head += role.threads(p) / kLanes) {
    const float before = first ? -infinity() : in_shared<float>(p.largest + statistics + 4 * head);
    const float total = first ? 0.0f : in_shared<float>(p.total + statistics + 4 * head);
    const uint32_t from = role.base + p.scores + head * kPitch * 4, to = role.base + p.weights + head * kPitch * 2;
    float score[steps][classes], largest = before;
#pragma unroll
    for (int i = 0; i < steps; ++i)
#pragma unroll
      for (int k = 0; k < classes; ++k) {
        const int key = 32 * i + kLanes * k + lane;
        score[i][k] = -infinity();
        if (key < keys && in_shared<uint64_t>(role.base + p.rows + ((tile & 1) * kTileKeys + key) * sizeof(Entry))) {
          float sum = in_shared<float>(from + 4 * key);
#pragma unroll
          for (int pair = 1; pair < kMaxPairs; ++pair)
            if (pair < pairs) sum += in_shared<float>(from + 4 * (pair * kHeads * kPitch + key));
          score[i][k] = sum * p.score_scale;
        }
        largest = fmaxf(largest, score[i][k]);
      }
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, offset));
    const float base = base_of(largest);
    float sums[classes] = {};
#pragma unroll
    for (int i = 0; i < steps; ++i)
#pragma unroll
      for (int k = 0; k < classes; ++k) {
        const int key = 32 * i + kLanes * k + lane;
        const float weight = exp2(score[i][k] - base);
        sums[k] += weight;
        if (key < kTileKeys) in_shared<uint16_t>(to + 2 * key) = float_to_bf16(weight);
      }
#pragma unroll
    for (int half = classes / 2; half; half /= 2)
#pragma unroll
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    const float sum = warp_sum<kLanes>(sums[0]);
    __syncwarp();  // all lanes have read what the first one overwrites: a shuffle orders no memory
    if (lane == 0) {
      const float factor = rescale(before, largest);
      in_shared<float>(role.base + p.factor + 4 * head) = factor;
      in_shared<float>(p.largest + statistics + 4 * head) = largest;
      in_shared<float>(p.total + statistics + 4 * head) = total * factor + sum;
    }
  }
}

// Groups of 16 keys whose entries are read while the softmax waits, as registers allow.
template <int kHeadTiles, int kSplit>
constexpr int kEarlyGroups = kLean<kHeadTiles, kSplit> ? 0 : 3;

// Fragments of the tile's entries for the product with V: the warp's channels of 16 keys.
template <int kSplit>
DSV4_D void load_values(const AttentionParams& p, const Role<kSplit>& role, int stage, int n, uint32_t (&values)[kPart<kSplit> / 16][4]) {
  const int lane = role.lane, channel = role.warp * kPart<kSplit>;
  const uint32_t row = address_in_shared(role.base + stage * p.stage_bytes + channel / kSlice * kSliceBytes) + (16 * n + lane % 16) * kRowBytes;
#pragma unroll
  for (int j = 0; j < kPart<kSplit> / 16; ++j)
    load_matrices_transposed(values[j], row + 16 * ((channel % kSlice / 8 + 2 * j + lane / 16) ^ (lane % 8)));
}

// out[heads, channels of the warp] = out * factor + weights times the tile's entries, of which the first are in `early`.
template <int kHeadTiles, int kSplit>
DSV4_D void multiply_values(const AttentionParams& p, const Role<kSplit>& role, bool first, int stage, int keys,
                            const uint32_t (&early)[kTileKeys / 16][kPart<kSplit> / 16][4], float (&out)[kHeadTiles][kPart<kSplit> / 8][4]) {
  constexpr int kEarly = kEarlyGroups<kHeadTiles, kSplit>;
  if (!first) {
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) {
      const float low = in_shared<float>(role.base + p.factor + 4 * (16 * m + role.g)), high = in_shared<float>(role.base + p.factor + 4 * (16 * m + role.g + 8));
#pragma unroll
      for (int n = 0; n < kPart<kSplit> / 8; ++n) out[m][n][0] *= low, out[m][n][1] *= low, out[m][n][2] *= high, out[m][n][3] *= high;
    }
  }
  const uint32_t weights = address_in_shared(role.base + p.weights) + ((role.lane % 16) * kPitch + (role.lane / 16) * 8) * 2;
#pragma unroll
  for (int n = 0; n < kTileKeys / 16; ++n) {
    if (16 * n >= keys) continue;
    uint32_t a[kHeadTiles][4], late[kPart<kSplit> / 16][4];
#pragma unroll
    for (int m = 0; m < kHeadTiles; ++m) load_matrices(a[m], weights + (16 * m * kPitch + 16 * n) * 2);
    if (n >= kEarly) load_values(p, role, stage, n, late);
#pragma unroll
    for (int j = 0; j < kPart<kSplit> / 8; ++j)
#pragma unroll
      for (int m = 0; m < kHeadTiles; ++m) {
        const uint32_t* b = (n < kEarly ? early[n][j / 2] : late[j / 2]) + 2 * (j % 2);
        mma_bf16(out[m][j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
      }
  }
}

}  // namespace dsv4
