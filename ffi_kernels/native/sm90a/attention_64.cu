// Sparse decode attention for 64 heads at a time, on wgmma: the mapping of many sequences of cuda/attention.cu, to whose results it
// is equal bit for bit. Here an entry is decoded once for all heads. 512 channels, the FP8 cache.
//
// A CTA takes one part of the keys after the other (turns), or chains of parts that fit in a tile each, which it adds up in its
// registers. It leaves the output of each in device memory, and a second launch, decode_attention_join_64, adds up those of a token: a
// cluster would do it while its tensor cores wait. Grid (CTAs of a token, groups of 64 heads, B T). Two of its four warpgroups fetch
// tiles of 80 keys, two multiply them with the heads:
//   fetch            warp w slice w of all keys: cp.async to where the bf16 entry will lie, decoded there for both products
//   product with K   a warpgroup has every other group of 8 keys; partial scores over 128 channels each, added in order
//   softmax          in the registers of the product
//   product with V   a warpgroup has 256 channels and all keys
// Shared memory has room for less than two tiles: tiles begin at rows 0 and 64 in turn, and the 16 rows that neighbours share are
// written when the tile before has been multiplied.
#include "attention_fetch.cuh"
#include "dependent.cuh"
#include "wgmma.cuh"

namespace dsv4 {
namespace {

// What a thread of the multiplying half is: lane (g, c) of a warp, with heads `head` and `head` + 8.
struct Multiply {
  int thread, warp, lane, g, c, half, head;  // half: number of the warpgroup

  DSV4_D Multiply() : thread(threadIdx.x), warp(warp_id()), lane(lane_id()), g(lane / 4), c(lane % 4) {
    half = __shfl_sync(kAll, warp / 4, 0);  // the compiler sees that it is the same in all lanes
    head = warp % 4 * 16 + g;
  }
};

struct Queries {
  uint4 words[kHeads / 8][2];

  DSV4_D void load(const AttentionParams& p, const Multiply& role, int row, int first_head) {
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) {
      const int head = min(first_head + 8 * n + role.g, p.heads - 1);  // nothing is stored of a head too many
      const uint16_t* from = p.q + (size_t(row) * p.heads + head) * p.channels + role.warp * kSlice + 16 * role.c;
#pragma unroll
      for (int i = 0; i < 2; ++i) words[n][i] = load_now(reinterpret_cast<const uint4*>(from + 8 * i));
    }
  }
  DSV4_D void store(const Multiply& role) const {
    const RowStore to(address_in_shared(kQueries + role.warp * kQuerySlice + role.g * kRowBytes), role.g, role.c);
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) to(8 * n * kRowBytes, role.g, words[n][0], words[n][1]);
  }
};

// Scores of the warpgroup's 40 keys for all heads, not yet scaled.
DSV4_D void multiply_keys(const Multiply& role, int number, float (&sum)[kKeys / 2]) {
  const uint64_t queries = swizzled_matrix(address_in_shared(kQueries), 8 * kRowBytes);
  const uint64_t keys = swizzled_matrix(address_in_shared(kEntries + (first_row(number) + 8 * role.half) * kRowBytes), 16 * kRowBytes);
#pragma unroll
  for (int pair = 0; pair < kSlices / 2; ++pair) {
    float part[kKeys / 2];
    products_begin();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int slice = 2 * pair + k / 4;
      product_64x40(part, moved(queries, slice * kQuerySlice + k % 4 * 32), moved(keys, slice * kEntrySlice + k % 4 * 32), k > 0);
    }
    products_commit();
    products_wait<0>();
    pin(part);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) sum[i] = pair == 0 ? part[i] : sum[i] + part[i];
  }
}

// The softmax of a part so far, of heads `head` and `head` + 8; the totals are those of the first warpgroup.
struct Softmax {
  float largest[2], total[2], factor[2];

