// Sparse decode attention for 64 heads at a time, on wgmma: the mapping of many sequences of cuda/attention.cu, to whose results it
// is equal bit for bit. Here an entry is decoded once for all heads. 512 channels, the FP8 cache.
//
// A CTA of two warpgroups has one part of the keys after the other (turns), or two together that fit in a tile each. It leaves the
// output of each turn in device memory, and a second launch, decode_attention_join_64, adds up those of a token: a cluster would do it
// while its tensor cores wait. Grid (CTAs of a token, groups of 64 heads, B T). For each tile of 80 keys:
//   copies           one bulk copy to an entry, by the thread that has located it; a warp has 10 keys
//   decode           warp w slice w, 8 keys at a time -> bf16 [slice][key][64 channels] for both products; `store_row`: the order
//   product with K   a warpgroup has 40 keys; partial scores over 128 channels each, added in order
//   softmax          in the registers of the product
//   product with V   a warpgroup has 256 channels and all keys
#include "attention_join.cuh"
#include "attention_tile.cuh"
#include "dependent.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256, kSlices = kChannels / kSlice, kEntryBytes = 576;
constexpr int kGroups = kTileKeys / 8, kLocated = kTileKeys / 8;  // groups of 8 keys; keys that a warp locates
constexpr int kKeys = kTileKeys / 2;                              // of a warpgroup in the product with K
constexpr uint32_t kQuerySlice = kHeads * kRowBytes;
// Offsets in shared memory, before those of AttentionParams (_WIDE in decode_attention.py).
constexpr uint32_t kQueries = 0, kEntries = kSlices * kQuerySlice, kRaw = kEntries + kSlices * kSliceBytes;
constexpr uint32_t kScales = kRaw + kTileKeys * kEntryBytes, kBarrier = kScales + 8 * kTileKeys;
constexpr uint32_t kPresent = kBarrier + 16;          // bool [keys]
constexpr uint32_t kMost = kPresent + kTileKeys;      // fp32 [2][heads], the largest score of each half of the keys
constexpr uint32_t kSecond = kMost + 2 * kHeads * 4;  // fp32 [20][128], the unrounded weights of the second half

// What a thread is: lane (g, c) of a warp, which has a slice and in the products heads `head` and `head` + 8.
struct Wide {
  int thread, warp, lane, g, c, half, head;  // half: number of the warpgroup

  DSV4_D Wide() : thread(threadIdx.x), warp(warp_id()), lane(lane_id()), g(lane / 4), c(lane % 4) {
    half = __shfl_sync(kAll, warp / 4, 0);  // the compiler sees that it is the same in all lanes
    head = warp % 4 * 16 + g;
  }
  DSV4_D bool in_fp8() const { return warp < kSlices - 1; }  // its slice; the last one rotates
};

// Starts the copy of an entry of the tile, or puts zeros there. Its scales come back.
DSV4_D uint2 copy_entry(const Entry& entry, int key) {
  const bool present = entry.data != nullptr;
  const uint32_t to = kRaw + key * kEntryBytes, barrier = address_in_shared(kBarrier);
  in_shared<bool>(kPresent + key) = present;
  mbarrier_arrive_expect(barrier, present ? kEntryBytes : 0);
  if (!present) {
#pragma unroll 4
    for (int i = 0; i < kEntryBytes; i += 16) in_shared<uint4>(to + i) = {};
    return {};
  }
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address_in_shared(to)),
               "l"(entry.data), "r"(kEntryBytes), "r"(barrier)
               : "memory");
  return *reinterpret_cast<const uint2*>(entry.scale);
}

// Channels 16 c .. 16 c + 15 of a row of a slice, g being its number modulo 8: k step j of the products with K has channels
// 16 c + 4 j .. + 3 of all c, as in cuda/attention.cu, so these four stand at 16 j + 4 c (and come back in `join_slots`). Rows that
// are odd begin with the second half of the steps, which `words` has in front: no bank conflicts.
DSV4_D void store_row(uint32_t row, int g, int c, const uint32_t (&words)[8]) {
  const uint32_t at = row + (((c >> 1) ^ g ^ (4 * (g & 1))) * 16) + (c & 1) * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) in_shared<uint2>(at ^ (32 * i)) = {words[2 * i], words[2 * i + 1]};
}

