// Index scores of decode: score_j = sum_h relu(q_h . k_j) w_h for every visible entry j (facts section 2, Indexer), for
// FP4 entries. See index_scores.cuh for the layout; here a lane's part of an entry is one of its four blocks.
//
// Entries are multiplied in integers, which is exact and twice as fast as bf16. Twice an e2m1 value is an integer up
// to 12; the exponents of an entry's four blocks differ by at most 3 in nearly all data (they follow a Hadamard
// transform), so an entry is a common power of two times integers up to 96. So is a query head, which is recognised from
// its bf16 values. A tile or a token for which this fails (`wide`) takes bf16 products; where both ways are possible
// both are exact, so an entry's bits do not depend on its neighbours.
#include "../include/dependent.cuh"
#include "../include/index_scores.cuh"

namespace dsv4 {
namespace {

constexpr int kNearExponent = 60;            // integers are used while all exponents are this near to zero
constexpr uint32_t kMagicBits = 0x4B400000;  // 1.5 * 2**23 as fp32: adding an integer below 2**22 to its bits adds it to its value
constexpr float kMagic = 12582912.0f;
constexpr float kUnit = 2.384185791015625e-07f;  // 2**-22: brings every relu below 1, where fma.sat is a relu

// d = a b + c, with c of one value per row.
DSV4_D void mma_s8(int32_t (&d)[4], uint4 a, uint32_t b0, uint32_t b1, int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}

DSV4_D float relu_of_magic(int32_t x) {  // max(n, 0) * 2**-22 for x = kMagicBits + n
  float out;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(bits_float(uint32_t(x))), "f"(kUnit), "f"(-kMagic * kUnit));
  return out;
}

// Two nibbles of a word, from bit `at` on, times 2**exponent as a pair of bf16: exact.
DSV4_D uint32_t decode_pair(uint32_t word, int at, int exponent) {
  const float low = times_power_of_two(e2m1_to_float(word >> at), exponent);
  return pack_bf16(low, times_power_of_two(e2m1_to_float(word >> (at + 4)), exponent));
}

// One tile and token in bf16 products, from global memory: right for any exponents, and rare. Adds in the order of
// `integer_scores`.
DSV4_D float wide_scores(const IndexScoresParams& p, int b, int t, int base, int g, int j) {
  const int64_t token = int64_t(b) * p.tokens + t;
  const uint16_t* q = p.q + token * p.heads * kChannels + 32 * j;
  float score = 0.0f;
#pragma unroll 1
  for (int i = 0; i < kWays; ++i) {
    const int64_t at = int64_t(b) * p.entries + min(base + 4 * g + i, p.entries - 1);
    const uint32_t* words = static_cast<const uint32_t*>(p.keys) + at * 16 + 4 * j;
    const int exponent = decode_e8m0(p.scale[at * 4 + j]);
    float even = 0.0f, odd = 0.0f;  // of the entries in columns 2 j and 2 j + 1
#pragma unroll 1
    for (int h = g; h < p.heads + g; h += 16) {
      float dots[4] = {};
      const bool first = h < p.heads, second = h + 8 < p.heads;
#pragma unroll 1
      for (int s = 0; s < 8; ++s) {
        const uint32_t word = words[s / 2] >> (16 * (s % 2));
        const uint2 none = {0, 0};
        const uint2 a = first ? *reinterpret_cast<const uint2*>(q + h * kChannels + 4 * s) : none;
        const uint2 c = second ? *reinterpret_cast<const uint2*>(q + (h + 8) * kChannels + 4 * s) : none;
        mma_bf16(dots, a.x, c.x, a.y, c.y, decode_pair(word, 0, exponent), decode_pair(word, 8, exponent));
      }
      const float w = first ? head_weight(p, token * p.heads + h) : 0.0f, w8 = second ? head_weight(p, token * p.heads + h + 8) : 0.0f;
      if (first) even = fmaf(relu(dots[0]), w, even), odd = fmaf(relu(dots[1]), w, odd);
      if (second) even = fmaf(relu(dots[2]), w8, even), odd = fmaf(relu(dots[3]), w8, odd);
    }
#pragma unroll
    for (int offset = 16; offset >= 4; offset /= 2) {
      even += __shfl_xor_sync(0xFFFFFFFFu, even, offset);
      odd += __shfl_xor_sync(0xFFFFFFFFu, odd, offset);
    }
    if (g % 4 == i) score = g & 4 ? odd : even;
  }
  return score;
}

// --- FP4 entries ---------------------------------------------------------------------------------------------------

template <int kRows>  // tiles of 16 heads
struct IntegerQuery {
  uint4 a[kRows][4][32];  // A operands by lane: step s holds channels 32 j + 8 s .. + 7 of heads 16 m + g and + 8
  int2 start[kRows][8];     // by g: what the sums of heads g and g + 8 start from
  float2 weight[kRows][8];  // and their weights
};

// One head's 32 channels from 32 j on, as integers in shared memory; sets bit t of `wide` if the head is not integers
// times a power of two.
template <int kRows>
DSV4_D void prepare_head(const IndexScoresParams& p, int b, int t, int head, int j, IntegerQuery<kRows>& out, uint32_t* wide) {
  const int64_t at = (int64_t(b) * p.tokens + t) * p.heads + head;
  const bool real = head < p.heads;
  uint4 raw[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) raw[v] = real ? reinterpret_cast<const uint4*>(p.q + at * kChannels + 32 * j)[v] : uint4{0, 0, 0, 0};
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(raw);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = max(largest, max(pairs[i] & 0x7FFFu, (pairs[i] >> 16) & 0x7FFFu));
  largest = warp_max<4>(largest);
  const int exponent = largest ? int(largest >> 7) - 127 : 0;
  const bool near = exponent >= -kNearExponent && exponent <= kNearExponent;
  const float up = power_of_two(near ? 6 - exponent : 0);  // the largest magnitude becomes 64 .. 127
  bool exact = near;
  float sum = 0.0f;
  uint32_t* a = reinterpret_cast<uint32_t*>(&out.a[head / 16][0][4 * (head % 8) + j]) + (head % 16) / 8;
#pragma unroll
  for (int w = 0; w < 8; ++w) {  // four channels to a word
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t pair = pairs[2 * w + e / 2];
      const float scaled = (e % 2 ? bf16_high(pair) : bf16_low(pair)) * up;
      const float rounded = scaled + kMagic, whole = rounded - kMagic;
      exact = exact && whole == scaled;
      sum += whole;
      word |= (float_bits(rounded) & 0xFFu) << (8 * e);
    }
    a[(w / 2) * 128 + (w % 2) * 2] = word;
  }
  sum = warp_sum<4>(sum);
  if (!exact) atomicOr(wide, 1u << t);
  if (j == 0) {
    const float weight = real ? head_weight(p, at) : 0.0f;
    const int second = (head % 16) / 8;
    // The entries' integers carry an offset of 128.
    reinterpret_cast<int*>(&out.start[head / 16][head % 8])[second] = int(kMagicBits) - 128 * int(sum);
    reinterpret_cast<float*>(&out.weight[head / 16][head % 8])[second] = times_power_of_two(weight, exponent - 6);
  }
}

