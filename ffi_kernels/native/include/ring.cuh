// Rows of weights on their way to a warp, and its sums on their way to the others that share the rows (see tile.cuh).
#pragma once

#include "tile.cuh"

namespace dsv4 {

// --- the ring ------------------------------------------------------------------------------------------------------

// Weights are read once a step: in L2 they make room for other things, such as the code of the next kernels, before those do.
DSV4_D uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// copy_async_16 with such a policy.
DSV4_D void copy_weights_16(uint32_t shared_address, const void* from, bool present, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address), "l"(from), "r"(present ? 16 : 0), "l"(policy) : "memory");
}

// What a warp multiplies next: units first, first + step, ... of these rows.
struct Segment {
  WeightRows rows;
  int first, step;
};

// A warp's ring of slots, filled ahead of what is multiplied. `Walk::next(Segment&)` gives one segment after the other, and then
// false as often as it is asked; the warp that consumes goes through the same segments with a walk of its own. `whole`: all
// segments have 16 rows and whole units, and their scales lie on 16 bytes (those of FP8 in whole words). `ahead`: slots that are on their way
// while one is consumed: kRing - 1, and that one is filled again before it is consumed, or kRing, and it is filled after that.
template <uint32_t kinds, bool whole, class Walk, int ahead>
struct Ring {
  Walk walk;
  Lane lane;
  uint32_t slots, slot;        // of this warp; the next to be consumed, and then refilled
  int unit = 0, units = 0, step = 0, row_stride = 0, rows = 0, bytes = 0, scale_bytes = 0, format = 0;
  const uint8_t* data;         // what this lane copies next of its first row
  const uint8_t* scale;
  const uint64_t policy = read_once();
  int filled = 0;              // slots, before anything is consumed

  DSV4_D Ring(const Walk& at_start, uint8_t* warp_slots)
      : walk(at_start), lane(lane_offsets()), slots(shared_address(warp_slots)), slot(slots), data(nullptr), scale(nullptr) {}

  // Goes to where the next copies come from.
  DSV4_D void place() {
    if (unit >= units) advance();
  }

  // From a matrix to one that lies behind it, before anything is copied.
  DSV4_D void move(const MatrixBytes& by, int matrices) {
    data += by.data * matrices;
    scale += by.scale * matrices;
  }

  // Fills slots until `most` are on their way or the walk has no more segments now; with `all` it has all of them, and what
  // they do not fill counts as full.
  DSV4_D void start(bool all, int most = ahead) {
#pragma unroll 1
    while (true) {
      place();
      if (filled >= most || (unit >= units && !all)) return;
      fill(slots + filled++ * kSlot);
    }
  }

  // Lane addresses of the next segment that has units.
  DSV4_D void advance() {
    const int id = lane_id();
    Segment s;
    while (unit >= units && walk.next(s)) {
      const WeightRows& w = s.rows;
      unit = s.first, step = s.step, units = units_of(w), format = w.format;
      rows = w.rows;
      bytes = w.row_bytes - (id & 7) * 16;
      row_stride = 4 * w.row_bytes;
      data = w.data + int64_t(id >> 3) * w.row_bytes + unit * kUnit + (id & 7) * 16;
      scale_bytes = w.scale_bytes;
      if (has_format<kinds, kNvfp4>(format)) {
        scale = w.scale + int64_t(id >> 1) * w.scale_bytes + unit * 32 + (id & 1) * 16;
      } else if (has_format<kinds, kMxfp4>(format)) {
        scale = w.scale + int64_t(id & 15) * w.scale_bytes + unit * 16;
      } else {
        scale = w.scale + unit * 2 + (id & 1);
      }
    }
  }

