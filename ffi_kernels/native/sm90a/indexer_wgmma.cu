// Index scores of decode with FP4 entries and more than 16 heads (facts section 2, Indexer), with wgmma. As in cuda/indexer.cu, entries
// and queries are integers (index_integers.cuh); entries and tokens that are none take bf16 products, each for itself.
//
// A warpgroup takes 64 entries at a time: they are the rows of A, in registers, and a token's 64 heads the columns, from shared memory.
// Lane (g, j) = (lane / 4, lane % 4) of a warp has block j of the entries g and g + 8 of its 16, just as they lie in global memory:
// word s of it is what step s multiplies. Which channels that are does not matter to a dot product: the queries are permuted alike.
// Of the sums a lane has, for the same two entries, heads 8 i + 2 j and 8 i + 2 j + 1: relu, weights and the sum over heads stay in
// registers but for two shuffles.
#include "dependent.cuh"
#include "index_integers.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dsv4 {
namespace {

constexpr int kGroups = 4, kThreads = 128 * kGroups;  // more warps have gained nothing
constexpr int kEntries = 64;                          // of a warpgroup's step
constexpr int kHeads = 64;                            // columns; those beyond H are zeros
constexpr int kHeadBytes = kHeads * kChannels;        // of a token
constexpr int kWeightStride = 20;  // of a lane's 16 weights, so that the four lanes of an entry read different banks
constexpr int kWeightBytes = 4 * 4 * kWeightStride;   // of a token

// Hides from the compiler how a value came about, which it would otherwise compute anew at every use.
template <class T>
DSV4_D T settled(T value) {
  if constexpr (sizeof(T) == 8) {
    asm("" : "+l"(value));
  } else {
    asm("" : "+r"(value));
  }
  return value;
}

template <class T>
DSV4_D T* settled_global(T* pointer) {
  pointer = settled(pointer);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// --- entries -------------------------------------------------------------------------------------------------------

struct Rows {  // a lane's part of 64 entries
  uint4 words[2];
  uint32_t scale[2];  // all four exponents of the entry
};

struct Sequence {
  const uint4* blocks;    // the lane's of the first entry
  const uint32_t* scale;  // of the first entry
  int last;               // entry

  // Row g of a warp's 16 is `entry`. Behind the last entry that one is read.
  DSV4_D void load(int entry, Rows& rows) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t at = uint32_t(min(entry + 8 * r, last));
      rows.words[r] = blocks[uint64_t(at) * 4];
      rows.scale[r] = scale[at];
    }
  }
};

DSV4_D uint32_t max_of_halves(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.u16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

constexpr uint32_t kBoth = 0x00010001u;      // 1 in both halves
constexpr uint32_t kNarrow = 0x100 * kBoth;  // the bits of IntegerRows::narrow that count

struct IntegerRows {
  uint32_t a[4][4];  // A operand of step s
  uint32_t largest;  // of the exponents of the two entries, one in each half
  uint32_t narrow;   // bit 8 of each half: this block of the entry is integers
};

// `pick_own`: what picks the lane's own exponents out of those of both entries.
DSV4_D void decode_rows(const Rows& rows, uint32_t pick_own, IntegerRows& out) {
  const uint32_t own = pick_bytes(rows.scale[0], rows.scale[1], pick_own) & 0x00FF00FFu;
  out.largest = max_of_halves(own, __shfl_xor_sync(0xFFFFFFFFu, own, 1));
  out.largest = max_of_halves(out.largest, __shfl_xor_sync(0xFFFFFFFFu, out.largest, 2));
  // In each half 0x100 plus a number that must not be negative, or must be.
  const uint32_t shift = own + (0x100 + kShiftRoom) * kBoth - out.largest;
  const uint32_t from_low = out.largest + (0x100 - (127 - kNearExponent)) * kBoth;
  const uint32_t from_high = out.largest + (0x100 - (127 + kNearExponent + 1)) * kBoth;
  out.narrow = shift & from_low & ~from_high;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const IntegerTables tables = integer_tables(__funnelshift_l(0, 1, r == 0 ? shift : high_half(shift)));
    const uint32_t words[4] = {rows.words[r].x, rows.words[r].y, rows.words[r].z, rows.words[r].w};
#pragma unroll
    for (int s = 0; s < 4; ++s) decode_integers(words[s], tables, out.a[s][r], out.a[s][2 + r]);
  }
}

