// experts: the MoE of a few tokens in two launches (ffi_kernels/experts.py). experts_up: gate, up and SwiGLU of every
// picked expert and the shared one; experts_down: their down products, summed over each token's slots in slot order.
//
// Both read every matrix once for as many tokens as a group holds, 16 rows at a time by teams of warps, through the rings of tile.cuh. Kind 0
// is the routed experts, kind 1 the shared one, which may have another format and width.
#include "dependent.cuh"
#include "expert_walks.cuh"

namespace dsv4 {

constexpr int kTouched = 16384;  // bytes of inputs that stay in the L1 that the shared memory leaves

template <class At>
struct RowsAt {
  const At& of;
  DSV4_D StagedRow at(int i) const { return of(i); }
};

template <uint32_t kinds, bool whole>
DSV4_D void experts_up(const ExpertsUpParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);  // of gate, then of up
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 2);
  uint32_t* amax = reinterpret_cast<uint32_t*>(&groups + 1);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + kColumns * 4 + 15) / 16 * 16;
  const ColumnSpace space = column_space(inputs, p.hidden, p.columns);

  let_next_start();
  UpWalk<kinds> walk(p, groups);
  Ring<kinds, whole, UpWalk<kinds>> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start_known();
  wait_for_previous();
  const uint32_t touched = touch(p.x, int64_t(p.rows) * p.hidden * 2);
  find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.w[1][0] != nullptr, p.columns);
  keep(touched);
  walk.known = ring.walk.known = true;
  bool started = false;
  const bool apart = walk.shares.apart();
  const auto token_of = [&](int group, int column) { return apart ? 0 : groups.member[group][column] / (group < groups.shared ? 1 : p.slots); };
  Team before{0};
  int staged = -1, parity = 0;
  for (bool more = walk.next_group(); more || (apart && staged < 0); more = walk.next_group()) {
    const int kind = apart ? walk.shares.own_kind() : walk.kind, group = walk.group, count = apart ? 1 : groups.count[group];
    const int split = p.split_log2[kind], form = form_of<kinds>(p.kind[kind]);
    bool same = staged >= 0 && (apart || (groups.count[staged] == count && form_of<kinds>(p.kind[staged < groups.shared]) == form));
    for (int i = 0; same && i < count; ++i) same = token_of(staged, i) == token_of(group, i);
    if (!same) {
      __syncthreads();  // the columns before were read
      const InputRows in{reinterpret_cast<const void*>(p.x), nullptr, nullptr, p.hidden, form};
      const auto at = [&](int i) { return StagedRow{in, token_of(group, i), space, i}; };
      const RowsAt<decltype(at)> rows{at};
      Stage<1, RowsAt<decltype(at)>> stage(rows, count, p.hidden);
      const bool in_l1 = p.rows * p.hidden * 2 <= kTouched;  // otherwise the rings must wait for the inputs
      if (!started && stage.fits()) stage.load();
      if (!started && in_l1) ring.start();
      stage.write(scaled_here(in), amax);
      if (!started && !in_l1) ring.start();
      started = true;
      __syncthreads();
    }
    const Columns columns = columns_of(space, p.hidden, count);
    const Team team = walk.shares.team(kind, split);
    if (staged >= 0 && before.split_log2 != split) {  // other teams from here on: those before must have read their sums
      before.sync();
      parity = 0;
    }
    before = team;
    staged = apart ? 0 : group;
    const int format = format_of(p.kind[kind]);
    while (more && walk.next_of_group()) {
      const int matrix = groups.matrix[walk.group];
      const float of_gate = load_global(p.global[kind][0], format, matrix), of_up = load_global(p.global[kind][1], format, matrix);
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
      for (int i = team.rank() * 32 + lane_id(); i < kTileRows * count; i += 32 << split) {
        const int row = i % kTileRows, column = i / kTileRows, f = walk.row + row;
        if (!whole && row >= s.rows.rows) continue;
        const float factor = space.factor[column];
        float gate = finished(sum_partials(of_team, row, column, split), format, factor, of_gate);
        float up = finished(sum_partials(of_team + kTileWarps * kPartial, row, column, split), format, factor, of_up);
        gate = min_nan(round_bf16(gate), p.limit);
        up = max_nan(min_nan(round_bf16(up), p.limit), -p.limit);
        float h = silu(gate) * up;
        const int member = groups.member[walk.group][column];
        if (kind == 0) h *= groups.weight[member];
        p.h[kind][int64_t(member) * p.width[kind] + f] = float_to_bf16(h);
      }
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

template <uint32_t kinds, bool whole>
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
  DownWalk<kinds> walk(p, groups);
  Ring<kinds, whole, DownWalk<kinds>> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start_known();
  wait_for_previous();
  const uint32_t touched = touch(p.h[0], int64_t(p.rows) * p.slots * p.width[0] * 2), touched_shared = touch(p.h[1], int64_t(p.rows) * p.width[1] * 2);
  find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.w[1] != nullptr, p.columns);
  keep(touched);
  keep(touched_shared);
  walk.known = ring.walk.known = true;

  bool started = false;
  Team before{-1};
  int parity = 0;
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
    if (!started && stage.fits()) {
      stage.load();
      ring.start();
      started = true;
    }
    __syncthreads();  // the columns before were read
    stage.write(scaled, amax);
    if (!started) {
      ring.start();
      started = true;
    }
    __syncthreads();
    while (walk.next_part()) {
      const Team team = walk.team();
      if (before.split_log2 != team.split_log2) {  // other teams from here on: those before must have read their sums
        if (before.split_log2 >= 0) before.sync();
        parity = 0;
      }
      before = team;
      const int kind = walk.kind, format = format_of(p.kind[kind]);
      while (walk.next_of_part()) {
        const int group = walk.group, count = groups.count[group];
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

#define DSV4_EXPERTS(name, kinds, whole)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(dsv4::kTileThreads, 1) experts_up_##name(const __grid_constant__ dsv4::ExpertsUpParams p) {     \
    dsv4::experts_up<kinds, whole>(p);                                                                                                         \
  }                                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(dsv4::kTileThreads, 1) experts_down_##name(const __grid_constant__ dsv4::ExpertsDownParams p) { \
    dsv4::experts_down<kinds, whole>(p);                                                                                                       \
  }
DSV4_EXPERTS(bf16, 1u << dsv4::kBf16, true)
DSV4_EXPERTS(official, 1u << dsv4::kMxfp4 | 1u << dsv4::kFp8, true)
DSV4_EXPERTS(nvfp4, 1u << dsv4::kNvfp4, true)
DSV4_EXPERTS(ragged, 15u, false)
