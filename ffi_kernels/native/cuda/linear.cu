// linear, linears, grouped_linear for few tokens: up to 8 weights of any format in one launch (ffi_kernels/linear.py).
//
// A tile is 16 rows of one weight over all of K, read by a team of 1 to 16 warps. A CTA takes a run of consecutive tiles of
// about the same bytes as every other CTA's; its teams take turns, each at its own pace, and copy ahead from the first
// tile on before the inputs are there. More tokens than columns are more CTAs that take the same tiles (grid x). The
// order of a sum depends on the shape and format of the weight alone.
#include "dependent.cuh"
#include "stage.cuh"

namespace dsv4 {

constexpr int kProducts = 8;
constexpr int kInputs = 4;
constexpr int kMaxParts = 160;
constexpr int kMaxRows = 64;  // of inputs that a CTA stages

struct LinearProduct {
  int kind, input, n, groups;
  int split_log2;  // of the warps of a team
  int tiles;       // per group
  int out_bf16;
  int first_tile;  // of this product among all tiles; behind the last product stands the number of tiles
};

struct LinearInput {
  int kind, k, groups;  // kind: of any product that takes this input
  int offset;      // bytes from the start of the column space
};

struct LinearParams {
  const void* x[kInputs];                  // [R, groups, K], as InputRows::data
  const uint8_t* x_scale[kInputs];         // as InputRows::scale, or null
  const float* x_global[kInputs];          // fp32 [R, groups], or null
  const uint8_t* w[kProducts];             // [groups, N, K] bf16 | e4m3 | [groups, N, K / 2] packed e2m1
  const uint8_t* w_scale[kProducts];       // [groups, N/128, K/128] e8m0 | [groups, N, K/32] e8m0 | [groups, N, K/16] e4m3, or null
  const float* w_global[kProducts];        // fp32 [groups], or null
  void* out[kProducts];                    // [R, groups, N] fp32 or bf16
  int products, rows;                      // rows: R
  int columns;                             // tokens per CTA, at most 8
  int most_k;                              // the largest K
  LinearProduct product[kProducts + 1];
  LinearInput input[kInputs];
  int begin[kMaxParts + 1];                // the first tile of each part of the tiles
  int part[kMaxParts];                     // what its tiles are of: LinearPart
};

// Of the tiles of a part: the first product, the inputs they take (bit by bit), and the groups of a grouped weight, which is
// always alone.
struct LinearPart {
  int product, inputs, first_group, last_group;
  DSV4_D explicit LinearPart(int packed) : product(packed & 15), inputs(packed >> 4 & 15), first_group(packed >> 8 & 255), last_group(packed >> 16 & 255) {}
};

// The tiles of one warp's team: of each product in turn, every team's in turn. `single`: there is one product.
template <uint32_t kinds, bool single>
struct LinearWalk {
  const LinearParams& p;
  int begin, end;               // tiles of this CTA
  int product;
  int tile = 0, limit = 0, teams = 0;
  int group = 0, row = 0;       // of the present tile

  DSV4_D LinearWalk(const LinearParams& params, int part)
      : p(params), begin(p.begin[part]), end(p.begin[part + 1]), product(single ? 0 : LinearPart(p.part[part]).product - 1) {
    if (single) {
      const Team team{p.product[0].split_log2};
      teams = team.count();
      tile = begin + team.index() - teams;
    }
  }

  DSV4_D bool next(Segment& s) {
    tile += teams;
    if (single) {
      if (tile >= end) return false;
    } else {
      while (tile >= limit) {
        if (++product >= p.products) return false;
        const Team team{p.product[product].split_log2};
        limit = min(end, p.product[product + 1].first_tile);
        teams = team.count();
        tile = max(begin, p.product[product].first_tile) + team.index();
      }
    }
    const LinearProduct& of = p.product[product];
    const Team team{of.split_log2};
    const int k = p.input[of.input].k, local = single ? tile : tile - of.first_tile;
    group = of.groups == 1 ? 0 : local / of.tiles;
    row = (local - group * of.tiles) * kTileRows;
    s.rows = weight_rows<kinds>(format_of(of.kind), p.w[product], p.w_scale[product], group, of.n, k, row);
    s.first = team.rank();
    s.step = 1 << of.split_log2;
    return true;
  }
};

// The inputs of the tiles of a CTA; of a grouped weight, those of its groups from the first one on.
template <uint32_t kinds, bool single>
struct LinearRows {
  const LinearParams& p;
  const LinearPart part;
  uint8_t* inputs;
  int token, count;

  DSV4_D int tensors() const { return (single ? 1 : __popc(part.inputs)) + part.last_group - part.first_group; }

  // Whether any of them gets a global scale here.
  DSV4_D bool scaled() const {
    if (single) return form_of<kinds>(p.input[0].kind) == kNvfp4Input && !p.x_scale[0];
    bool any = false;
    for (int f = 0; f < kInputs; ++f) any |= (part.inputs >> f & 1) && form_of<kinds>(p.input[f].kind) == kNvfp4Input && !p.x_scale[f];
    return any;
  }

