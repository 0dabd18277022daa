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
  int routed_warps;            // see Shares
  float limit;
};

// The warps of a CTA that serve a kind: all of them, first the shared expert and then the others; or with one token, for which all
// groups have the same inputs, the first `routed_warps` of them the routed experts and the rest the shared one, at the same time.
struct Shares {
  int routed_warps;  // or zero
  DSV4_D bool apart() const { return routed_warps != 0; }
  DSV4_D int own_kind() const { return int(warp_id()) >= routed_warps; }
  // After this kind, or after 2; negative if there is none.
  DSV4_D int next_kind(int kind) const { return !apart() ? kind - 1 : kind == 2 ? own_kind() : -1; }
  DSV4_D Team team(int kind, int split_log2) const {
    if (!apart()) return {split_log2};
    return kind ? Team{split_log2, routed_warps, kTileWarps - routed_warps} : Team{split_log2, 0, routed_warps};
  }
};

// Tiles of 16 rows of gate and of up, group after group: a CTA has a run of those of the shared expert, which it may copy before the
// groups are known, and a run of the others. Teams take turns, within a group where the inputs of groups differ.
template <uint32_t kinds>
struct UpWalk {
  const ExpertsUpParams& p;
  const Groups& groups;
  const Shares shares;
  const int shared;                   // groups of the shared expert
  bool known = false;                 // the other groups
  int kind = 2, group = 0, last = 0;  // of the present run, 2 before the first: the kind of its groups; the present one and the last one
  int begin = 0, end = 0;             // its tiles
  int tile = 0, limit = 0, teams = 0;
  int row = 0;                        // of the present tile
  int half = 1;                       // 0: gate, 1: up

  DSV4_D UpWalk(const ExpertsUpParams& params, const Groups& found)
      : p(params), groups(found), shares{p.routed_warps}, shared(shared_groups(p.w[1][0] != nullptr, p.rows, p.columns)) {}

  DSV4_D bool next_run() {
    const int next = shares.next_kind(kind);
    if (next < 0 || (next == 0 && !known)) return false;
    kind = next;
    const int first = kind ? 0 : shared;
    const uint32_t all = (kind ? shared : groups.all - shared) * p.tiles[kind];
    begin = int(all * blockIdx.x / gridDim.x);
    end = int(all * (blockIdx.x + 1) / gridDim.x);
    group = first + (begin < end ? begin / p.tiles[kind] : 0) - 1;
    last = begin < end ? first + (end - 1) / p.tiles[kind] : group;
    return true;
  }

  // The first tile of the present group, counted as those of its run are.
  DSV4_D int first_tile() const { return (kind ? group : group - shared) * p.tiles[kind]; }

  DSV4_D Team team() const { return shares.team(kind, p.split_log2[kind]); }

  // Whether there is another group with tiles for this CTA, or if kinds are served apart another run; its first tile comes with the
  // next call of next_of_group.
  DSV4_D bool next_group() {
    while (group >= last) {
      if (!next_run()) return false;
    }
    ++group;
    limit = shares.apart() ? end : min(end, first_tile() + p.tiles[kind]);
    teams = team().count();
    tile = max(begin, first_tile()) + team().index() - teams;
    if (shares.apart()) last = group;
    return true;
  }

  DSV4_D bool next_of_group() {
    tile += teams;
    if (tile >= limit) return false;
    if (shares.apart()) group = last = (kind ? 0 : shared) + tile / p.tiles[kind];
    row = (tile - first_tile()) * kTileRows;
    return true;
  }

  DSV4_D Segment segment(int of_up) const {
    return {weight_rows<kinds>(format_of(p.kind[kind]), p.w[kind][of_up], p.scale[kind][of_up], kind ? 0 : groups.matrix[group], p.width[kind], p.hidden, row), team().rank(), 1 << p.split_log2[kind]};
  }

  DSV4_D bool next(Segment& s) {
    half ^= 1;
    if (half == 0) {
      while (teams == 0 || !next_of_group()) {
        if (!next_group()) {
          half = 1, teams = 0;
          return false;
        }
      }
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
  void* out;                   // [R, D] fp32 or bf16
  int rows, slots, experts, hidden;  // R, X, E, D
  int columns;                 // tokens of a group, at most 8
  int kind[2], width[2];
  int split_log2[2];           // of the warps of a team
  int routed_warps;            // see Shares
  int batch;                   // groups whose inputs are in shared memory at once
  int tiles;                   // of 16 rows of D, of a CTA, at most
  int space;                   // bytes of one group's columns
  int out_bf16;
};

// 16 rows of D of one group's matrix after the other: batch of groups by batch, in a batch first the groups of the shared expert, which
// may be copied before the others are known, then those; in each part tile by tile. Teams take turns.
template <uint32_t kinds>
struct DownWalk {
  const ExpertsDownParams& p;
  const Groups& groups;
  const Shares shares;
  const int shared;             // groups of the shared expert
  bool known = false;           // the other groups
  int begin, tiles;             // tiles of this CTA
  int batch = 0, kind = 2;      // of the present part, two of a batch: the kind of its groups
  int first = 0, count = 0, job = 0, jobs = 0, teams = 0;
  int group = 0, tile = 0;      // of the present job

  DSV4_D DownWalk(const ExpertsDownParams& params, const Groups& found)
      : p(params), groups(found), shares{p.routed_warps}, shared(shared_groups(p.w[1] != nullptr, p.rows, p.columns)) {
    const int all = (p.hidden + kTileRows - 1) / kTileRows;
    begin = int(uint32_t(all) * blockIdx.x / gridDim.x);
    tiles = int(uint32_t(all) * (blockIdx.x + 1) / gridDim.x) - begin;
  }

  DSV4_D Team team() const { return shares.team(kind, p.split_log2[kind]); }
  DSV4_D int groups_of_batch() const { return min(p.batch, groups.all - batch * p.batch); }

  DSV4_D bool next_part() {
    const int next = shares.next_kind(kind);
    if (next < 0 || (next == 0 && !known)) return false;
    kind = next;
    const int low = batch * p.batch, high = low + p.batch;
    first = kind ? low : max(low, shared);
    count = max(min(high, kind ? shared : groups.all) - first, 0);
    teams = team().count();
    jobs = tiles * count;
    job = team().index() - teams;
    return true;
  }

  DSV4_D bool next_batch() {
    ++batch;
    kind = 2;
    return batch * p.batch < groups.all;
  }

  DSV4_D bool next_of_part() {
    job += teams;
    if (job >= jobs) return false;
    tile = job / count;
    group = first + job - tile * count;
    return true;
  }

  DSV4_D Segment segment() const {
    return {weight_rows<kinds>(format_of(p.kind[kind]), p.w[kind], p.scale[kind], kind ? 0 : groups.matrix[group], p.hidden, p.width[kind], (begin + tile) * kTileRows), team().rank(), 1 << p.split_log2[kind]};
  }

  DSV4_D bool next(Segment& s) {
    while (kind == 2 || !next_of_part()) {
      if (next_part()) continue;
      if (!known || !next_batch()) return false;
    }
    s = segment();
    return true;
  }
};

}  // namespace dsv4
