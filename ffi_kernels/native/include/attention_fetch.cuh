// The fetching half of a CTA of sparse decode attention for 64 heads (sm90a/attention_64.cu): entries from the cache to bf16 in shared
// memory, one tile after the other. Also here: how that memory is divided, and what both halves go through. Not here: the products.
#pragma once

#include "attention_join.cuh"
#include "attention_tile.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"

namespace dsv4 {

constexpr int kMultiply = 256, kFetch = 256, kThreads = kMultiply + kFetch;
constexpr int kMultiplyRegisters = 208, kFetchRegisters = 48;  // 65,536 among all threads
constexpr int kSlices = kChannels / kSlice;
constexpr int kShift = 64, kRows = kShift + kTileKeys;            // where every other tile begins
constexpr int kGroups = kTileKeys / 8, kShared = (kTileKeys - kShift) / 8, kOwn = kGroups - kShared;  // of 8 keys: in rows shared with the neighbours, and not
constexpr int kKeys = kTileKeys / 2;                              // of a warpgroup in the product with K
constexpr int kLocated = kTileKeys / (kFetch / 32);               // keys that a warp locates
constexpr uint32_t kQuerySlice = kHeads * kRowBytes, kEntrySlice = kRows * kRowBytes;
// Offsets in shared memory (_WIDE in decode_attention.py).
constexpr uint32_t kQueries = 0, kEntries = kSlices * kQuerySlice;
constexpr uint32_t kWeights = kEntries + kSlices * kEntrySlice;   // bf16 [heads][kPitch]
constexpr uint32_t kLocations = kWeights + kHeads * kPitch * 2;   // of the stored entry or null [3][keys], of three tiles
constexpr uint32_t kScales = kLocations + 3 * kTileKeys * 8;      // the 8 of each key [3][keys]
constexpr uint32_t kSums = kScales + 3 * kTileKeys * 8;           // fp32 [128][4]: sums of weights of the second warpgroup
constexpr uint32_t kMost = kSums + kMultiply / 2 * 16;            // fp32 [2][heads], the largest score of each half of the keys
constexpr uint32_t kPresent = kMost + 2 * kHeads * 4;             // bool [2][keys]
constexpr uint32_t kPicks = kPresent + 2 * kTileKeys;             // int32 [keys], of the next tile to be located
constexpr uint32_t kFull = kPicks + 4 * kTileKeys, kEmpty = kFull + 8, kUsed = kEmpty + 8;  // barriers
static_assert(kUsed <= 227 * 1024);

// The tiles that a CTA takes: those of one part after the other.
struct Walk {
  int token, start;            // of the query: its number among the new ones, and the position of the first of them
  int part, end, tile, tiles;  // tiles: of this part

  DSV4_D Walk(const AttentionParams& p, int the_token, int the_start, int first, int count)
      : token(the_token), start(the_start), part(first), end(first + count), tile(0) {
    count_tiles(p);
  }
  DSV4_D Part get(const AttentionParams& p) const {
    Part of(p, token, part);
    of.set_position(p, start, part);
    return of;
  }
  DSV4_D void count_tiles(const AttentionParams& p) {  // one, where each part fits in one
    tiles = p.stages == 1 ? 1 : max(1, (get(p).count() + kTileKeys - 1) / kTileKeys);
  }
  DSV4_D bool valid() const { return part < end; }
  DSV4_D bool more() const { return tile + 1 < tiles || part + 1 < end; }
  DSV4_D void advance(const AttentionParams& p) {
    if (++tile < tiles) return;
    tile = 0;
    if (++part < end) count_tiles(p);
  }
};

DSV4_D uint32_t first_row(int number) { return (number & 1) * kShift; }  // of the tile with this number

// The warps of one half of the CTA.
template <int number>
DSV4_D void bar_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(number), "r"(threads) : "memory");
}

// Channels 16 c .. 16 c + 15 of a row of a slice, g being its number modulo 8: k step j of the products with K has channels
// 16 c + 4 j .. + 3 of all c, as in cuda/attention.cu, so these four stand at 16 j + 4 c (and come back in `join_slots`). Rows that
// are odd begin with the second half of the steps, which `words` has in front: no bank conflicts.
struct RowStore {
  uint32_t at[4];

