// experts: the MoE of a few tokens in two launches (ffi_kernels/experts.py). experts_up: gate, up and SwiGLU of every
// picked expert and the shared one; experts_down: their down products, summed over each token's slots in slot order.
//
// Both read every matrix once for as many tokens as a group holds, 16 rows at a time by teams of warps, through the rings of tile.cuh. Kind 0
// is the routed experts, kind 1 the shared one, which may have another format and width. With one token both are served at once
// (`apart`, see own_kind), and whatever does not depend on the launches in front is done while these still run.
#include "dependent.cuh"
#include "expert_walks.cuh"

namespace dsv4 {

constexpr int kAhead = 1;        // slots on their way to a warp: two would delay everything else
constexpr int kUpChunks = 2, kDownChunks = 6;  // of 4096 elements: what one token may bring (STAGED of experts.py)
constexpr int kTouched = 16384;  // bytes of inputs that stay in the L1 that the shared memory leaves

template <class At>
struct RowsAt {
  const At& of;
  DSV4_D StagedRow at(int i) const { return of(i); }
};

template <uint32_t kinds, bool whole, bool apart>
DSV4_D void experts_up(const ExpertsUpParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);  // of gate, then of up
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 2);
  uint32_t* amax = reinterpret_cast<uint32_t*>(&groups + 1);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + kColumns * 4 + 15) / 16 * 16;
  const ColumnSpace space = column_space(inputs, p.hidden, p.columns);

  touch_params(p);
  UpWalk<kinds, apart> walk(p, groups);
  if constexpr (apart) walk.place(walk.kind ? 1 : p.slots);  // right if all slots count
  Ring<kinds, whole, UpWalk<kinds, apart>, kAhead> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start(apart && walk.kind, apart && !walk.kind ? 0 : kAhead);  // of the shared expert; the others only find their place
  int parity = 0;
  // The rows that the walk stands at, of gate and up, for each token of its group.
  const auto tile = [&](const Team& team, int kind, int count) {
    const int format = format_of(p.kind[kind]), matrix = kind ? 0 : groups.matrix[walk.group];
    const float of_gate = load_global(p.global[kind][0], format, matrix), of_up = load_global(p.global[kind][1], format, matrix);
    const Columns columns = columns_of(space, p.hidden, count);
    float* of_team = partials + (parity * 2 * kTileWarps + warp_id() - team.rank()) * kPartial;
    Segment s;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      s = walk.segment(half);
      const int units = units_of(s.rows);
      float sum[4] = {};
      for (int unit = s.first; unit < units; unit += s.step) {
        multiply_unit<kinds>(sum, ring, p.kind[kind], s.rows, columns, unit);
      }
      store_partial(of_team + (half * kTileWarps + team.rank()) * kPartial, sum);
    }
    parity ^= 1;
    team.sync();  // the next tile takes the other partials
    if (apart && kind) wait_for_previous();
    for (int i = team.rank() * 32 + lane_id(); i < kTileRows * count; i += 32 << team.split_log2) {
      const int row = i % kTileRows, column = i / kTileRows, f = walk.row + row;
      if (!whole && row >= s.rows.rows) continue;
      const float factor = space.factor[column];
      float gate = finished(sum_partials(of_team, row, column, team.split_log2), format, factor, of_gate);
      float up = finished(sum_partials(of_team + kTileWarps * kPartial, row, column, team.split_log2), format, factor, of_up);
      gate = min_nan(round_bf16(gate), p.limit);
      up = max_nan(min_nan(round_bf16(up), p.limit), -p.limit);
      float h = silu(gate) * up;
      const int member = apart && kind ? 0 : groups.member[walk.group][column];
      if (kind == 0) h *= groups.weight[member];
      p.h[kind][int64_t(member) * p.width[kind] + f] = float_to_bf16(h);
    }
  };

  if constexpr (apart) {  // x is early: only the picks are waited for, and h
    const int form = form_of<kinds>(p.kind[0]);
    const auto at = [&](int) { return StagedRow{{reinterpret_cast<const void*>(p.x), nullptr, nullptr, p.hidden, form}, 0, space, 0}; };
    TokenStage<kUpChunks> stage(1, at);
    stage.load();
    stage.write(1, at, form, amax);
    __syncthreads();
    if (walk.kind == 0) {
      const MatrixBytes bytes = matrix_bytes<kinds>(format_of(p.kind[0]), p.width[0], p.hidden);
      wait_and_let_next_start();
      if (warp_id() == 0) find_picks(groups, p.ids, p.weights, p.slots, p.experts);
      asm volatile("bar.sync 1, %0;" ::"r"(32 * p.routed_warps) : "memory");
      if (groups.all - 1 != p.slots) {
        walk.place(groups.all - 1);
        ring.walk.place(groups.all - 1);
        ring.unit = ring.units = 0;
      } else if (walk.left > 0) {
        ring.move(bytes, groups.matrix[walk.group]);
      }
      walk.picked = ring.walk.picked = true;
      ring.start(true);
    }
    const Team team = walk.team();
    while (walk.next_tile()) tile(team, walk.kind, 1);
    if (walk.kind) wait_for_previous();
  } else {
    wait_and_let_next_start();
    const uint32_t touched = touch(p.x, int64_t(p.rows) * p.hidden * 2);
    find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.w[1][0] != nullptr, p.columns);
    keep(touched);
    walk.known = ring.walk.known = true;
    const auto token_of = [&](int group, int column) { return groups.member[group][column] / (group < groups.shared ? 1 : p.slots); };
    Team before{0};
    int staged = -1;
    while (walk.next_group()) {
      const int kind = walk.kind, group = walk.group, count = groups.count[group], form = form_of<kinds>(p.kind[kind]);
      bool same = staged >= 0 && groups.count[staged] == count && form_of<kinds>(p.kind[staged < groups.shared]) == form;
      for (int i = 0; same && i < count; ++i) same = token_of(staged, i) == token_of(group, i);
      if (!same) {
        __syncthreads();  // the columns before were read
        const InputRows in{reinterpret_cast<const void*>(p.x), nullptr, nullptr, p.hidden, form};
        const auto at = [&](int i) { return StagedRow{in, token_of(group, i), space, i}; };
        const RowsAt<decltype(at)> rows{at};
        Stage<1, RowsAt<decltype(at)>> stage(rows, count, p.hidden);
        const bool early = staged < 0 && p.rows * p.hidden * 2 <= kTouched;  // otherwise the rings must wait for the inputs
        if (staged < 0 && stage.fits()) stage.load();
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
          if (i == int(early)) {
            stage.write(scaled_here(in), amax);
          } else {
            ring.start(true);
          }
        }
        __syncthreads();
      }
      const Team team = walk.team();
      if (staged >= 0 && before.split_log2 != team.split_log2) {  // other teams from here on: those before must have read their sums
        before.sync();
        parity = 0;
      }
      before = team;
      staged = group;
      while (walk.next_tile()) tile(team, kind, count);
    }
  }
}

