// The pieces of sparse decode attention (cuda/attention.cu) that know the cache: where an entry lies, and how its stored
// bytes become bf16 fragments. Not here: the softmax, the products, the merge.
#pragma once

#include "mma.cuh"

namespace dsv4 {

constexpr int kTileKeys = 80;    // entries that a CTA holds at a time; 8 CTAs hold a window of 128 and 512 more at once
constexpr int kSlice = 64;       // channels of one scale of the FP8 cache
constexpr int kRowBytes = 2 * kSlice;
constexpr int kSliceBytes = kTileKeys * kRowBytes;
constexpr int kPitch = kTileKeys + 8;  // of scores and weights in shared memory: no bank conflicts
constexpr int kMaxPairs = 4;           // of slices: K <= 512
constexpr int kMaxChain = 4;           // parts of a token that are added up one after the other (Link in attention_merge.cuh)
// With kSplit warps of a team to a pair: rounds of groups of 8 keys; channels of a warp in the product with V.
template <int kSplit>
constexpr int kRounds = (kTileKeys / 8 + kSplit - 1) / kSplit;
template <int kSplit>
constexpr int kPart = 128 / kSplit;

struct AttentionParams {
  const uint16_t* q;                  // bf16 [B, T, H, K]
  const uint8_t* window;              // [B, W, entry_bytes]
  const uint8_t* window_scale;        // [B, W, S]; null in the plain format, like the other scales
  const uint8_t* fresh;               // [B, T, entry_bytes]
  const uint8_t* fresh_scale;         // [B, T, S]
  const uint8_t* compressed;          // [B, C, entry_bytes] or null
  const uint8_t* compressed_scale;    // [B, C, S]
  const int32_t* picked;              // [B, T, X], or null: every closed entry
  const float* sink;                  // [H]
  const int32_t* start;               // [B]
  const int32_t* length;              // [B]
  const float* cos;                   // [B, T, R/2]
  const float* sin;                   // [B, T, R/2]
  uint16_t* out;                      // bf16 [B, T, H, K]
  float* lse;                         // [B, T, H] or null
  float* partial;                     // what a second launch joins (of 64 heads as in attention_join.cuh), else null: sums [B, T, clusters, H, K]
  float2* partial_softmax;            // [B, T, clusters, H]: largest score in log2 units, sum of the weights relative to it
  int32_t tokens, heads, channels, rope, window_size, entries, picks;  // T, H, K, R, W, C, X
  int32_t ratio_log2, parts;          // parts share the keys of one token
  uint32_t tokens_inverse, parts_inverse;  // for `divided`
  int32_t cluster_log2;               // CTAs of a cluster: each has a part, or two, or where there are two teams four
  int32_t window_share, pick_share;   // of one part
  int32_t entry_bytes, scale_bytes;   // K + R and S, or 2 K and 0
  int32_t stages, stage_bytes;        // tiles in shared memory, 1 or 2; K / 64 * kSliceBytes
  int32_t team_bytes;                 // of shared memory, where there are two teams; all but angles and sinks is there once for each
  int32_t passes;                     // groups of heads that a CTA serves one after the other
  int32_t turns, chain;               // images that a CTA for 64 heads leaves one after the other; parts of each
  // Offsets in shared memory; entries lie at 0, bf16 [stages][K / 64][80 keys][64 channels], 16-byte chunk i of a row at
  // i ^ (key % 8).
  int32_t output;                     // fp32 [parts of a team][warps][heads][channels of a warp]; at 0 if the entries are not needed again
  int32_t rows;                       // Entry [2][80], of two tiles
  int32_t scores;                     // fp32 [K / 128][heads][kPitch], partial sums over 128 channels
  int32_t weights;                    // bf16 [heads][kPitch]
  int32_t factor, largest, total;     // fp32 [heads] of the output so far, [parts of a team][heads] in log2 units, the sum of the unrounded weights
  int32_t angles, sinks;              // fp32 [R]: cosines, then sines; [passes][heads]
  float score_scale;                  // K**-0.5 * log2(e): exponentials are taken to base 2
};

// Loads that the compiler does not move behind a branch.
DSV4_D int load_now(const int32_t* from) {
  int value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}
DSV4_D float load_now(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}
DSV4_D float2 load_now(const float2* from) {
  float2 value;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(from));
  return value;
}
DSV4_D uint4 load_now(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
  return value;
}
DSV4_D float4 load_now(const float4* from) {
  float4 value;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "l"(from));
  return value;
}

// n / divisor, from 2**32 / divisor rounded up. Exact while n * divisor < 2**32.
DSV4_D int divided(int n, int divisor, uint32_t inverse) { return divisor == 1 ? n : int(__umulhi(uint32_t(n), inverse)); }