  DSV4_D void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -infinity(), total[i] = 0.0f;
  }

  // Scores -> weights in bf16 in shared memory, and in the unrounded ones' place sums over keys that are equal modulo 16; a barrier
  // must follow. Key 8 (2 n + half) + 2 c + e is number 4 n + 2 i + e.
  DSV4_D void weigh(const AttentionParams& p, const Multiply& role, int number, float (&x)[kKeys / 2]) {
    float most[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const bool present = in_shared<bool>(kPresent + (number & 1) * kTileKeys + 8 * role.half + i / 4 * 16 + 2 * role.c + i % 2);
      x[i] = present ? x[i] * p.score_scale : -infinity();
      most[i / 2 % 2] = fmaxf(most[i / 2 % 2], x[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 2));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAll, most[i], 1));
      if (role.c == 0) in_shared<float>(kMost + (role.half * kHeads + role.head + 8 * i) * 4) = most[i];
    }
    bar_sync<1>(kMultiply);
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = kMost + (role.head + 8 * i) * 4;
      const float before = largest[i];
      largest[i] = fmaxf(before, fmaxf(in_shared<float>(at), in_shared<float>(at + kHeads * 4)));
      base[i] = base_of(largest[i]);
      factor[i] = rescale(before, largest[i]);
    }
    const uint32_t to = kWeights + (role.head * kPitch + 8 * role.half + 2 * role.c) * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      x[i] = exp2(x[i] - base[i / 2 % 2]), x[i + 1] = exp2(x[i + 1] - base[i / 2 % 2]);
      in_shared<uint32_t>(to + (i / 2 % 2 * 8 * kPitch + i / 4 * 16) * 2) = pack_bf16(x[i], x[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = x[i] + x[8 + i] + x[16 + i] + (x[4 + i] + x[12 + i]);
    if (role.half) in_shared<float4>(kSums + role.thread % (kMultiply / 2) * 16) = {x[0], x[1], x[2], x[3]};
  }

  // In the first warpgroup: adds the weights up, over keys that are equal modulo 32 and then these sums in a tree, as `softmax_tile`.
  DSV4_D void add(const Multiply& role, const float (&x)[kKeys / 2]) {
    if (role.half) return;
    const float4 four = in_shared<float4>(kSums + role.thread * 16);
    const float sums[4] = {x[0] + four.x, x[1] + four.y, x[2] + four.z, x[3] + four.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        pair[e] = sums[2 * i + e];
        pair[e] += __shfl_xor_sync(kAll, pair[e], 2);
        pair[e] += __shfl_xor_sync(kAll, pair[e], 1);
      }
      total[i] = total[i] * factor[i] + (pair[0] + pair[1]);
    }
  }
};

struct Weights {  // of all keys of a tile, as fragments
  uint32_t a[kTileKeys / 16][4];

  DSV4_D Weights(const Multiply& role) {
    const uint32_t from = address_in_shared(kWeights) + ((role.warp % 4 * 16 + role.lane % 16) * kPitch + (role.lane / 16) * 8) * 2;
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) load_matrices(a[n], from + 32 * n);
  }

  // out[64 heads, 32 channels] = (adds ? out : 0) + the weights times the tile's entries. `eighth`: of the warpgroup's channels.
  DSV4_D void multiply(const Multiply& role, int number, int eighth, bool adds, float (&out)[16]) const {
    const uint32_t at = kEntries + (role.half * (kSlices / 2) + eighth / 2) * kEntrySlice + first_row(number) * kRowBytes;
    const uint64_t entries = moved(swizzled_matrix(address_in_shared(at), 8 * kRowBytes), eighth % 2 * kRowBytes / 2);
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) product_64x32(out, a[n], moved(entries, n * 16 * kRowBytes), adds || n > 0);
  }
};

// Leaves the output of the warpgroup in an image (attention_join.cuh).
DSV4_D void store_output(const Multiply& role, float* image, const float (&out)[8][16]) {
  float* const to = image + (role.half * kHeads + role.head) * kBlock + 4 * role.c;
#pragma unroll
  for (int eighth = 0; eighth < 8; ++eighth)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* x = out[eighth] + 8 * m + 2 * i;
        *reinterpret_cast<float4*>(to + (eighth / 4 * 2 * kHeads + 8 * i) * kBlock + eighth % 4 * 32 + 16 * m) = {x[0], x[1], x[4], x[5]};
      }
}

