// experts: the MoE of a few tokens in two or three launches (ffi_kernels/experts.py). experts_up: gate, up and SwiGLU of every
// picked expert and the shared one; experts_down: their down products, summed over each token's slots in slot order. With one token a
// CTA of experts_down has rows of all matrices and adds up; with several it has few matrices, whose inputs it brings to shared memory
// once, and experts_sum adds up.
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

// Several tokens: for each group that the walk comes to, the columns of its members' inputs, at `inputs`, and then tile(team, space, count)
// at each of its tiles. input_of(kind): the tensor; row_of(group, column): the row of it. start(): what begins with the first inputs, when
// they have been asked for, or if `late` when they are there. `ahead`: chunks of a thread that are asked for at once (Stage).
template <int ahead, class Walk, class Start, class InputOf, class RowOf, class Tile>
DSV4_D void serve_groups(Walk& walk, const Groups& groups, uint8_t* inputs, uint32_t* amax, int columns, bool late, int& parity, const Start& start,
                         const InputOf& input_of, const RowOf& row_of, const Tile& tile) {
  Team before{0};
  InputRows of_staged{};
  int staged = -1;
  while (walk.next_group()) {
    const int group = walk.group, count = groups.count[group];
    const InputRows in = input_of(walk.kind);
    const ColumnSpace space = column_space(inputs, in.k, columns);
    bool same = staged >= 0 && groups.count[staged] == count && of_staged.data == in.data && of_staged.form == in.form;
    for (int i = 0; same && i < count; ++i) same = row_of(staged, i) == row_of(group, i);
    if (!same) {
      __syncthreads();  // the columns before were read
      const auto at = [&](int i) { return StagedRow{in, row_of(group, i), space, i}; };
      const RowsAt<decltype(at)> rows{at};
      Stage<ahead, RowsAt<decltype(at)>> stage(rows, count, in.k);
      if (stage.fits()) stage.load();
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        if (i != int(late)) {
          stage.write(scaled_here(in), amax);
        } else if (staged < 0) {
          start();
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
    of_staged = in;
    staged = group;
    while (walk.next_tile()) tile(team, space, count);
  }
}

template <uint32_t kinds, bool whole, bool apart>
DSV4_D void experts_up(const ExpertsUpParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);  // of gate, then of up
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 2);
  uint32_t* amax = reinterpret_cast<uint32_t*>(&groups + 1);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + kColumns * 4 + 15) / 16 * 16;

  touch_params(p);
  if constexpr (!apart) {
    wait_and_let_next_start();
    const uint32_t touched = touch(p.x, int64_t(p.rows) * p.hidden * 2);
    find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.has_shared(), p.columns);
    keep(touched);
  }
  UpWalk<kinds, apart> walk(p, groups);
  if constexpr (apart) walk.place(walk.kind ? 1 : p.slots);  // right if all slots count
  Ring<kinds, whole, UpWalk<kinds, apart>, kAhead> ring(walk, shared + warp_id() * kRing * kSlot);
  if constexpr (apart) ring.start(walk.kind, walk.kind ? kAhead : 0);  // of the shared expert; the others only find their place
  int parity = 0;
  // The rows that the walk stands at, of gate and up, for each token of its group.
  const auto tile = [&](const Team& team, const ColumnSpace& space, int count) {
    const int kind = walk.kind, format = format_of(p.kind[kind]), matrix = kind ? 0 : groups.matrix[walk.group];
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
    const ColumnSpace space = column_space(inputs, p.hidden, 1);
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
    while (walk.next_tile()) tile(team, space, 1);
    if (walk.kind) wait_for_previous();
  } else {
    serve_groups<1>(
        walk, groups, inputs, amax, p.columns, p.rows * p.hidden * 2 > kTouched, parity, [&] { ring.start(true); },
        [&](int kind) { return InputRows{p.x, nullptr, nullptr, p.hidden, form_of<kinds>(p.kind[kind])}; },
        [&](int group, int column) { return groups.member[group][column] / (group < groups.shared ? 1 : p.slots); }, tile);
  }
}

// Where the product of a member of a group lies among those of all tokens: slot x of token r, or the shared expert as slot X.
DSV4_D int place_of(const Groups& groups, int slots, int group, int column) {
  const int member = groups.member[group][column];
  return group < groups.shared ? member * (slots + 1) + slots : member / slots * (slots + 1) + member % slots;
}

// One output of one token: the products at(x) of its slots in their order, those of weight zero left out, and that of the shared expert.
template <class At>
DSV4_D void store_sum(void* out, int64_t to, bool in_bf16, const float* weights, int slots, bool shared, const At& at) {
  constexpr int ahead = 8;  // products on their way
  float sum = 0.0f;
  for (int first = 0; first <= slots; first += ahead) {
    bool counts[ahead];
    float product[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int x = first + i;
      counts[i] = x < slots ? weights[x] != 0.0f : x == slots && shared;
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) product[i] = counts[i] ? at(first + i) : 0.0f;
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (counts[i]) sum += product[i];
    }
  }
  if (in_bf16) {
    static_cast<uint16_t*>(out)[to] = float_to_bf16(sum);
  } else {
    static_cast<float*>(out)[to] = sum;
  }
}