DSV4_D void store_row_bf16(uint32_t row, int g, int c, uint4 low, uint4 high) {
  const bool odd = g & 1;
  const uint4 a = odd ? high : low, b = odd ? low : high;
  const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  store_row(row, g, c, words);
}

struct Queries {
  uint4 words[kHeads / 8][2];

  DSV4_D void load(const AttentionParams& p, const Wide& role, int row, int first_head) {
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) {
      const int head = min(first_head + 8 * n + role.g, p.heads - 1);  // nothing is stored of a head too many
      const uint16_t* from = p.q + (size_t(row) * p.heads + head) * p.channels + role.warp * kSlice + 16 * role.c;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4& to = words[n][i];  // now, ahead of what waits for something
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(from + 8 * i));
      }
    }
  }
  DSV4_D void store(const Wide& role) const {
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n)
      store_row_bf16(kQueries + role.warp * kQuerySlice + (8 * n + role.g) * kRowBytes, role.g, role.c, words[n][0], words[n][1]);
  }
};

DSV4_D void decode_tile(const Wide& role) {
  const uint32_t row = kEntries + role.warp * kSliceBytes + role.g * kRowBytes;
  const uint32_t from = kRaw + role.g * kEntryBytes + role.warp * kSlice + (role.in_fp8() ? 16 : 32) * role.c;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    const uint4 raw = in_shared<uint4>(from + n * 8 * kEntryBytes);
    if (role.in_fp8()) {
      uint32_t words[8];
      const uint32_t scale = scale_bf16x2(in_shared<uint8_t>(kScales + 8 * (8 * n + role.g) + role.warp));
      decode_e4m3(role.g & 1 ? uint4{raw.z, raw.w, raw.x, raw.y} : raw, scale, words);
      store_row(row + n * 8 * kRowBytes, role.g, role.c, words);
    } else {
      store_row_bf16(row + n * 8 * kRowBytes, role.g, role.c, raw, in_shared<uint4>(from + n * 8 * kEntryBytes + 16));
    }
  }
}

// Scores of the warpgroup's 40 keys for all heads, not yet scaled.
DSV4_D void multiply_keys(const Wide& role, float (&sum)[kKeys / 2]) {
  const uint64_t queries = swizzled_matrix(address_in_shared(kQueries), 8 * kRowBytes);
  const uint64_t keys = swizzled_matrix(address_in_shared(kEntries + role.half * kKeys * kRowBytes), 8 * kRowBytes);
  float part[2][kKeys / 2];
#pragma unroll
  for (int pair = 0; pair <= kSlices / 2; ++pair) {
    if (pair < kSlices / 2) {
      products_begin();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int slice = 2 * pair + k / 4;
        product_64x40(part[pair % 2], moved(queries, slice * kQuerySlice + k % 4 * 32), moved(keys, slice * kSliceBytes + k % 4 * 32),
                      k > 0);
      }
      products_commit();
    }
    if (pair == 0) continue;
    if (pair < kSlices / 2) products_wait<1>(); else products_wait<0>();
    pin(part[(pair - 1) % 2]);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) sum[i] = pair == 1 ? part[0][i] : sum[i] + part[(pair - 1) % 2][i];
  }
}

// The softmax of a part so far, of heads `head` and `head` + 8; the totals are those of the first warpgroup.
struct Softmax {
  float largest[2], total[2], factor[2];