// log2 of the columns of a group as they are counted while they are staged.
DSV4_D int columns_log2(int columns) { return columns > 4 ? 3 : columns > 2 ? 2 : columns - 1; }

// Where the product of a member of a group waits for the sum: slot x of token r, or the shared expert as slot X.
DSV4_D int place_of(const ExpertsDownParams& p, const Groups& groups, int group, int column) {
  const int member = groups.member[group][column];
  return group < groups.shared ? member * (p.slots + 1) + p.slots : member / p.slots * (p.slots + 1) + member % p.slots;
}

template <uint32_t kinds, bool whole, bool apart>
DSV4_D void experts_down(const ExpertsDownParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 4);
  uint8_t* products_at = reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + 15) / 16 * 16;
  float* products = reinterpret_cast<float*>(products_at);  // [tiles, R, X + 1, 16]
  const int per_tile = p.rows * (p.slots + 1) * kTileRows;
  uint32_t* amax = reinterpret_cast<uint32_t*>(products + p.tiles * per_tile);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(amax + p.batch * kColumns);
  const auto space_of = [&](int in_batch, int kind) { return column_space(inputs + in_batch * p.space, p.width[kind], p.columns); };

  let_next_start();
  touch_params(p);
  // The picks are early, because experts_up lets this launch start only after all those before it.
  if constexpr (apart) {
    if (warp_id() == 0) find_picks(groups, p.ids, p.weights, p.slots, p.experts);
    __syncthreads();
  } else {
    find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.w[1] != nullptr, p.columns);
  }
  DownWalk<kinds, apart> walk(p, groups);
  Ring<kinds, whole, DownWalk<kinds, apart>, kAhead> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start(true);

  int parity = 0;
  // The rows that the walk stands at for each token of its group; `first`: the first group of the batch.
  const auto job = [&](const Team& team, int first) {
    const int kind = walk.kind, group = walk.group, count = apart ? 1 : groups.count[group], format = format_of(p.kind[kind]);
    const ColumnSpace space = space_of(group - first, kind);
    const Columns columns = columns_of(space, p.width[kind], count);
    const Segment s = walk.segment();
    const int units = units_of(s.rows);
    const float global = load_global(p.global[kind], format, groups.matrix[group]);
    float sum[4] = {};
    for (int unit = s.first; unit < units; unit += s.step) {
      multiply_unit<kinds>(sum, ring, p.kind[kind], s.rows, columns, unit);
    }
    float* of_team = partials + (parity * kTileWarps + warp_id() - team.rank()) * kPartial;
    parity ^= 1;
    store_partial(of_team + team.rank() * kPartial, sum);
    team.sync();  // the next job takes the other partials
    for (int i = team.rank() * 32 + lane_id(); i < kTileRows * count; i += 32 << team.split_log2) {
      const int row = i % kTileRows, column = i / kTileRows;
      products[walk.tile * per_tile + place_of(p, groups, group, column) * kTileRows + row] =
          finished(sum_partials(of_team, row, column, team.split_log2), format, space.factor[column], global);
    }
  };

  if constexpr (apart) {
    const int form = form_of<kinds>(p.kind[0]);
    const auto at = [&](int i) {
      const int kind = i == 0;
      return StagedRow{{reinterpret_cast<const void*>(p.h[kind]), nullptr, nullptr, p.width[kind], form}, groups.member[i][0], space_of(i, kind), 0};
    };
    TokenStage<kDownChunks> stage(groups.all, at);
    wait_for_previous();
    stage.load();
    stage.write(groups.all, at, form, amax);
    __syncthreads();
    const Team team = walk.team();
    while (walk.next_job()) job(team, 0);
  } else {
    wait_for_previous();
    Team before{-1};
    for (bool more = groups.all > 0; more; more = walk.next_batch()) {
      const int first = walk.batch * p.batch;
      const auto row_at = [&](int i) {
        const int of = columns_log2(p.columns), group = first + (i >> of), kind = group < groups.shared, column = i & ((1 << of) - 1);
        const InputRows in{reinterpret_cast<const void*>(p.h[kind]), nullptr, nullptr, p.width[kind], form_of<kinds>(p.kind[kind])};
        return StagedRow{in, groups.member[group][column], space_of(i >> of, kind), column < groups.count[group] ? column : -1};
      };
      const RowsAt<decltype(row_at)> rows{row_at};
      Stage<4, RowsAt<decltype(row_at)>> stage(rows, walk.groups_of_batch() << columns_log2(p.columns), max(p.width[0], p.width[1]));
      const bool scaled = form_of<kinds>(p.kind[0]) == kNvfp4Input || form_of<kinds>(p.kind[1]) == kNvfp4Input;
      if (stage.fits()) stage.load();
      __syncthreads();  // the columns before were read
      stage.write(scaled, amax);
      __syncthreads();
      while (walk.next_part()) {
        const Team team = walk.team();
        if (before.split_log2 != team.split_log2) {  // other teams from here on: those before must have read their sums
          if (before.split_log2 >= 0) before.sync();
          parity = 0;
        }
        before = team;
        while (walk.next_job()) job(team, first);
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < walk.tiles * p.rows * kTileRows; i += kTileThreads) {
    const int row = i % kTileRows, token = i / kTileRows % p.rows, tile = i / kTileRows / p.rows;
    const int d = (walk.begin + tile) * kTileRows + row;
    if (d >= p.hidden) continue;
    const float* of_token = products + tile * per_tile + token * (p.slots + 1) * kTileRows + row;
    float sum = 0.0f;
    for (int x = 0; x < p.slots; ++x) {
      if (groups.weight[token * p.slots + x] != 0.0f) sum += of_token[x * kTileRows];
    }
    if (p.w[1]) sum += of_token[p.slots * kTileRows];
    const int64_t to = int64_t(token) * p.hidden + d;
    if (p.out_bf16) {
      static_cast<uint16_t*>(p.out)[to] = float_to_bf16(sum);
    } else {
      static_cast<float*>(p.out)[to] = sum;
    }
  }
}

}  // namespace dsv4