struct RawTile {
  uint4 words[kWays];      // block j of entry 4 g + i
  uint32_t scale[kWays];   // the four exponents of entry 4 g + i
};

DSV4_D void load_tile(const IndexScoresParams& p, int b, int base, int g, int j, RawTile& tile) {
  const int64_t first = int64_t(b) * p.entries + base + 4 * g;
  const uint4* words = static_cast<const uint4*>(p.keys) + first * 4 + j;
  const uint32_t* scale = reinterpret_cast<const uint32_t*>(p.scale) + first;
  if (base + kTile <= p.entries && p.entries % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWays; ++i) tile.words[i] = words[4 * i];
    const uint4 four = *reinterpret_cast<const uint4*>(scale);
    tile.scale[0] = four.x, tile.scale[1] = four.y, tile.scale[2] = four.z, tile.scale[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kWays; ++i) {
      const bool real = base + 4 * g + i < p.entries;
      tile.words[i] = real ? words[4 * i] : uint4{0, 0, 0, 0};
      tile.scale[i] = real ? scale[i] : 0x7F7F7F7Fu;
    }
  }
}

// Bytes of (low, high) picked by the four low nibbles of `selector`; a nibble with bit 3 set picks its byte's sign, here 0.
DSV4_D uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// Eight e2m1 codes -> 128 + the integers 2 * value << d, d being in the tables: magnitudes 0 1 2 3 and 4 6 8 12. Each
// of the two picks sees the codes of one sign, and 0 for the others.
DSV4_D void decode_integers(uint32_t word, uint32_t low, uint32_t high, uint32_t& b0, uint32_t& b1) {
  const uint32_t negated = word ^ 0x88888888u;
  b0 = pick_bytes(low, high, word) + 0x80808080u - pick_bytes(low, high, negated);
  b1 = pick_bytes(low, high, word >> 16) + 0x80808080u - pick_bytes(low, high, negated >> 16);
}

struct IntegerTile {
  uint32_t b[kWays][4][2];  // B operands of way i, step s
  uint32_t exponents;       // of the ways, a byte each
  bool narrow;              // in all lanes, all ways are integers
};