  DSV4_D void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -infinity(), total[i] = 0.0f;
  }

  // Scores -> weights, here and in bf16 in shared memory; a barrier must follow. Key 8 n + 2 c + e of the half is number 4 n + 2 i + e.
  DSV4_D void weigh(const AttentionParams& p, const Wide& role, float (&x)[kKeys / 2]) {
    float most[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const bool present = in_shared<bool>(kPresent + role.half * kKeys + i / 4 * 8 + 2 * role.c + i % 2);
      x[i] = present ? x[i] * p.score_scale : -infinity();
      most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 2));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 1));
      if (role.c == 0) in_shared<float>(kMost + (role.half * kHeads + role.head + 8 * i) * 4) = most[i];
    }
    __syncthreads();
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = kMost + (role.head + 8 * i) * 4;
      const float before = largest[i];
      largest[i] = fmaxf(before, fmaxf(in_shared<float>(at), in_shared<float>(at + kHeads * 4)));
      base[i] = base_of(largest[i]);
      factor[i] = rescale(before, largest[i]);
    }
    const uint32_t to = p.weights + (role.head * kPitch + role.half * kKeys + 2 * role.c) * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      x[i] = exp2(x[i] - base[i / 2 % 2]), x[i + 1] = exp2(x[i + 1] - base[i / 2 % 2]);
      in_shared<uint32_t>(to + (i / 2 % 2 * 8 * kPitch + i / 4 * 8) * 2) = pack_bf16(x[i], x[i + 1]);
    }
    if (role.half == 0) return;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4)
      in_shared<float4>(kSecond + (i / 4 * kThreads / 2 + role.thread % (kThreads / 2)) * 16) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
  }

  // In the first warpgroup: adds the weights up, over keys that are equal modulo 32 and then these sums in a tree, as `softmax_tile`.
  DSV4_D void add(const Wide& role, const float (&x)[kKeys / 2]) {
    if (role.half) return;
    float y[kKeys / 2];
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 4) {
      const float4 four = in_shared<float4>(kSecond + (i / 4 * kThreads / 2 + role.thread) * 16);
      y[i] = four.x, y[i + 1] = four.y, y[i + 2] = four.z, y[i + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sums[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 2 * i + e;  // of keys 0, 32, 64; 8, 40, 72; 16, 48; 24, 56
        sums[e] = (x[at] + x[16 + at] + y[12 + at] + (x[8 + at] + y[4 + at])) + (x[4 + at] + y[at] + y[16 + at] + (x[12 + at] + y[8 + at]));
        sums[e] += __shfl_xor_sync(kAll, sums[e], 2);
        sums[e] += __shfl_xor_sync(kAll, sums[e], 1);
      }
      total[i] = total[i] * factor[i] + (sums[0] + sums[1]);
    }
  }
};

struct Weights {  // of all keys of a tile, as fragments
  uint32_t a[kTileKeys / 16][4];

  DSV4_D Weights(const AttentionParams& p, const Wide& role) {
    const uint32_t from = address_in_shared(p.weights) + ((role.warp % 4 * 16 + role.lane % 16) * kPitch + (role.lane / 16) * 8) * 2;
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) load_matrices(a[n], from + 32 * n);
  }

  // out[64 heads, 128 channels] += the weights times the tile's entries. h counts the warpgroup's channels in 128s.
  DSV4_D void multiply(const Wide& role, int h, float (&out)[64]) const {
    const uint32_t at = address_in_shared(kEntries) + (role.half * (kSlices / 2) + 2 * h) * kSliceBytes;
    const uint64_t entries = swizzled_matrix(at, 8 * kRowBytes, kSliceBytes);
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) product_64x128(out, a[n], moved(entries, n * 16 * kRowBytes));
  }
};

// Leaves half h of the warpgroup's channels in the CTA's image (attention_join.cuh).
DSV4_D void store_output(const Wide& role, float* image, int h, const float (&out)[64]) {
  float* const to = image + ((2 * h + role.half) * kHeads + role.head) * kBlock + 4 * role.c;
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = 8 * m + 2 * i;
      *reinterpret_cast<float4*>(to + 8 * i * kBlock + 16 * m) = {out[n], out[n + 1], out[n + 4], out[n + 5]};
    }
}