// The products of the rows that a walk of experts_down stands at with the columns of its group; store(place, row, product) takes each.
template <uint32_t kinds, class Ring, class Store>
DSV4_D void down_tile(const ExpertsDownParams& p, const Groups& groups, Ring& ring, const Team& team, const Segment& s, int kind, int group,
                      const ColumnSpace& space, int count, float* partials, int& parity, const Store& store) {
  const int format = format_of(p.kind[kind]), units = units_of(s.rows);
  const Columns columns = columns_of(space, p.width[kind], count);
  const float global = load_global(p.global[kind], format, groups.matrix[group]);
  float sum[4] = {};
  for (int unit = s.first; unit < units; unit += s.step) {
    multiply_unit<kinds>(sum, ring, p.kind[kind], s.rows, columns, unit);
  }
  float* of_team = partials + (parity * kTileWarps + warp_id() - team.rank()) * kPartial;
  parity ^= 1;
  store_partial(of_team + team.rank() * kPartial, sum);
  team.sync();  // the next tile takes the other partials
  for (int i = team.rank() * 32 + lane_id(); i < kTileRows * count; i += 32 << team.split_log2) {
    const int row = i % kTileRows, column = i / kTileRows;
    store(place_of(groups, p.slots, group, column), row, finished(sum_partials(of_team, row, column, team.split_log2), format, space.factor[column], global));
  }
}

// Of one token. Here and below the picks are early: experts_up lets this launch start only after all those before it.
template <uint32_t kinds, bool whole>
DSV4_D void experts_down_apart(const ExpertsDownParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 4);
  float* products = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + 15) / 16 * 16);  // [tiles, X + 1, 16]
  const int per_tile = (p.slots + 1) * kTileRows;
  uint32_t* amax = reinterpret_cast<uint32_t*>(products + p.tiles * per_tile);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(amax + (p.slots + 1) * kColumns);
  const auto space_of = [&](int group, int kind) { return column_space(inputs + group * p.space, p.width[kind], 1); };

  let_next_start();
  touch_params(p);
  if (warp_id() == 0) find_picks(groups, p.ids, p.weights, p.slots, p.experts);
  __syncthreads();
  DownWalk<kinds> walk(p, groups);
  Ring<kinds, whole, DownWalk<kinds>, kAhead> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start(true);
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
  int parity = 0;
  while (walk.next_job()) {
    const auto store = [&](int place, int row, float product) { products[walk.tile * per_tile + place * kTileRows + row] = product; };
    down_tile<kinds>(p, groups, ring, team, walk.segment(), walk.kind, walk.group, space_of(walk.group, walk.kind), 1, partials, parity, store);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < walk.tiles * kTileRows; i += kTileThreads) {
    const int row = i % kTileRows, tile = i / kTileRows, d = (walk.begin + tile) * kTileRows + row;
    if (d >= p.hidden) continue;
    const float* of_row = products + tile * per_tile + row;
    store_sum(p.out, d, p.out_bf16, groups.weight, p.slots, p.has_shared(), [&](int x) { return of_row[x * kTileRows]; });
  }
}

// Of several tokens.
template <uint32_t kinds, bool whole>
DSV4_D void experts_down(const ExpertsDownParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);
  Groups& groups = *reinterpret_cast<Groups*>(partials + kPartials / 4);
  uint32_t* amax = reinterpret_cast<uint32_t*>(&groups + 1);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(&groups) + (sizeof(Groups) + kColumns * 4 + 15) / 16 * 16;

  let_next_start();
  touch_params(p);
  find_groups(groups, p.ids, p.weights, p.rows, p.slots, p.experts, p.has_shared(), p.columns);
  using Walk = GroupWalk<kinds, 1, ExpertsDownParams>;
  Walk walk(p, groups);
  Ring<kinds, whole, Walk, kAhead> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start(true);
  wait_for_previous();
  int parity = 0;
  serve_groups<2>(
      walk, groups, inputs, amax, p.columns, false, parity, [] {},
      [&](int kind) { return InputRows{p.h[kind], nullptr, nullptr, p.width[kind], form_of<kinds>(p.kind[kind])}; },
      [&](int group, int column) { return int(groups.member[group][column]); },
      [&](const Team& team, const ColumnSpace& space, int count) {
        const Segment s = walk.segment(0);
        down_tile<kinds>(p, groups, ring, team, s, walk.kind, walk.group, space, count, partials, parity, [&](int place, int row, float product) {
          if (whole || row < s.rows.rows) static_cast<float*>(p.out)[int64_t(place) * p.hidden + walk.row + row] = product;
        });
      });
}

}  // namespace dsv4

#define DSV4_EXPERTS(name, bounds, kinds, whole, apart)                                                                          \
  extern "C" __global__ void bounds experts_up_##name(const __grid_constant__ dsv4::ExpertsUpParams p) { dsv4::experts_up<kinds, whole, apart>(p); } \
  extern "C" __global__ void bounds experts_down_##name(const __grid_constant__ dsv4::ExpertsDownParams p) {                         \
    if constexpr (apart) dsv4::experts_down_apart<kinds, whole>(p); else dsv4::experts_down<kinds, whole>(p);                          \
  }
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

extern "C" __global__ void __launch_bounds__(128) experts_sum(const __grid_constant__ dsv4::ExpertsSumParams p) {
  dsv4::start_after_previous();
  const int d = int(blockIdx.x) * 128 + int(threadIdx.x), row = blockIdx.y;
  if (d >= p.hidden) return;
  const float* products = p.products + int64_t(row) * (p.slots + 1) * p.hidden + d;
  dsv4::store_sum(p.out, int64_t(row) * p.hidden + d, p.out_bf16, p.weights + row * p.slots, p.slots, p.shared, [&](int x) { return products[int64_t(x) * p.hidden]; });
}