DSV4_D void decode_way(const RawTile& raw, int i, int j, IntegerTile& out) {
  const int own = (raw.scale[i] >> (8 * j)) & 0xFF;
  const int largest = int(warp_max<4>(uint32_t(own)));
  const int shift = own - largest + 3;
  out.narrow = out.narrow && shift >= 0 && largest >= 127 - kNearExponent && largest <= 127 + kNearExponent;
  out.exponents |= uint32_t(largest) << (8 * i);
  const uint32_t low = 0x03020100u << (shift & 3), high = 0x0C080604u << (shift & 3);
  const uint32_t words[4] = {raw.words[i].x, raw.words[i].y, raw.words[i].z, raw.words[i].w};
#pragma unroll
  for (int s = 0; s < 4; ++s) decode_integers(words[s], low, high, out.b[i][s][0], out.b[i][s][1]);
}

// Sums over heads of one token and tile, times 2**-18 and the tile's units.
template <int kRows>
DSV4_D float integer_scores(const IntegerQuery<kRows>& query, const IntegerTile& tile, int lane) {
  float part[kWays][2] = {};
#pragma unroll 1
  for (int m = 0; m < kRows; ++m) {
    const int2 start = query.start[m][lane / 4];
    int32_t dots[kWays][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint4 a = query.a[m][s][lane];
#pragma unroll
      for (int i = 0; i < kWays; ++i) {
        int32_t(&d)[4] = dots[i];
        if (s == 0) {
          mma_s8(d, a, tile.b[i][s][0], tile.b[i][s][1], start.x, start.x, start.y, start.y);
        } else {
          mma_s8(d, a, tile.b[i][s][0], tile.b[i][s][1], d[0], d[1], d[2], d[3]);
        }
      }
    }
    const float2 weight = query.weight[m][lane / 4];
#pragma unroll
    for (int i = 0; i < kWays; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        part[i][e] = fmaf(relu_of_magic(dots[i][e]), weight.x, part[i][e]);
        part[i][e] = fmaf(relu_of_magic(dots[i][2 + e]), weight.y, part[i][e]);
      }
    }
  }
  return sum_over_rows(part, lane / 4);
}

template <int kRows>
DSV4_D void index_scores_fp4(const IndexScoresParams& p) {
  extern __shared__ uint4 shared[];
  IntegerQuery<kRows>* query = reinterpret_cast<IntegerQuery<kRows>*>(shared);  // [T]
  __shared__ uint32_t wide_tokens;
  const int b = blockIdx.y, lane = lane_id(), g = lane / 4, j = lane % 4;
  const int visible = visible_entries(p, b);
  if (int(blockIdx.x) * kTile >= visible) return;
  if (threadIdx.x == 0) wide_tokens = 0;
  // Neighbouring tiles go to different CTAs, so that few entries still use every multiprocessor.
  const int step = int(gridDim.x) * kWarps * kTile;
  int base = (int(warp_id()) * int(gridDim.x) + int(blockIdx.x)) * kTile;
  RawTile next;
  if (base < visible) load_tile(p, b, base, g, j, next);
  __syncthreads();
  for (int unit = threadIdx.x; unit < p.tokens * kRows * 64; unit += kWarps * 32) {
    const int t = unit / (kRows * 64), head = (unit / 4) % (kRows * 16);
    prepare_head(p, b, t, head, unit % 4, query[t], &wide_tokens);
  }
  __syncthreads();

  for (; base < visible; base += step) {
    const RawTile raw = next;
    if (base + step < visible) load_tile(p, b, base + step, g, j, next);
    IntegerTile tile = {{}, 0, true};
#pragma unroll
    for (int i = 0; i < kWays; ++i) decode_way(raw, i, j, tile);
    const bool narrow = __all_sync(0xFFFFFFFFu, tile.narrow);
    const int entry = base + 8 * j + g;  // what this lane ends with: number 4 (2 j + g / 4) + g % 4 of the tile
    const uint32_t exponent = (__shfl_sync(0xFFFFFFFFu, tile.exponents, 4 * (2 * j + g / 4)) >> (8 * (g & 3))) & 0xFF;
    for (int t = 0; t < p.tokens; ++t) {
      float score;
      if (narrow && !((wide_tokens >> t) & 1)) {
        score = integer_scores(query[t], tile, lane) * bits_float((exponent + 18) << 23);  // 2**22 and 2**-4 are in the units
      } else {
        score = wide_scores(p, b, t, base, g, j);
      }
      if (entry < p.entries) p.scores[(int64_t(b) * p.tokens + t) * p.entries + entry] = score;
    }
  }
}

}  // namespace
}  // namespace dsv4

using dsv4::IndexScoresParams;

extern "C" __global__ void __launch_bounds__(256, 2) index_scores_fp4_16(const __grid_constant__ IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores_fp4<1>(p);
}
extern "C" __global__ void __launch_bounds__(256, 2) index_scores_fp4_64(const __grid_constant__ IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores_fp4<4>(p);
}
