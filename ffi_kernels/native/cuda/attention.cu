// Attention of 1..4 new tokens per sequence over the window and the chosen compressed entries, from a query to the
// rotated-back output, in one launch. Contract: ffi_kernels/decode_attention.py.
//
// A cluster serves one token and a group of heads. The keys are divided into parts, each with an online softmax of its own; what
// a CTA has of them, one or two or four parts, is merged by distributed shared memory. Grid (C T, head groups, B), cluster (C, 1, 1).
// For each tile of 80 keys:
//   product with K   a pair of slices (128 channels) has kSplit warps of each team, which take groups of 8 keys in turn: stored bytes
//                    -> bf16 fragments in registers -> partial scores; the bf16 entries stay in shared memory
//   softmax          sum of the partial scores in channel order, running maximum and sum of each head
//   product with V   a warp has 128 / kSplit channels and all keys
// A CTA may serve several groups of heads in turn; entries that fit in one tile are then decoded once.
// Each token and head goes through the same sums in the same order whatever else is in the launch, in every mapping: parts
// are joined in pairs of neighbours, and the pairs added in order.
#include "attention_tile.cuh"

namespace dsv4 {
namespace {

// A load that the compiler does not move behind a branch.
DSV4_D int load_now(const int32_t* from) {
  int value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

DSV4_D void copy_async_4(uint32_t shared_address, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address), "l"(from) : "memory");
}

// The part, computed where it is needed: kept in registers it would make the products spill.
DSV4_D Part part_anew(const AttentionParams& p, int number) {
  int token = blockIdx.x >> p.cluster_log2;
  asm volatile("" : "+r"(token), "+r"(number));
  Part part(p, token, number);
  part.set_position(p, load_now(p.start + blockIdx.z), number);
  return part;
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

// Where this thread leaves the outputs of heads 16 m + g and 8 more, for channels 8 n + 2 c and 1 more of its warp.
template <int kHeads, int kSplit>
DSV4_D float2& output_of(const AttentionParams& p, const Role<kSplit>& role, int m, int n, int half) {
  const int channel = role.warp * kPart<kSplit> + (2 * role.c & ~3);
  const uint32_t to = role.base + p.output + output_at<kHeads, kSplit>(role.g, channel) + (2 * role.c & 2) * 4;
  return in_shared<float2>((to ^ (32 * n)) + (16 * m + 8 * half) * kPart<kSplit> * 4);
}

// Leaves the output of the team, where the entries were or behind them, for the merge.
template <int kHeadTiles, int kSplit>
DSV4_D void store_output(const AttentionParams& p, const Role<kSplit>& role, const float (&out)[kHeadTiles][kPart<kSplit> / 8][4]) {
#pragma unroll
  for (int m = 0; m < kHeadTiles; ++m)
#pragma unroll
    for (int n = 0; n < kPart<kSplit> / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) output_of<16 * kHeadTiles>(p, role, m, n, i) = {out[m][n][2 * i], out[m][n][2 * i + 1]};
}

// A part to a CTA, all warps at one tile.
template <bool kFp8, int kHeadTiles>
DSV4_D void attend(const AttentionParams& p) {
  constexpr int heads = 16 * kHeadTiles;
  const Role<4> role(p);
  const int sequence = blockIdx.z, token = blockIdx.x >> p.cluster_log2, rank = blockIdx.x & ((1 << p.cluster_log2) - 1), thread = threadIdx.x;
  const int row = sequence * p.tokens + token;
  Part part(p, token, rank);
  const bool locates = thread < kTileKeys;  // entry `thread` of each tile
  int pick = locates ? load_pick(p, part, row, thread) : -1;  // in flight together with start and length
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  if (token >= length) return store_nothing<heads>(p, row, rank);
  part.set_position(p, start, rank);
  const int count = part.count(), tiles = (count + kTileKeys - 1) / kTileKeys;
  load_constants(p, row, heads);
#pragma unroll 1
  for (int pass = 0; pass < p.passes; ++pass) {
    const int first_head = (int(blockIdx.y) * p.passes + pass) * heads;
    const bool decoded = pass > 0 && p.stages == 1;  // the first pass left the one tile in bf16
    uint32_t scales[2] = {};
    if (!decoded) {
      if (locates) {
        in_shared<Entry>(p.rows + thread * sizeof(Entry)) = locate(p, part_anew(p, rank), sequence, thread, pick);
        pick = load_pick(p, part_anew(p, rank), row, kTileKeys + thread);
      }
      __syncthreads();
      load_tile<kFp8>(p, role, 0, keys_of_tile(count, 0), scales);
    }
    float out[kHeadTiles][kPart<4> / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = p.stages == 2 ? tile & 1 : 0, keys = keys_of_tile(count, tile);
      if (locates && tile + 1 < tiles) {
        const Part part = part_anew(p, rank);
        const int key = (tile + 1) * kTileKeys + thread;
        in_shared<Entry>(p.rows + (((tile + 1) & 1) * kTileKeys + thread) * sizeof(Entry)) = locate(p, part, sequence, key, pick);
        pick = load_pick(p, part, row, key + kTileKeys);
      }
      multiply_keys<kFp8, kHeadTiles>(p, role, row, first_head, stage, keys, decoded, scales);
      __syncthreads();
      if (tile + 1 < tiles) load_tile<kFp8>(p, role, tile + 1, keys_of_tile(count, tile + 1), scales);
      softmax_tile<heads, 32 / kHeadTiles>(p, role, 0, tile, tile == 0, keys);
      __syncthreads();
      multiply_values<kHeadTiles>(p, role, tile == 0, stage, keys, out);
    }

    copy_async_wait<0>();
    __syncthreads();  // the entries have been read: the output may take their place
    store_output<kHeadTiles>(p, role, out);
    if (!tiles && thread < heads) in_shared<float>(p.largest + 4 * thread) = -infinity(), in_shared<float>(p.total + 4 * thread) = 0.0f;
    cluster_sync();
    merge<heads, 4, 1, false>(p, row, first_head, pass, rank);
    if (pass + 1 < p.passes && locates) pick = load_pick(p, part_anew(p, rank), row, thread);
    cluster_wait();  // nobody goes on while others read from it
  }
}

// A tile of one of the parts of a team.
struct Step {
  int turn = 0, tile = 0;  // which part, which tile of it
  DSV4_D void advance(int count) {
    ++tile;
    if (tile * kTileKeys >= count) tile = 0, ++turn;
  }
  DSV4_D int key(int thread) const { return tile * kTileKeys + thread; }
};

// One or two parts to each of two teams of a CTA: while one waits for entries or for its softmax, the other multiplies.
template <bool kFp8>
DSV4_D void attend_in_teams(const AttentionParams& p) {
  constexpr int heads = 16, width = kPart<2> / 8;
  const Role<2> role(p);
  const int sequence = blockIdx.z, token = blockIdx.x >> p.cluster_log2, rank = blockIdx.x & ((1 << p.cluster_log2) - 1), thread = role.thread;
  const int row = sequence * p.tokens + token, first_head = int(blockIdx.y) * heads, first = (2 * rank + role.team) * p.parts_of_team;
  const bool locates = thread < kTileKeys;
  int pick = locates ? load_pick(p, Part(p, token, first), row, thread) : -1;
  const int start = load_now(p.start + sequence), length = load_now(p.length + sequence);
  if (token >= length) return store_nothing<heads>(p, row, rank);
  load_constants(p, row, heads);
  Part part(p, token, first);
  part.set_position(p, start, first);
  const int count = part.count();  // no later part has more
  Step step, next;                 // of this tile, of the one that is located and copied next
  next.advance(count);
  uint32_t scales[2] = {};
  if (locates) {
    in_shared<Entry>(role.base + p.rows + thread * sizeof(Entry)) = locate(p, part, sequence, thread, pick);
    pick = load_pick(p, Part(p, token, first + next.turn), row, next.key(thread));
  }
  role.sync(p);
  load_tile<kFp8>(p, role, 0, keys_of_tile(count, 0), scales);
  float out[1][width][4] = {};       // of this part
  volatile float other[width][4];    // of the one before: in local memory, because registers are short
#pragma unroll 1
  for (int number = 0;; ++number) {  // of the tile among those of the team; a part without keys has one too
    const int keys = keys_of_tile(count, step.tile);
    const bool last = next.turn == p.parts_of_team;
    if (locates && !last) {  // while the copies of this tile are on their way
      const int number_of_next = first + next.turn, key = next.key(thread);
      in_shared<Entry>(role.base + p.rows + (((number + 1) & 1) * kTileKeys + thread) * sizeof(Entry)) =
          locate(p, part_anew(p, number_of_next), sequence, key, pick);
      Step later = next;
      later.advance(count);
      pick = load_pick(p, Part(p, token, first + later.turn), row, later.key(thread));
    }
    multiply_keys<kFp8, 1>(p, role, row, first_head, 0, keys, false, scales);
    role.sync(p);
    softmax_tile<heads, 16>(p, role, role.base + step.turn * heads * 4, number, step.tile == 0, keys);
    role.sync(p);
    multiply_values<1>(p, role, step.tile == 0, 0, keys, out);
    if (last) break;
    if (next.tile == 0) {
#pragma unroll
      for (int n = 0; n < width; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) other[n][i] = out[0][n][i], out[0][n][i] = 0.0f;
    }
    step = next;
    next.advance(count);
    role.sync(p);  // the entries have been read, and the next ones are located
    load_tile<kFp8>(p, role, number + 1, keys_of_tile(count, step.tile), scales);
  }

  // Two parts are joined here: both of the team, or that of each team, by the first one.
  const bool pair = p.parts_of_team == 1;
  const uint32_t largest = role.base + p.largest, total = role.base + p.total, second = pair ? p.team_bytes : heads * 4;
  copy_async_wait<0>();
  if (pair) {
    if (role.team == 1) {
      role.sync(p);  // the entries have been read: the output may take their place
      store_output<1>(p, role, out);
    }
    __syncthreads();
  }
  if (!pair || role.team == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = largest + 4 * (role.g + 8 * i);
      const Join both(in_shared<float>(at), in_shared<float>(at + second));
#pragma unroll
      for (int n = 0; n < width; ++n) {
        float &x = out[0][n][2 * i], &y = out[0][n][2 * i + 1];
        if (pair) {
          Role<2> beside = role;
          beside.base += p.team_bytes;
          const float2 those = output_of<heads>(p, beside, 0, n, i);
          x = join(x, both.own, those.x, both.other), y = join(y, both.own, those.y, both.other);
        } else {
          x = join(other[n][2 * i], both.own, x, both.other), y = join(other[n][2 * i + 1], both.own, y, both.other);
        }
      }
    }
    role.sync(p);  // the largest scores and the entries have been read
    store_output<1>(p, role, out);
    if (thread < heads) {
      float &one = in_shared<float>(largest + 4 * thread), &sum = in_shared<float>(total + 4 * thread);
      const Join both(one, in_shared<float>(largest + second + 4 * thread));
      one = both.largest, sum = both.total(sum, in_shared<float>(total + second + 4 * thread));
    }
  }
  cluster_sync();
  if (pair)
    merge<heads, 2, 1, true>(p, row, first_head, 0, rank);
  else
    merge<heads, 2, 2, true>(p, row, first_head, 0, rank);
  cluster_wait();  // nobody ends while others read from it
}

}  // namespace

// decode_attention_<format>_<heads of a CTA, or teams>
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_16(const __grid_constant__ AttentionParams p) {
  attend<true, 1>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_32(const __grid_constant__ AttentionParams p) {
  attend<true, 2>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_16(const __grid_constant__ AttentionParams p) {
  attend<false, 1>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_32(const __grid_constant__ AttentionParams p) {
  attend<false, 2>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_fp8_teams(const __grid_constant__ AttentionParams p) {
  attend_in_teams<true>(p);
}
extern "C" __global__ void __launch_bounds__(512, 1) decode_attention_bf16_teams(const __grid_constant__ AttentionParams p) {
  attend_in_teams<false>(p);
}

}  // namespace dsv4