  DSV4_D StagedRow at(int i) const {
    int tensor = 0, f = 0, group = part.first_group;
    while (i >= count) i -= count, ++tensor;
    if (part.first_group != part.last_group) {
      group += tensor;
    } else if (!single) {
      uint32_t left = part.inputs;
      for (; tensor > 0; --tensor) left &= left - 1;
      f = __ffs(left) - 1;
    }
    const LinearInput& of = p.input[f];
    const InputRows in{p.x[f], p.x_scale[f], p.x_global[f], of.k, form_of<kinds>(of.kind)};
    uint8_t* at = inputs + of.offset + (group - part.first_group) * column_space_bytes(in.k, p.columns);
    return {in, int64_t(token + i) * of.groups + group, column_space(at, in.k, p.columns), i};
  }
};

template <uint32_t kinds, bool single, bool whole>
DSV4_D void linear(const LinearParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  float* partials = reinterpret_cast<float*>(shared + kTileWarps * kRing * kSlot);
  uint32_t* amax = reinterpret_cast<uint32_t*>(partials + kPartials / 4);
  uint8_t* inputs = reinterpret_cast<uint8_t*>(amax + kMaxRows);

  let_next_start();
  touch_params(p);
  const int token = blockIdx.x * p.columns, count = min(p.columns, p.rows - token);
  LinearWalk<kinds, single> walk(p, blockIdx.y);
  if (walk.begin == walk.end) return wait_for_previous();
  const LinearPart part(p.part[blockIdx.y]);
  const LinearRows<kinds, single> rows{p, part, inputs, token, count};
  Stage<2, LinearRows<kinds, single>> stage(rows, count * rows.tensors(), p.most_k);
  Ring<kinds, whole, LinearWalk<kinds, single>, kRing> ring(walk, shared + warp_id() * kRing * kSlot);
  ring.start(true, 1);  // more of the weights would delay the inputs
  Segment s;
  bool more = walk.next(s);
  wait_for_previous();
  if (stage.fits()) stage.load();
  ring.start(true);
  stage.write(rows.scaled(), amax);
  __syncthreads();

  Team before{0};
  int product = -1, parity = 0;
  for (; more; more = walk.next(s)) {
    const LinearProduct& of = p.product[walk.product];
    const Team team{of.split_log2};
    if (!single && walk.product != product) {  // other teams from here on: those before must have read their sums
      if (product >= 0) before.sync();  // some of its warps may do this when they have nothing more to do
      before = team, product = walk.product, parity = 0;
    }
    const LinearInput& in = p.input[of.input];
    const int resident = walk.group - part.first_group;
    const ColumnSpace space = column_space(inputs + in.offset + resident * column_space_bytes(in.k, p.columns), in.k, p.columns);
    const Columns columns = columns_of(space, in.k, count);
    const int units = units_of(s.rows);
    const float global = load_global(p.w_global[walk.product], format_of(of.kind), walk.group);
    float sum[4] = {};
    for (int unit = s.first; unit < units; unit += s.step) {
      multiply_unit<kinds>(sum, ring, of.kind, s.rows, columns, unit);
    }
    float* of_team = partials + (parity * kTileWarps + warp_id() - team.rank()) * kPartial;
    parity ^= 1;
    store_partial(of_team + team.rank() * kPartial, sum);
    team.sync();  // the next tile takes the other half; the team meets here again before the one after
    for (int i = team.rank() * 32 + lane_id(); i < kTileRows * count; i += 32 << of.split_log2) {
      const int row = i % kTileRows, column = i / kTileRows;
      if (!whole && row >= s.rows.rows) continue;
      const float out = finished(sum_partials(of_team, row, column, of.split_log2), format_of(of.kind), space.factor[column], global);
      const int64_t to = (int64_t(token + column) * of.groups + walk.group) * of.n + walk.row + row;
      if (of.out_bf16) {
        static_cast<uint16_t*>(p.out[walk.product])[to] = float_to_bf16(out);
      } else {
        static_cast<float*>(p.out[walk.product])[to] = out;
      }
    }
  }
  if (!single && product >= 0) before.sync();
}

}  // namespace dsv4

#define DSV4_LINEAR(name, kinds, single, whole)                                                                                        \
  extern "C" __global__ void __launch_bounds__(dsv4::kTileThreads, 1) linear_##name(const __grid_constant__ dsv4::LinearParams p) { \
    dsv4::linear<kinds, single, whole>(p);                                                                                             \
  }
DSV4_LINEAR(bf16, 1u << dsv4::kBf16, true, true)
DSV4_LINEAR(fp8, 1u << dsv4::kFp8, true, true)
DSV4_LINEAR(mxfp4, 1u << dsv4::kMxfp4, true, true)
DSV4_LINEAR(nvfp4, 1u << dsv4::kNvfp4, true, true)
DSV4_LINEAR(fp8_plain, 1u << dsv4::kFp8Plain, true, true)
DSV4_LINEAR(many_fp8, 1u << dsv4::kFp8, false, true)
DSV4_LINEAR(many_nvfp4, 1u << dsv4::kNvfp4, false, true)
DSV4_LINEAR(many_fp8_bf16, 1u << dsv4::kFp8 | 1u << dsv4::kBf16, false, true)
DSV4_LINEAR(many, dsv4::kAnyKind, false, true)
DSV4_LINEAR(ragged, dsv4::kAnyKind, false, false)