  DSV4_D RowStore(uint32_t row, int g, int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = row + ((((c >> 1) ^ g ^ (4 * (g & 1))) * 16 + (c & 1) * 8) ^ (32 * i));
  }
  // `further`: bytes from the row that this was made for, eight rows or a multiple.
  DSV4_D void operator()(uint32_t further, const uint32_t (&words)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at[i] + further), "r"(words[2 * i]), "r"(words[2 * i + 1]) : "memory");
  }
  DSV4_D void operator()(uint32_t further, int g, const uint4& low, const uint4& high) const {
    const bool odd = g & 1;
    const uint4 a = odd ? high : low, b = odd ? low : high;
    const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    (*this)(further, words);
  }
};

// This thread's key of a tile: what the token picked becomes known one step before the entry is located, and that one step before it is
// copied. All by way of shared memory, because registers are short.
DSV4_D void ask_for_pick(const AttentionParams& p, const Walk& walk, int key) {
  const int32_t* at = pick_at(p, Part(p, walk.token, walk.part), blockIdx.z, walk.tile * kTileKeys + key);
  const uint32_t to = kPicks + 4 * key;
  if (at != nullptr) copy_async_4(address_in_shared(to), at); else in_shared<int>(to) = -1;
}
DSV4_D void leave_location(int number, const Entry& entry, int key) {
  const uint32_t at = 8 * (number % 3 * kTileKeys + key);
  in_shared<const uint8_t*>(kLocations + at) = entry.data;
  if (entry.data != nullptr) copy_async_8(address_in_shared(kScales + at), entry.scale); else in_shared<uint2>(kScales + at) = {};
}
DSV4_D void locate_ahead(const AttentionParams& p, Walk& ahead, int number, bool locates, int key) {
  if (locates) {
    int row = blockIdx.z;
    asm volatile("" : "+r"(row));  // registers are short: what follows from it is computed anew
    const Entry entry = locate(p, ahead.get(p), Token(p, row).sequence, ahead.tile * kTileKeys + key, in_shared<int>(kPicks + 4 * key));
    announce(p, entry);
    leave_location(number, entry, key);
  }
  ahead.advance(p);
  if (locates && ahead.valid()) ask_for_pick(p, ahead, key);
}

// What a warp of the fetching half does: slice `slice` of all keys, in e4m3 or, if it rotates, in bf16. Lane (g, c) has channels
// 16 c .. 16 c + 15 of every eighth key, from key g on. What depends on these is computed anew for each tile: registers are short.
template <bool kFp8>
struct Fetch {
  static constexpr int kWords = kFp8 ? 1 : 2;  // of 16 bytes, to a lane's channels
  int slice, lane, g, c, key;                  // key: that this thread locates, if it `locates`
  bool locates;
  uint32_t locations, scales;  // of key g of the tile, for this slice

  DSV4_D Fetch(int the_slice, int number) : slice(the_slice), lane(lane_id()) {
    asm volatile("" : "+r"(lane), "+r"(slice));
    g = lane / 4, c = lane % 4, key = slice * kLocated + lane, locates = lane < kLocated;
    const uint32_t first = 8 * (number % 3 * kTileKeys + g);
    locations = address_in_shared(kLocations + first), scales = address_in_shared(kScales + first + slice);
  }
  // Of the row of key g of eight, if the tile begins there.
  DSV4_D uint32_t row(int first) const { return address_in_shared(kEntries + slice * kEntrySlice + (first + g) * kRowBytes); }
  // Where the lane's bytes lie until they are decoded: in either half of the row by parity, or all over it; no bank conflicts.
  DSV4_D uint32_t raw(uint32_t row, int word) const { return row + 16 * (kFp8 ? c + 4 * (g & 1) : (2 * c + word) ^ g); }

  DSV4_D const uint8_t* located(int further) const {
    uint64_t data;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(data) : "r"(locations + 8 * further) : "memory");
    return data ? reinterpret_cast<const uint8_t*>(data) + (slice * kSlice + 16 * kWords * c) : nullptr;
  }
  // Of each of so many groups of keys, from key `first` of the tile on.
  template <int kCount>
  DSV4_D void copy_rows(uint32_t row, int first) const {
#pragma unroll 2
    for (int m = 0; m < 8 * kCount; m += 8) {
      const uint8_t* from = located(first + m);
#pragma unroll
      for (int i = 0; i < kWords; ++i) copy_async_16(raw(row, i) + m * kRowBytes, from + 16 * i, from != nullptr);
    }
  }
  DSV4_D void decode(const RowStore& store, int further, int keys, const uint4 (&raw)[kWords]) const {
    if constexpr (kFp8) {
      uint32_t code, words[8];
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(code) : "r"(scales + 8 * (further + keys)) : "memory");
      decode_e4m3(g & 1 ? uint4{raw[0].z, raw[0].w, raw[0].x, raw[0].y} : raw[0], scale_bf16x2(code), words);
      store(further * kRowBytes, words);
    } else {
      store(further * kRowBytes, g, raw[0], raw[1]);
    }
  }
};