// Heads from `first_head` on times one tile after the other. `image`: number of the first that it leaves. kChained: an image is a
// chain of p.chain parts, of one tile each; else a part.
template <bool kChained>
DSV4_D void multiply_tiles(const AttentionParams& p, int row, int first_head, Walk walk, size_t image) {
  const Multiply role;
  Queries queries;
  queries.load(p, role, row, first_head);
  queries.store(role);
  fence_async();
  bar_sync<1>(kMultiply);
  float out[8][16];
  Softmax all;  // of the image
  int links = 0;
#pragma unroll 1
  for (int number = 0;; ++number) {
    const bool begins = kChained ? links == 0 : walk.tile == 0, more = walk.more();
    mbarrier_wait(address_in_shared(kFull), number & 1);
    float x[kKeys / 2];
    multiply_keys(role, number, x);
    Softmax part = all;
    if (kChained || begins) part.begin();
    part.weigh(p, role, number, x);
    bar_sync<1>(kMultiply);  // the weights are there
    const Weights weights(role);
    if (!kChained || begins) {
#pragma unroll
      for (int eighth = 0; eighth < 8; ++eighth) {
#pragma unroll
        for (int n = 0; n < 16; ++n) out[eighth][n] = begins ? 0.0f : out[eighth][n] * part.factor[n / 2 % 2];
        pin(out[eighth]);
      }
      products_begin();
#pragma unroll
      for (int eighth = 0; eighth < 8; ++eighth) weights.multiply(role, number, eighth, true, out[eighth]);
      products_commit();
      part.add(role, x);
      all = part;
      products_wait<0>();
#pragma unroll
      for (int eighth = 0; eighth < 8; ++eighth) pin(out[eighth]);
    } else {
      const Link link[2] = {{all.largest[0], part.largest[0]}, {all.largest[1], part.largest[1]}};
      float other[2][16];  // of one eighth while the tensor cores are at the next
#pragma unroll
      for (int eighth = 0; eighth <= 8; ++eighth) {
        if (eighth < 8) {
          products_begin();
          weights.multiply(role, number, eighth, false, other[eighth % 2]);
          products_commit();
        }
        if (eighth == 0) {
          part.add(role, x);
          continue;
        }
        if (eighth < 8) products_wait<1>(); else products_wait<0>();
        float(&out_of)[16] = out[eighth - 1], (&done)[16] = other[(eighth - 1) % 2];
        pin(done);
#pragma unroll
        for (int n = 0; n < 16; ++n) out_of[n] = linked(out_of[n], link[n / 2 % 2].before, done[n], link[n / 2 % 2].own);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
        all.largest[i] = link[i].largest, all.total[i] = linked(all.total[i], link[i].before, part.total[i], link[i].own);
    }
    if (more) mbarrier_arrive(address_in_shared(kEmpty));
    if (kChained ? ++links == p.chain : walk.tile + 1 == walk.tiles) {
      store_output(role, p.partial + image * kImage, out);
      if (role.half == 0 && role.c == 0)
#pragma unroll
        for (int i = 0; i < 2; ++i) p.partial_softmax[image * kHeads + role.head + 8 * i] = {all.largest[i], all.total[i]};
      image += gridDim.y, links = 0;
    }
    if (!more) return;
    walk.advance(p);
  }
}

template <bool kChained>
DSV4_D void attend(const AttentionParams& p) {
  const int row = blockIdx.z, first_slot = p.turns * int(blockIdx.x), chain = kChained ? p.chain : 1;
  const auto [sequence, token] = Token(p, row);
  const int warp = __shfl_sync(kAll, int(warp_id()), 0), slice = warp - kMultiply / 32;  // slice: of a warp that fetches
  const bool locates = slice >= 0 && lane_id() < kLocated;
  const int key = slice * kLocated + lane_id();
  const int pick = locates ? load_pick(p, Part(p, token, chain * first_slot), row, key) : -1;
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  if (token >= length) return;  // decode_attention_join_64 does it
  if (threadIdx.x == 0) {
    mbarrier_init(address_in_shared(kFull), kFetch);  // threads: of one for a warp, racecheck does not see that it speaks for the others
    mbarrier_init(address_in_shared(kEmpty), kMultiply);
    mbarrier_init_fence();
  }
  const Walk walk(p, token, start, chain * first_slot, chain * p.turns);
  const Entry entry = locates ? locate(p, walk.get(p), sequence, key, pick) : Entry{};
  __syncthreads();
  if (slice >= 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters));
    if (slice < kSlices - 1) fetch_tiles<true>(p, slice, walk, entry); else fetch_tiles<false>(p, slice, walk, entry);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
    const size_t image = (size_t(row) * gridDim.x * p.turns + first_slot) * gridDim.y + blockIdx.y;
    multiply_tiles<kChained>(p, row, int(blockIdx.y) * kHeads, walk, image);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_attention_fp8_64(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<false>(p);
}
extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_attention_fp8_64_chain(const __grid_constant__ AttentionParams p) {
  start_after_previous();
  attend<true>(p);
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