// --- queries -------------------------------------------------------------------------------------------------------

// 32 channels of a head from 32 j on: K-major rows of 128 bytes, swizzled by 128 bytes.
DSV4_D void prepare_head(const HeadBlock& block, int t, int head, int j, uint8_t* heads, float* weights, uint32_t* wide_tokens) {
  uint8_t* row = heads + t * kHeadBytes + head * kChannels;
  float weight;
  const bool exact = head_integers(block, weight, [&](int w, uint32_t word) {
    *reinterpret_cast<uint32_t*>(row + 16 * (w ^ (head & 7)) + 4 * j) = word;  // k = 32 (w / 2) + 16 (w % 2) + 4 j
  });
  if (!exact) atomicOr(wide_tokens, 1u << t);
  if (j == 0) weights[(t * 4 + head % 8 / 2) * kWeightStride + head / 8 * 2 + head % 2] = weight;
}

// --- products ------------------------------------------------------------------------------------------------------

#define EIGHT(x, i) x(i), x(i + 1), x(i + 2), x(i + 3), x(i + 4), x(i + 5), x(i + 6), x(i + 7)
#define ALL_SUMS(x) EIGHT(x, 0), EIGHT(x, 8), EIGHT(x, 16), EIGHT(x, 24)
#define PRODUCT(a, b, add)                                                                                                        \
  "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "                                                                             \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {" a  \
  "}, " b ", " add ";\n"

// sums = entries times heads.
DSV4_D void multiply(int32_t (&sums)[32], const uint32_t (&a)[4][4], uint64_t heads) {
#define WRITTEN(i) "=&r"(sums[i])
#define KEPT(i) "+r"(sums[i])
  products_begin();
  asm volatile(
      PRODUCT("%32,%33,%34,%35", "%48", "0")
      PRODUCT("%36,%37,%38,%39", "%49", "1")
      PRODUCT("%40,%41,%42,%43", "%50", "1")
      PRODUCT("%44,%45,%46,%47", "%51", "1")
      : ALL_SUMS(WRITTEN)
      : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(a[1][0]), "r"(a[1][1]), "r"(a[1][2]), "r"(a[1][3]),
        "r"(a[2][0]), "r"(a[2][1]), "r"(a[2][2]), "r"(a[2][3]), "r"(a[3][0]), "r"(a[3][1]), "r"(a[3][2]), "r"(a[3][3]),
        "l"(heads), "l"(moved(heads, 32)), "l"(moved(heads, 64)), "l"(moved(heads, 96))
      : "memory");
  products_commit();
  products_wait<0>();
  asm volatile("" : ALL_SUMS(KEPT)::"memory");  // not used before
#undef WRITTEN
#undef KEPT
}

// Of lanes with an even j the sum over heads of entry g, of the others that of entry g + 8.
DSV4_D float sum_over_heads(const int32_t (&sums)[32], const float4* weights, bool second) {
  float part[2] = {};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float4 w = weights[i / 2];
    const float of[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int r = 0; r < 2; ++r) part[r] = fmaf(relu_of_integer(sums[4 * (i + e / 2) + 2 * r + e % 2]), of[e], part[r]);
    }
  }
  const float half = (second ? part[1] : part[0]) + __shfl_xor_sync(0xFFFFFFFFu, second ? part[0] : part[1], 1);
  return half + __shfl_xor_sync(0xFFFFFFFFu, half, 2);
}

// The same in bf16 products, in the scores' own unit; `entry` is the lane's first.
DSV4_D float wide_rows(const IndexScoresParams& p, int b, int t, int entry, int g, int j) {
  float score = 0.0f;
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const float2 pair = wide_scores(p, b, t, entry + 8 * r, g, j);
    const float even = __shfl_sync(0xFFFFFFFFu, pair.x, g / 2), odd = __shfl_sync(0xFFFFFFFFu, pair.y, g / 2);
    if (j % 2 == r) score = g % 2 ? odd : even;
  }
  return score;
}

