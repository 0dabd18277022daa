// Index scores of decode: score_j = sum_h relu(q_h . k_j) w_h for every visible entry j (facts section 2, Indexer), for
// FP4 entries, with mma.sync. See index_scores.cuh for the layout; here a lane's part of an entry is one of its four blocks. More than
// 16 heads on sm_90a: sm90a/indexer_wgmma.cu.
//
// Entries are multiplied in integers (index_integers.cuh). A tile or a token for which this fails (`wide`) takes bf16 products;
// where both ways are possible both are exact and add up in the same order, so an entry's bits do not depend on its neighbours.
#include "../include/dependent.cuh"
#include "../include/index_integers.cuh"

namespace dsv4 {
namespace {

DSV4_D void mma_s8(int32_t (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// One tile and token in bf16 products. Adds in the order of `integer_scores`.
DSV4_D float wide_tile(const IndexScoresParams& p, int b, int t, int base, int g, int j) {
  float score = 0.0f;
#pragma unroll 1
  for (int i = 0; i < kWays; ++i) {
    const float2 pair = wide_scores(p, b, t, base + 4 * g + i, g, j);
    if (g % 4 == i) score = g & 4 ? pair.y : pair.x;
  }
  return score;
}

template <int kRows>  // tiles of 16 heads
struct IntegerQuery {
  uint4 a[kRows][4][32];  // A operands by lane: step s holds channels 32 j + 8 s .. + 7 of heads 16 m + g and + 8
  float2 weight[kRows][8];  // by g: those of heads g and g + 8
};

// One head's 32 channels from 32 j on, as integers in shared memory; sets bit t of `wide` if the head is not integers
// times a power of two.
template <int kRows>
DSV4_D void prepare_head(const IndexScoresParams& p, int b, int t, int head, int j, IntegerQuery<kRows>& out, uint32_t* wide) {
  const int second = (head % 16) / 8;
  uint32_t* a = reinterpret_cast<uint32_t*>(&out.a[head / 16][0][4 * (head % 8) + j]) + second;
  float weight;
  const HeadBlock block = load_head(p, b, t, head, j);
  const bool exact = head_integers(block, weight, [&](int w, uint32_t word) { a[(w / 2) * 128 + (w % 2) * 2] = word; });
  if (!exact) atomicOr(wide, 1u << t);
  if (j == 0) reinterpret_cast<float*>(&out.weight[head / 16][head % 8])[second] = weight;
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
  const IntegerTables tables = integer_tables(1u << (shift & 3));
  const uint32_t words[4] = {raw.words[i].x, raw.words[i].y, raw.words[i].z, raw.words[i].w};
#pragma unroll
  for (int s = 0; s < 4; ++s) decode_integers(words[s], tables, out.b[i][s][0], out.b[i][s][1]);
}

// Sums over heads of one token and tile, in the units of relu_of_integer and of the tile.
template <int kRows>
DSV4_D float integer_scores(const IntegerQuery<kRows>& query, const IntegerTile& tile, int lane) {
  float part[kWays][2] = {};
#pragma unroll 1
  for (int m = 0; m < kRows; ++m) {
    int32_t dots[kWays][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint4 a = query.a[m][s][lane];
#pragma unroll
      for (int i = 0; i < kWays; ++i) mma_s8(dots[i], a, tile.b[i][s][0], tile.b[i][s][1]);
    }
    const float2 weight = query.weight[m][lane / 4];
#pragma unroll
    for (int i = 0; i < kWays; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        part[i][e] = fmaf(relu_of_integer(dots[i][e]), weight.x, part[i][e]);
        part[i][e] = fmaf(relu_of_integer(dots[i][2 + e]), weight.y, part[i][e]);
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
        score = integer_scores(query[t], tile, lane) * unit_of_entry(exponent);
      } else {
        score = wide_tile(p, b, t, base, g, j);
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