// The rows of a tile that it does not share with its neighbours, and those that it does; and the keys that lie there from.
struct Rows {
  int own_row, own_key, shared_key;

  DSV4_D explicit Rows(int number)
      : own_row(number & 1 ? kTileKeys : 0), own_key(number & 1 ? 8 * kShared : 0), shared_key(number & 1 ? 0 : kShift) {}
};

// Decodes the tile that has been copied; the shared rows, of the first tile copied as well, once the tile before has been multiplied.
template <bool kFp8>
DSV4_D void decode_tile(const Fetch<kFp8>& role, int number) {
  const Rows of(number);
  const uint32_t own = role.row(of.own_row), shared = role.row(kShift);
  uint4 late[kShared][role.kWords] = {};
  const auto load_late = [&] {
#pragma unroll
    for (int m = 0; m < kShared; ++m) {
      const uint8_t* from = role.located(of.shared_key + 8 * m);
#pragma unroll
      for (int i = 0; i < role.kWords; ++i)
        if (number > 0 && from != nullptr) late[m][i] = load_now(reinterpret_cast<const uint4*>(from + 16 * i));
    }
  };
  if (kFp8) load_late();  // bf16 takes more registers, and less time to decode
  if (role.locates)
    in_shared<bool>(kPresent + (number & 1) * kTileKeys + role.key) =
        in_shared<const uint8_t*>(kLocations + 8 * (number % 3 * kTileKeys + role.key)) != nullptr;
  const RowStore store(own, role.g, role.c), store_shared(shared, role.g, role.c);
#pragma unroll 1
  for (int m = 0; m < 8 * kOwn; m += 16) {  // short code, not more of it: the instruction caches are small
    uint4 raw[2][role.kWords];
#pragma unroll
    for (int i = 0; i < 2 * role.kWords; ++i)
      raw[i / role.kWords][i % role.kWords] = load16(role.raw(own, i % role.kWords) + (m + i / role.kWords * 8) * kRowBytes);
    __syncwarp();  // every lane has read its part of the raw rows
#pragma unroll
    for (int i = 0; i < 2; ++i) role.decode(store, m + 8 * i, of.own_key, raw[i]);
  }
  if (!kFp8) load_late();
  if (number == 0) {
#pragma unroll
    for (int m = 0; m < kShared; ++m)
#pragma unroll
      for (int i = 0; i < role.kWords; ++i) late[m][i] = load16(role.raw(shared, i) + 8 * m * kRowBytes);
    __syncwarp();
  } else {
    mbarrier_wait(address_in_shared(kEmpty), (number - 1) & 1);
  }
#pragma unroll
  for (int m = 0; m < kShared; ++m) role.decode(store_shared, 8 * m, of.shared_key, late[m]);
  fence_async();
  mbarrier_arrive(address_in_shared(kFull));
}

// Leaves one tile after the other in shared memory. `entry`: this thread's of the first one, of which all rows are free.
template <bool kFp8>
DSV4_D void fetch_tiles(const AttentionParams& p, int slice, Walk ahead, const Entry& entry) {
  const Fetch<kFp8> begin(slice, 0);
  if (begin.locates) leave_location(0, entry, begin.key);
  ahead.advance(p);
  if (begin.locates && ahead.valid()) ask_for_pick(p, ahead, begin.key);
  copy_async_commit();
  bool more = true;  // another tile
#pragma unroll 1
  for (int number = -1;; ++number) {
    if (number >= 0) copy_async_wait<1>();  // this tile's rows, and the scales before them
    bar_sync<2>(kFetch);
    if (number >= 0) decode_tile(Fetch<kFp8>(slice, number), number);
    if (!more) return;
    const Fetch<kFp8> next(slice, number + 1);
    const Rows of(number + 1);
    next.template copy_rows<kOwn>(next.row(of.own_row), of.own_key);
    if (number < 0) next.template copy_rows<kShared>(next.row(kShift), of.shared_key);
    copy_async_commit();
    copy_async_wait<1>();  // the pick
    more = ahead.valid();
    if (more) locate_ahead(p, ahead, number + 2, next.locates, next.key);
    copy_async_commit();
  }
}

}  // namespace dsv4