  DSV4_D void fill(uint32_t to) {
    if (unit < units) {
      const int id = lane_id();
      const bool first = whole || unit * kUnit < bytes, second = whole || unit * kUnit + 128 < bytes;
      const uint8_t* from = data;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t at = to + (lane.copy ^ (i & 1 ? 32 : 0)) + 4 * i * kUnit;
        const bool row = whole || (id >> 3) + 4 * i < rows;
        copy_weights_16(at, from, first && row, policy);
        copy_weights_16(at + 128, from + 128, second && row, policy);
        from += row_stride;
      }
      const uint32_t scales = to + kSlotScales;
      if (has_format<kinds, kNvfp4>(format)) {
        if (whole || scale_bytes % 16 == 0) {
          copy_async_16(scales + id * 16, scale, whole || ((id >> 1) < rows && unit * 32 + (id & 1) * 16 < scale_bytes));
        } else {  // 4 bytes at a time
#pragma unroll 1
          for (int i = 0; i < 4; ++i) {
            copy_async_4(scales + id * 16 + i * 4, scale + i * 4, (id >> 1) < rows && unit * 32 + (id & 1) * 16 + i * 4 < scale_bytes ? 4 : 0);
          }
        }
        scale += step * 32;
      } else if (has_format<kinds, kMxfp4>(format)) {
        if (whole || scale_bytes % 16 == 0) {
          if (id < kTileRows) copy_async_16(scales + id * 16, scale, whole || id < rows);
        } else if (id < kTileRows) {
#pragma unroll 1
          for (int i = 0; i < 4; ++i) copy_async_4(scales + id * 16 + i * 4, scale + i * 4, id < rows && unit * 16 + i * 4 < scale_bytes ? 4 : 0);
        }
        scale += step * 16;
      } else if (has_format<kinds, kFp8>(format)) {
        if (id < 2) {  // a byte for each 128 of K, at its place in an aligned word
          const uint64_t byte = reinterpret_cast<uint64_t>(scale);
          if (whole) {
            copy_async_4(scales + id * 4, reinterpret_cast<const void*>(byte & ~uint64_t(3)), 4);
          } else {  // the word may reach behind the end of the array
            store4(scales + id * 4, unit * 2 + id < scale_bytes ? uint32_t(*scale) << (8 * (byte & 3)) : 0);
          }
        }
        scale += step * 2;
      }
      data += step * kUnit;
      unit += step;
    }
    copy_async_commit();  // also when empty, so that the number of groups behind a slot is always the same
  }

  // The oldest slot, complete for all lanes.
  DSV4_D uint32_t wait() {
    copy_async_wait<ahead - 1>();
    __syncwarp();
    const uint32_t full = slot;
    slot = slot == slots + (kRing - 1) * kSlot ? slots : slot + kSlot;
    if (ahead < kRing) refill(slot);
    return full;
  }

  // Of what wait() has given.
  DSV4_D void release() {
    __syncwarp();
    if (ahead == kRing) refill(slot == slots ? slots + (kRing - 1) * kSlot : slot - kSlot);
  }

  DSV4_D void refill(uint32_t to) {
    place();
    fill(to);
  }
};

// --- sums over the warps of a team -----------------------------------------------------------------------------------

// 2**split_log2 consecutive warps that share rows, of `warps` warps from `first` on, both multiples of it. Teams of every size have
// barriers of their own, so that teams of two sizes may be at work at once.
struct Team {
  int split_log2, first = 0, warps = kTileWarps;
  DSV4_D int index() const { return (int(warp_id()) - first) >> split_log2; }
  DSV4_D int count() const { return warps >> split_log2; }
  DSV4_D int rank() const { return warp_id() & ((1 << split_log2) - 1); }
  DSV4_D void sync() const {
    if (split_log2 == 0) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"((kTileWarps + int(warp_id())) >> split_log2), "r"(32 << split_log2) : "memory");
    }
  }
};

// One warp's sums to shared memory: [16 rows, 8 columns] fp32.
DSV4_D void store_partial(float* partial, const float (&sum)[4]) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  *reinterpret_cast<float2*>(partial + g * kColumns + 2 * t) = make_float2(sum[0], sum[1]);
  *reinterpret_cast<float2*>(partial + (g + 8) * kColumns + 2 * t) = make_float2(sum[2], sum[3]);
}

// The sum of one row and column over the warps of a team, in their order; `of_team`: the partials of its first warp.
DSV4_D float sum_partials(const float* of_team, int row, int column, int split_log2, int stride = kPartial) {
  const float* at = of_team + row * kColumns + column;
  float sum = at[0];
  for (int s = 1; s < 1 << split_log2; ++s) sum += at[s * stride];
  return sum;
}

// What such a sum still lacks. `global`: the global scale of the matrix, from load_global.
DSV4_D float finished(float sum, int format, float of_input, float global) {
  if (format >= kMxfp4) sum *= kE2m1Factor;
  return format == kNvfp4 ? sum * of_input * global : sum;
}

// Loaded where it stands, early: behind the weights in the queue of the memory it would take long.
DSV4_D float load_global(const float* global, int format, int matrix) {
  float x = 1.0f;
  if (format == kNvfp4) asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(global + matrix));
  return x;
}

}  // namespace dsv4