template <int kParts>
DSV4_D void attend(const AttentionParams& p) {
  const Wide role;
  const int row = blockIdx.z, turns = kParts > 1 ? 1 : p.turns, first_slot = turns * int(blockIdx.x), first_head = int(blockIdx.y) * kHeads;
  const Token of_row(p, row);
  const int sequence = of_row.sequence, token = of_row.number;
  const bool mine = role.lane < kLocated;  // this thread has an entry of each tile
  const int key = role.warp * kLocated + role.lane;
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  int pick = mine ? load_pick(p, Part(p, token, kParts * first_slot), row, key) : -1;
  if (token >= length) return;  // decode_attention_join_64 does it
  Queries queries;
  queries.load(p, role, row, first_head);
  if (role.thread == 0) {
    mbarrier_init(address_in_shared(kBarrier), kTileKeys);
    mbarrier_init_fence();
  }
  Part part(p, token, kParts * first_slot);
  part.set_position(p, start, kParts * first_slot);
  const auto tiles_of = [](const Part& part) { return kParts > 1 ? kParts : max(1, (part.count() + kTileKeys - 1) / kTileKeys); };
  Entry entry = mine ? locate(p, part, sequence, key, pick) : Entry{};
  __syncthreads();
  uint2 scales = {};
  if (mine) scales = copy_entry(entry, key);
  queries.store(role);
  float out[2][64] = {};
  Softmax softmax, one;  // of this part; of the first of two
  softmax.begin();
  int turn = 0, tile = 0, tiles = tiles_of(part);
  const auto image = [&] { return (size_t(row) * gridDim.x * turns + first_slot + turn) * gridDim.y + blockIdx.y; };  // its number
#pragma unroll 1
  for (uint32_t parity = 0;; parity ^= 1) {
    const bool last = tile + 1 == tiles, more = !last || turn + 1 < turns;
    // Of the tile after this one: its part, and this thread's key there.
    const int next_part = kParts > 1 ? 2 * first_slot + 1 : first_slot + turn + last, next_key = key + (kParts > 1 || last ? 0 : tile + 1) * kTileKeys;
    if (mine) in_shared<uint2>(kScales + 8 * key) = scales;
    if (mine && more) pick = load_pick(p, Part(p, token, next_part), row, next_key);
    mbarrier_wait(address_in_shared(kBarrier), parity);
    __syncthreads();  // the scales are there, and the entries of the tile before have been read
    decode_tile(role);
    if (mine && more) entry = locate(p, part_anew(p, next_part), sequence, next_key, pick);
    fence_async();  // queries and entries, for the products; and the raw entries have been read
    __syncthreads();
    float x[kKeys / 2];
    multiply_keys(role, x);
    if (kParts > 1 && tile == 1) one = softmax, softmax.begin();
    softmax.weigh(p, role, x);
    __syncthreads();  // the weights are there, and nobody asks any more which entries are
    const Weights weights(p, role);
    if (kParts == 1 || tile == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < 64; ++n) out[h][n] = kParts > 1 || tile == 0 ? 0.0f : out[h][n] * softmax.factor[n / 2 % 2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        pin(out[h]);
        products_begin();
        weights.multiply(role, h, out[h]);
        products_commit();
        if (h == 0) {
          if (mine && more) scales = copy_entry(entry, key);
          softmax.add(role, x);
        } else if (kParts == 1 && last) {
          store_output(role, p.partial + image() * kImage, 0, out[0]);  // meanwhile
        }
        products_wait<0>();
        pin(out[h]);
      }
    } else {
      const Join both[2] = {{one.largest[0], softmax.largest[0]}, {one.largest[1], softmax.largest[1]}};
      softmax.add(role, x);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float other[64] = {};
        pin(other);
        products_begin();
        weights.multiply(role, h, other);
        products_commit();
        if (h) store_output(role, p.partial + image() * kImage, 0, out[0]);
        products_wait<0>();
        pin(other);
#pragma unroll
        for (int n = 0; n < 64; ++n) out[h][n] = join(out[h][n], both[n / 2 % 2].own, other[n], both[n / 2 % 2].other);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) softmax.largest[i] = both[i].largest, softmax.total[i] = both[i].total(one.total[i], softmax.total[i]);
    }
    ++tile;
    if (!last) continue;
    store_output(role, p.partial + image() * kImage, 1, out[1]);
    if (role.half == 0 && role.c == 0)
#pragma unroll
      for (int i = 0; i < 2; ++i) p.partial_softmax[image() * kHeads + role.head + 8 * i] = {softmax.largest[i], softmax.total[i]};
    if (!more) return;
    ++turn, tile = 0, tiles = tiles_of(part_anew(p, kParts * (first_slot + turn)));
    softmax.begin();
  }
}

}  // namespace

// decode_attention_fp8_64_<parts of a turn>; two have one turn: registers are short
extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_attention_fp8_64_1(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<1>(p);
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_attention_fp8_64_2(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<2>(p);
}

// What the CTAs of one cluster, or of several, have left. Few registers, where a token has little to add up and there are many CTAs.
extern "C" __global__ void __launch_bounds__(128, 8) decode_attention_join_64(const __grid_constant__ Join64Params p) {
  start_after_previous();
  join_images<false>(p);
}
extern "C" __global__ void __launch_bounds__(128) decode_attention_join_64_clusters(const __grid_constant__ Join64Params p) {
  start_after_previous();
  join_images<true>(p);
}

}  // namespace dsv4