// The sequence of a row of queries, and the number of its token there.
struct Token {
  int sequence, number;

  DSV4_D Token(const AttentionParams& p, int row) : sequence(divided(row, p.tokens, p.tokens_inverse)), number(row - sequence * p.tokens) {}
};

// The entries that one CTA attends to for one token: its part of the window, then its part of the
// compressed ones. Parts depend on static shapes and on the position only, never on the batch.
struct Part {
  int token, position, newest_slot;  // of the query; the slot of its own entry in the ring
  int window_first, window_count;
  int compressed_first, compressed_count;

  // What is known without the position: all but `position` and, where every closed entry counts, the compressed ones.
  DSV4_D Part(const AttentionParams& p, int the_token, int rank) : token(the_token), position(0), newest_slot(0) {
    window_first = min(rank * p.window_share, p.window_size);
    window_count = min(p.window_share, p.window_size - window_first);
    compressed_first = min(rank * p.pick_share, p.picks);
    compressed_count = min(p.pick_share, p.picks - compressed_first);
  }
  DSV4_D void set_position(const AttentionParams& p, int start, int rank) {
    const int size = p.window_size;
    position = int(uint32_t(start) + uint32_t(token));
    newest_slot = position < 0 ? 0 : (size & (size - 1)) == 0 ? position & (size - 1) : position % size;
    if (p.compressed == nullptr || p.picked != nullptr) return;
    const int closed = min(position < 0 ? 0 : int((uint32_t(position) + 1u) >> p.ratio_log2), p.entries);
    const int share = divided(closed + p.parts - 1, p.parts, p.parts_inverse);
    compressed_first = min(rank * share, closed);
    compressed_count = min(share, closed - compressed_first);
  }
  DSV4_D int count() const { return window_count + compressed_count; }
};

// A stored entry; both are null where there is nothing to see.
struct alignas(16) Entry {
  const uint8_t* data;
  const uint8_t* scale;
};

// Where the index picked for entry `key` of the part lies, null where none is.
DSV4_D const int32_t* pick_at(const AttentionParams& p, const Part& part, int row, int key) {
  if (p.picked == nullptr || key < part.window_count || key >= part.count()) return nullptr;
  return p.picked + size_t(row) * p.picks + part.compressed_first + key - part.window_count;
}
DSV4_D int load_pick(const AttentionParams& p, const Part& part, int row, int key) {
  const int32_t* at = pick_at(p, part, row, key);
  return at == nullptr ? -1 : *at;
}

DSV4_D Entry locate(const AttentionParams& p, const Part& part, int sequence, int key, int pick) {
  const uint8_t *data = p.compressed, *scale = p.compressed_scale;
  int row = p.picked != nullptr ? pick : part.compressed_first + key - part.window_count, rows = p.entries;
  bool present = key < part.count() && uint32_t(row) < uint32_t(rows);
  if (key < part.window_count) {
    row = part.window_first + key, rows = p.window_size, data = p.window, scale = p.window_scale;
    int age = part.newest_slot - row;  // in tokens before the query
    if (age < 0) age += p.window_size;
    present = age <= part.position;
    if (age <= part.token) row = part.token - age, rows = p.tokens, data = p.fresh, scale = p.fresh_scale;
  }
  const size_t at = size_t(sequence) * rows + row;
  return present ? Entry{data + at * p.entry_bytes, scale + at * p.scale_bytes} : Entry{nullptr, nullptr};
}

template <typename T>
DSV4_D T& in_shared(uint32_t offset) {
  extern __shared__ __align__(128) uint8_t memory[];
  return *reinterpret_cast<T*>(memory + offset);
}

DSV4_D uint32_t address_in_shared(uint32_t offset) { return shared_address(&in_shared<uint8_t>(offset)); }

// The scale of an FP8 block, from its biased exponent byte: a power of two in bf16, twice.
DSV4_D uint32_t scale_bf16x2(uint32_t code) { return code ? code << 7 | code << 23 : 0x00400040u; }

// 16 e4m3 codes times the scale of their block -> bf16. The conversions go by half precision, which holds every code; of the units
// that shift and select they take two instructions to a pair.
DSV4_D void decode_e4m3(uint4 raw, uint32_t scale, uint32_t (&out)[8]) {
  const uint32_t in[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float low, high;
    asm("{\n .reg .b32 pair;\n .reg .b16 low, high;\n cvt.rn.f16x2.e4m3x2 pair, %2;\n mov.b32 {low, high}, pair;\n"
        " cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
        : "=f"(low), "=f"(high)
        : "h"(uint16_t(in[j / 2] >> (16 * (j % 2)))));
    out[j] = multiply_bf16x2(pack_bf16(low, high), scale);
  }
}

}  // namespace dsv4