template <bool one_token>
DSV4_D void index_scores(const IndexScoresParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const int tokens = one_token ? 1 : p.tokens;
  uint8_t* heads = shared;                                                     // [T][kHeads] rows
  float* weights = reinterpret_cast<float*>(heads + tokens * kHeadBytes);      // [T][4][kWeightStride]
  uint32_t* wide_tokens = reinterpret_cast<uint32_t*>(heads + tokens * (kHeadBytes + kWeightBytes));
  const int b = blockIdx.y, lane = lane_id(), g = lane / 4, j = lane % 4, group = __shfl_sync(0xFFFFFFFFu, int(warp_id()) / 4, 0);
  // The first warpgroup, which alone has entries where there are few, leaves the queries to the others.
  const int units = tokens * kHeads * 4, first_unit = (threadIdx.x + kThreads - 128) % kThreads;
  HeadBlock block;
  if (first_unit < units) block = load_head(p, b, first_unit / (kHeads * 4), first_unit / 4 % kHeads, j);
  // Neighbouring tiles go to different CTAs, so that few entries still use every multiprocessor.
  const int step = int(gridDim.x) * kGroups * kEntries;
  int base = (group * int(gridDim.x) + int(blockIdx.x)) * kEntries;
  const int own = int(warp_id()) % 4 * 16 + g;  // the lane's first entry in a tile
  const int64_t first_entry = int64_t(b) * p.entries;
  const Sequence of = {settled_global(static_cast<const uint4*>(p.keys) + 4 * first_entry + j),
                       settled_global(reinterpret_cast<const uint32_t*>(p.scale) + first_entry), p.entries - 1};
  Rows raw;
  if (group == 0) of.load(base + own, raw);  // before it is known what is visible
  const int visible = visible_entries(p, b);
  if (int(blockIdx.x) * kEntries >= visible) return;
  if (threadIdx.x == 0) *wide_tokens = 0;
  if (group != 0 && base < visible) of.load(base + own, raw);
  __syncthreads();
  for (int unit = first_unit; unit < units;) {
    prepare_head(block, unit / (kHeads * 4), unit / 4 % kHeads, j, heads, weights, wide_tokens);
    unit += kThreads;
    if (unit < units) block = load_head(p, b, unit / (kHeads * 4), unit / 4 % kHeads, j);
  }
  fence_async();
  __syncthreads();

  const uint32_t wide = *wide_tokens;
  const uint64_t matrix = swizzled_matrix(shared_address(heads), 8 * kChannels);
  const bool second = j & 1;  // entry: of the lane's two, what it ends with
  const uint32_t pick_own = settled(uint32_t(j | (4 + j) << 8)), pick_largest = settled(second ? 0x4442u : 0x4440u);
  const int room = settled(j < 2 ? p.entries - own - 8 * j : 0);  // tiles that start below it have an entry for this lane to store
  float* const scores = settled_global(p.scores + tokens * first_entry + own + 8 * j);
  for (; base < visible; base += step) {
    IntegerRows rows;
    decode_rows(raw, pick_own, rows);
    if (base + step < visible) of.load(base + step + own, raw);
    const bool all_narrow = __all_sync(0xFFFFFFFFu, (rows.narrow & kNarrow) == kNarrow);
    const float unit = unit_of_entry(pick_bytes(rows.largest, 0, pick_largest));
#pragma unroll 1
    for (int t = 0; t < tokens; ++t) {
      int32_t sums[32];
      multiply(sums, rows.a, moved(matrix, t * kHeadBytes));
      float score = sum_over_heads(sums, reinterpret_cast<const float4*>(weights + (t * 4 + j) * kWeightStride), second) * unit;
      const bool none = (wide >> t) & 1;
      if (none || !all_narrow) {
        uint32_t narrow = rows.narrow & __shfl_xor_sync(0xFFFFFFFFu, rows.narrow, 1);
        narrow &= __shfl_xor_sync(0xFFFFFFFFu, narrow, 2);
        const float other = wide_rows(p, b, t, base + own, g, j);
        if (none || !((second ? narrow >> 16 : narrow) & 0x100)) score = other;
      }
      if (base < room) scores[uint64_t(uint32_t(t)) * uint32_t(p.entries) + uint32_t(base)] = score;
    }
  }
}

}  // namespace
}  // namespace dsv4

extern "C" __global__ void __launch_bounds__(dsv4::kThreads, 1) index_scores_fp4_one(const __grid_constant__ dsv4::IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores<true>(p);
}
extern "C" __global__ void __launch_bounds__(dsv4::kThreads, 1) index_scores_fp4_many(const __grid_constant__ dsv4::IndexScoresParams p) {
  dsv4::start_after_previous();
  dsv4::index_scores<false>(p);
}
