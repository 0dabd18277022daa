// In which order the CTAs of experts.cu go through the rows of the matrices, and what its kernels are given.
#pragma once

#include "expert_groups.cuh"
#include "stage.cuh"

namespace dsv4 {

struct ExpertsUpParams {
  const uint16_t* x;           // bf16 [R, D]
  const int* ids;              // int32 [R, X]
  const float* weights;        // fp32 [R, X]
  const uint8_t* w[2][2];      // [kind][gate, up]: [E or 1, F, D] in its format; null without a shared expert
  const uint8_t* scale[2][2];  // or null
  const float* global[2][2];   // fp32 [E or 1], or null
  uint16_t* h[2];              // bf16 [R, X, F] and [R, F of the shared expert]
  int rows, slots, experts, hidden;  // R, X, E, D
  int columns;                 // tokens of a group, at most 8
  int kind[2], width[2];       // of the weights (Kind of tile.cuh); F
  int split_log2[2];           // of the warps of a team
  int tiles[2];                // of a matrix
  int routed_warps;            // see own_kind
  float limit;

  DSV4_D bool has_shared() const { return w[1][0] != nullptr; }
  DSV4_D int tiles_of(int of_kind) const { return tiles[of_kind]; }
  template <uint32_t kinds>
  DSV4_D WeightRows rows_of(int of_kind, int matrix, int expert, int row) const {
    return weight_rows<kinds>(format_of(kind[of_kind]), w[of_kind][matrix], scale[of_kind][matrix], expert, width[of_kind], hidden, row);
  }
};

// All warps of a CTA serve first the shared expert and then the others. Or they serve one token, `apart`: all groups have inputs of
// the same form and one column, and the first `routed_warps` serve the routed experts while the rest serves the shared one.
DSV4_D int own_kind(int routed_warps) { return int(warp_id()) >= routed_warps; }
DSV4_D Team own_team(int kind, int split_log2, int routed_warps) {
  return kind ? Team{split_log2, routed_warps, kTileWarps - routed_warps} : Team{split_log2, 0, routed_warps};
}

// Tiles of 16 rows, group after group, each of `kMatrices` matrices (gate and up, or down). A CTA has a run of those of the shared expert,
// then of the others, most CTAs of only one of the two: as many bytes as the others. Teams take turns, within a group where the inputs of
// groups differ. `Params` has tiles_of(kind) and rows_of.
template <uint32_t kinds, int kMatrices, class Params>
struct GroupWalk {
  const Params& p;
  const Groups& groups;
  int kind = 2, group = 0, last = 0;  // of the present run, 2 before the first: the kind of its groups; the present one and the last one
  int begin = 0, end = 0;             // its tiles
  int tile = 0, limit = 0, teams = 0;
  int row = 0;                        // of the present tile
  int part = kMatrices - 1;           // which of the matrices: 0 gate, 1 up

  DSV4_D GroupWalk(const Params& params, const Groups& found) : p(params), groups(found) {}

  DSV4_D uint32_t cost(int of_kind) const { return units_of(p.template rows_of<kinds>(of_kind, 0, 0, 0)); }

  DSV4_D bool next_run() {
    if (kind == 0) return false;
    --kind;
    const int first = kind ? 0 : groups.shared, tiles = p.tiles_of(kind), all = (kind ? groups.shared : groups.all - groups.shared) * tiles;
    const uint32_t of_shared = groups.shared ? groups.shared * p.tiles_of(1) * cost(1) : 0, own = cost(kind), before = kind ? 0 : of_shared;
    const uint32_t whole = of_shared + (groups.all - groups.shared) * p.tiles_of(0) * cost(0);
    // A tile belongs to the share that its first byte lies in.
    const auto at = [&](uint32_t share) { return min(all, int((max(whole * share / gridDim.x, before) - before + own - 1) / own)); };
    begin = at(blockIdx.x);
    end = at(blockIdx.x + 1);
    group = first + (begin < end ? begin / tiles : 0) - 1;
    last = begin < end ? first + (end - 1) / tiles : group;
    return true;
  }

  // The first tile of the present group, counted as those of its run are.
  DSV4_D int first_tile() const { return (kind ? group : group - groups.shared) * p.tiles_of(kind); }

  DSV4_D Team team() const { return {p.split_log2[kind]}; }

  // Whether there is another group with tiles for this CTA; its first tile comes with the next call of next_tile.
  DSV4_D bool next_group() {
    while (group >= last) {
      if (!next_run()) return false;
    }
    ++group;
    limit = min(end, first_tile() + p.tiles_of(kind));
    teams = team().count();
    tile = max(begin, first_tile()) + team().index() - teams;
    return true;
  }

  DSV4_D bool next_tile() {
    tile += teams;
    if (tile >= limit) return false;
    row = (tile - first_tile()) * kTileRows;
    return true;
  }

  DSV4_D Segment segment(int of) const {
    return {p.template rows_of<kinds>(kind, of, kind ? 0 : groups.matrix[group], row), team().rank(), 1 << p.split_log2[kind]};
  }

  DSV4_D bool next(Segment& s) {
    if (++part == kMatrices) {
      part = 0;
      while (teams == 0 || !next_tile()) {
        if (!next_group()) {
          part = kMatrices - 1, teams = 0;
          return false;
        }
      }
    }
    s = segment(part);
    return true;
  }
};

template <uint32_t kinds, bool apart>
struct UpWalk : GroupWalk<kinds, 2, ExpertsUpParams> {
  using GroupWalk<kinds, 2, ExpertsUpParams>::GroupWalk;
};

// The tiles of gate and up of one kind for one token, whatever their group.
template <uint32_t kinds>
struct UpWalk<kinds, true> {
  const ExpertsUpParams& p;
  const Groups& groups;
  const int kind, teams;
  bool picked = false;          // whether `groups` has the matrices; until then they count as the first one
  bool started = false;
  int group = 0, row = 0;       // of the present tile
  int left = 0;                 // tiles of the CTA from this one on
  int half = 1;                 // 0: gate, 1: up