#define DSV4_EXPERTS(name, bounds, kinds, whole, apart)                                                                          \
  extern "C" __global__ void bounds experts_up_##name(const __grid_constant__ dsv4::ExpertsUpParams p) { dsv4::experts_up<kinds, whole, apart>(p); } \
  extern "C" __global__ void bounds experts_down_##name(const __grid_constant__ dsv4::ExpertsDownParams p) { dsv4::experts_down<kinds, whole, apart>(p); }
#define DSV4_EXPERTS_ALL __launch_bounds__(dsv4::kTileThreads, 1)
DSV4_EXPERTS(bf16, DSV4_EXPERTS_ALL, 1u << dsv4::kBf16, true, false)
DSV4_EXPERTS(official, DSV4_EXPERTS_ALL, 1u << dsv4::kMxfp4 | 1u << dsv4::kFp8, true, false)
DSV4_EXPERTS(nvfp4, DSV4_EXPERTS_ALL, 1u << dsv4::kNvfp4, true, false)
DSV4_EXPERTS(ragged, DSV4_EXPERTS_ALL, 15u, false, false)
// Leaves 32 registers for the threads of one more warp: a multiprocessor where route_scores still runs need not wait for its end.
#define DSV4_EXPERTS_APART __maxnreg__(120)
DSV4_EXPERTS(bf16_apart, DSV4_EXPERTS_APART, 1u << dsv4::kBf16, true, true)
DSV4_EXPERTS(official_apart, DSV4_EXPERTS_APART, 1u << dsv4::kMxfp4 | 1u << dsv4::kFp8, true, true)
DSV4_EXPERTS(nvfp4_apart, DSV4_EXPERTS_APART, 1u << dsv4::kNvfp4, true, true)
DSV4_EXPERTS(ragged_apart, DSV4_EXPERTS_APART, 15u, false, true)