  DSV4_D UpWalk(const ExpertsUpParams& params, const Groups& found)
      : p(params), groups(found), kind(own_kind(p.routed_warps)), teams(team().count()) {}

  DSV4_D Team team() const { return own_team(kind, p.split_log2[kind], p.routed_warps); }

  // Before the first tile of so many groups of the kind.
  DSV4_D void place(int count) {
    const uint32_t all = count * p.tiles[kind];
    const int tile = int(all * blockIdx.x / gridDim.x) + team().index();
    left = int(all * (blockIdx.x + 1) / gridDim.x) - tile;
    group = tile / p.tiles[kind];
    row = (tile - group * p.tiles[kind]) * kTileRows;
    group += kind ? 0 : 1;
    half = 1;
    started = false;
  }

  DSV4_D bool next_tile() {
    if (started) {
      left -= teams;
      row += teams * kTileRows;
      for (; row >= p.tiles[kind] * kTileRows; ++group) row -= p.tiles[kind] * kTileRows;
    }
    started = true;
    return left > 0;
  }

  DSV4_D Segment segment(int of_up) const {
    return {p.rows_of<kinds>(kind, of_up, kind || !picked ? 0 : groups.matrix[group], row), team().rank(), 1 << p.split_log2[kind]};
  }

  DSV4_D bool next(Segment& s) {
    half ^= 1;
    if (half == 0 && (left <= 0 || !next_tile())) {
      half = 1;
      return false;
    }
    s = segment(half);
    return true;
  }
};

struct ExpertsDownParams {
  const uint16_t* h[2];        // bf16 [R, X, F] and [R, F of the shared expert], or null
  const int* ids;              // int32 [R, X]
  const float* weights;        // fp32 [R, X]
  const uint8_t* w[2];         // [E or 1, D, F] in its format; null without a shared expert
  const uint8_t* scale[2];     // or null
  const float* global[2];      // fp32 [E or 1], or null
  void* out;                   // of one token [1, D] fp32 or bf16; of several each product by itself, fp32 [R, X + 1, D]
  int rows, slots, experts, hidden;  // R, X, E, D
  int columns;                 // tokens of a group, at most 8
  int kind[2], width[2];
  int split_log2[2];           // of the warps of a team
  // For one token:
  int routed_warps;            // see own_kind
  int tiles;                   // of 16 rows of D, of a CTA, at most
  int space;                   // bytes of one group's columns
  int out_bf16;

  DSV4_D bool has_shared() const { return w[1] != nullptr; }
  DSV4_D int tiles_of(int) const { return (hidden + kTileRows - 1) / kTileRows; }
  template <uint32_t kinds>
  DSV4_D WeightRows rows_of(int of_kind, int, int expert, int row) const {
    return weight_rows<kinds>(format_of(kind[of_kind]), w[of_kind], scale[of_kind], expert, hidden, width[of_kind], row);
  }
};

struct ExpertsSumParams {
  const float* products;  // fp32 [R, X + 1, D]: of each slot, and of the shared expert
  const float* weights;   // fp32 [R, X]
  void* out;              // [R, D] fp32 or bf16
  int slots, hidden, shared, out_bf16;
};

// The tiles of 16 rows of D that a CTA has.
DSV4_D void own_tiles(const ExpertsDownParams& p, int& begin, int& tiles) {
  const int all = (p.hidden + kTileRows - 1) / kTileRows;
  begin = int(uint32_t(all) * blockIdx.x / gridDim.x);
  tiles = int(uint32_t(all) * (blockIdx.x + 1) / gridDim.x) - begin;
}

// For one token: 16 rows of D of one matrix of a kind after the other, tile by tile. Teams take turns.
template <uint32_t kinds>
struct DownWalk {
  const ExpertsDownParams& p;
  const Groups& groups;
  const int kind, teams, count;  // groups
  int begin, tiles;              // tiles of this CTA
  int group, tile, left;         // of the present job; jobs from this one on
  bool started = false;

  DSV4_D DownWalk(const ExpertsDownParams& params, const Groups& found)
      : p(params), groups(found), kind(own_kind(p.routed_warps)), teams(team().count()), count(kind ? 1 : groups.all - 1) {
    own_tiles(p, begin, tiles);
    const int job = team().index();
    left = tiles * count - job;
    tile = left > 0 ? job / count : 0;
    group = !kind + job - tile * count;
  }

  DSV4_D Team team() const { return own_team(kind, p.split_log2[kind], p.routed_warps); }

  DSV4_D bool next_job() {
    if (started) {
      left -= teams;
      for (group += teams; group >= !kind + count; ++tile) group -= count;
    }
    started = true;
    return left > 0;
  }

  DSV4_D Segment segment() const {
    return {p.rows_of<kinds>(kind, 0, kind ? 0 : groups.matrix[group], (begin + tile) * kTileRows), team().rank(), 1 << p.split_log2[kind]};
  }

  DSV4_D bool next(Segment& s) {
    if (left <= 0 || !next_job()) return false;
    s = segment();
    return true;
  }
};

}  // namespace dsv4
