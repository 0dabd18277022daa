// Products of weight rows with a few tokens: what one warp does, from global memory to fp32 sums. Used by linear.cu and
// experts.cu. Not here: how rows reach shared memory and sums are added over warps (ring.cuh), inputs (stage.cuh), what the
// rows and tokens are (the .cu files).
//
// A warp multiplies 16 rows of a weight by 8 columns (tokens) with mma.sync m16n8k16: the weight is A, so that any number
// of tokens up to 8 takes the same instructions, and a token's bits depend on its own column only. Rows arrive in units
// of 256 bytes through a ring of cp.async slots that belongs to the warp, so only the sum over the warps that share rows
// needs a barrier. K is permuted inside a unit such that each lane owns whole 16-byte chunks of its two rows; inputs in
// shared memory lie in the order that this gives (stage.cuh).
//
// Elements become fp16 (exactly: e4m3, e2m1 * 2**-6, e2m1 * e4m3 * 2**-6), or bf16 where the input is plain, products
// are exact, and sums are fp32. Scales of powers of two are applied to the fp32 sum of their block.
#pragma once

#include "mma.cuh"
#include "numerics.h"

namespace dsv4 {

constexpr int kTileWarps = 16;
constexpr int kTileThreads = 32 * kTileWarps;
constexpr int kTileRows = 16;                                // rows of a weight that a warp multiplies at once
constexpr int kColumns = 8;                                  // tokens of one product
constexpr int kUnit = 256;                                   // bytes of each row in a ring slot
constexpr int kRing = 2;                                     // slots of a warp: one is multiplied while the other arrives
constexpr int kSlotScales = kTileRows * kUnit;               // offset of the scales in a slot
constexpr int kScaleRow = 32;                                // bytes of the scales of a row in a slot, NVFP4
constexpr int kSlot = kSlotScales + kTileRows * kScaleRow;   // bytes of a slot
constexpr int kPartial = kTileRows * kColumns;               // floats of one warp's sums
constexpr int kPartials = 2 * kTileWarps * kPartial * 4;     // bytes of all warps' sums, twice

enum WeightFormat : int { kBf16 = 0, kFp8 = 1, kMxfp4 = 2, kNvfp4 = 3 };
// A weight's format with the form of its input: a WeightFormat with the input that it takes, or one with plain input.
enum Kind : int { kFp8Plain = 4, kMxfp4Plain = 5 };
constexpr uint32_t kAnyKind = 63;  // a set of kinds, bit by bit: a kernel for few of them is shorter and faster
DSV4_HD int format_of(int kind) { return kind < kFp8Plain ? kind : kind - 3; }

// Whether a kind out of the set `kinds` is this one: known to the compiler where it is the only one, or not in the set.
template <uint32_t kinds, int one>
DSV4_D bool is(int kind) {
  return (kinds >> one & 1) && (kinds == 1u << one || kind == one);
}

template <uint32_t kinds, int format>
DSV4_D bool has_format(int format_of_kind) {
  constexpr uint32_t plain = format == kFp8 ? 1u << kFp8Plain : format == kMxfp4 ? 1u << kMxfp4Plain : 0, both = 1u << format | plain;
  return (kinds & both) && ((kinds & ~both) == 0 || format_of_kind == format);
}
// How columns lie in shared memory: bf16 in K order; bf16, e4m3 or e2m1 * e4m3 in the order of decode_e2m1.
enum InputForm : int { kPlain = 0, kPlainMixed = 1, kFp8Input = 2, kNvfp4Input = 3 };

// Up to 16 rows of one matrix, as a warp reads them.
struct WeightRows {
  const uint8_t* data;   // the first row
  const uint8_t* scale;  // its scales; for FP8 the row of scales that all 16 rows share
  int row_bytes;         // a multiple of 16
  int scale_bytes;       // of one row of scales; a multiple of 4 for FP4 formats
  int rows;              // how many exist, at most 16; the others read as zero
  int format;
};

// Rows from `row` on of matrix `matrix` of [matrices, n, k], of one of the formats of `kinds`.
template <uint32_t kinds>
DSV4_D WeightRows weight_rows(int format, const uint8_t* data, const uint8_t* scale, int matrix, int n, int k, int row) {
  const bool bf16 = has_format<kinds, kBf16>(format), fp8 = has_format<kinds, kFp8>(format), nvfp4 = has_format<kinds, kNvfp4>(format);
  WeightRows w;
  w.format = format;
  w.rows = min(kTileRows, n - row);
  w.row_bytes = bf16 ? 2 * k : fp8 ? k : k / 2;
  w.data = data + (int64_t(matrix) * n + row) * w.row_bytes;
  w.scale_bytes = fp8 ? (k + 127) / 128 : nvfp4 ? k / 16 : k / 32;
  w.scale = scale + (fp8 ? int64_t(matrix) * ((n + 127) / 128) + row / 128 : int64_t(matrix) * n + row) * w.scale_bytes;
  return w;
}

// From the rows of one matrix to the same rows of the next one, of data and of scales, in bytes.
struct MatrixBytes {
  int64_t data, scale;
};

template <uint32_t kinds>
DSV4_D MatrixBytes matrix_bytes(int format, int n, int k) {
  const WeightRows w = weight_rows<kinds>(format, nullptr, nullptr, 0, n, k, 0);
  return {int64_t(n) * w.row_bytes, int64_t(has_format<kinds, kFp8>(format) ? (n + 127) / 128 : n) * w.scale_bytes};
}

DSV4_D int units_of(const WeightRows& w) { return (w.row_bytes + kUnit - 1) / kUnit; }

// Where 16-byte chunk c of a row lies in its slot: lanes that read chunks 4s + c of rows g and g + 1, or word c of chunk s of
// all 8 rows, meet no bank twice.
DSV4_D int swizzled(int row, int chunk) { return chunk ^ (((row & 1) << 2) | ((row >> 1) & 3)); }

DSV4_D void copy_async_4(uint32_t shared_address, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address), "l"(from), "r"(bytes) : "memory");
}

// --- elements ------------------------------------------------------------------------------------------------------

DSV4_D void mma_f16(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DSV4_D uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

DSV4_D uint32_t e4m3x2_to_f16x2(uint16_t pair) {
  uint32_t out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(out) : "h"(pair));
  return out;
}

DSV4_D uint32_t f16x2_to_bf16x2(uint32_t pair) {
  float low, high;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(low), "=f"(high) : "r"(pair));
  return pack_bf16(low, high);
}

// Two words of four e4m3 bytes -> f16 pairs: bytes (0, 1) and (2, 3) of each.
DSV4_D void decode_e4m3(uint32_t (&out)[4], uint32_t even, uint32_t odd) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(out[0]), "=r"(out[1]) : "r"(even));
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }" : "=r"(out[2]), "=r"(out[3]) : "r"(odd));
}

// Eight e4m3 elements in K order -> f16 pairs (0, 2), (4, 6), (1, 3), (5, 7).
DSV4_D void decode_fp8(uint32_t (&out)[4], uint32_t low, uint32_t high) {
  decode_e4m3(out, __byte_perm(low, high, 0x6420), __byte_perm(low, high, 0x7531));
}

// Eight e2m1 elements -> f16 pairs (0, 2), (4, 6), (1, 3), (5, 7), times 2**-6: as e4m3 bytes whose lowest exponent bits
// are those of e2m1.
DSV4_D void decode_e2m1(uint32_t (&out)[4], uint32_t codes) {
  const uint32_t even = ((codes << 4) & 0x80808080u) | ((codes << 2) & 0x1C1C1C1Cu);
  const uint32_t odd = (codes & 0x80808080u) | ((codes >> 2) & 0x1C1C1C1Cu);
  decode_e4m3(out, even, odd);
}
constexpr float kE2m1Factor = 64.0f;  // what decode_e2m1 leaves out

DSV4_D void to_bf16(uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = f16x2_to_bf16x2(pairs[i]);
}

template <bool plain>
DSV4_D void multiply(float (&sum)[4], uint32_t (&low)[4], uint32_t (&high)[4], const uint4& b) {
  if (plain) {
    to_bf16(low);
    to_bf16(high);
    mma_bf16(sum, low[0], high[0], low[1], high[1], b.x, b.y);
    mma_bf16(sum, low[2], high[2], low[3], high[3], b.z, b.w);
  } else {
    mma_f16(sum, low[0], high[0], low[1], high[1], b.x, b.y);
    mma_f16(sum, low[2], high[2], low[3], high[3], b.z, b.w);
  }
}

// --- one unit ------------------------------------------------------------------------------------------------------

// What of a slot a lane touches, as byte offsets, computed once: the compiler would compute it again for every unit.
struct Lane {
  uint32_t chunk;  // chunk lane % 4 of row lane / 4; ^ 64 * s is chunk 4 * s + lane % 4
  uint32_t word;   // word lane % 4 of chunk 0 of row lane / 4; ^ 16 * c is that of chunk c
  uint32_t copy;   // chunk lane % 8 of row lane / 8, as copied; ^ 32 in row lane / 8 + 4; + 128 is chunk lane % 8 + 8
};

DSV4_D Lane lane_offsets() {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, row = lane >> 3;
  Lane l{uint32_t(g * kUnit + swizzled(g, t) * 16), uint32_t(g * kUnit + swizzled(g, 0) * 16 + t * 4), uint32_t(row * kUnit + swizzled(row, lane & 7) * 16)};
  asm volatile("" : "+r"(l.chunk), "+r"(l.word), "+r"(l.copy));
  return l;
}

// Columns lie in chunks of 16 bytes; chunk q stands where chunk column_chunk(q) would, so that lanes that read 64 bytes
// apart meet no bank twice.
DSV4_HD int column_chunk(int q) { return q ^ (q >> 3 & 1); }

// The columns as a lane reads them, in shared memory.
struct Columns {
  uint32_t data;   // of column lane / 4, or of the last one where there are fewer
  uint32_t scale;  // FP8: [ceil(K / 128), 8] fp32, at column 2 * (lane % 4); other forms have none
};

DSV4_D void store16(uint32_t shared, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

DSV4_D void store4(uint32_t shared, uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(x) : "memory"); }

DSV4_D float2 load_floats(uint32_t shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared) : "memory");
  return x;
}

DSV4_D uint32_t load4(uint32_t shared) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

DSV4_D uint16_t load2(uint32_t shared) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(shared) : "memory");
  return x;
}

// Their loops stay loops: every kernel of a step finds its code outside the instruction caches, and waits for it.

DSV4_D void unit_bf16(float (&sum)[4], uint32_t slot, const Lane& lane, const Columns& in, int unit) {
  const uint32_t t = lane_id() & 3, column = in.data + unit * kUnit;
  uint4 low[4], high[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    low[s] = load16(slot + (lane.chunk ^ (s * 64)));
    high[s] = load16(slot + (lane.chunk ^ (s * 64)) + 8 * kUnit);
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint4 b = load16(column + s * 64 + (t ^ (s >> 1)) * 16);
    mma_bf16(sum, low[s].x, high[s].x, low[s].y, high[s].y, b.x, b.y);
    mma_bf16(sum, low[s].z, high[s].z, low[s].w, high[s].w, b.z, b.w);
  }
}

// The e8m0 scale of 128 elements of K, as the producer left it: the word that holds byte `address` of global memory.
DSV4_D float fp8_scale(uint32_t slot, int block, uint32_t address) {
  return e8m0_to_float(uint8_t(load4(slot + kSlotScales + block * 4) >> (8 * (address & 3))));
}

template <bool plain>
DSV4_D void unit_fp8(float (&sum)[4], uint32_t slot, const Lane& lane, const WeightRows& w, const Columns& in, int unit) {
  const uint32_t column = in.data + unit * (2 * kUnit) + (lane_id() & 3) * 32;
#pragma unroll 1
  for (int block = 0; block < 2; ++block) {
    uint4 low[2], high[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      low[s] = load16(slot + (lane.chunk ^ (block * 128 + s * 64)));
      high[s] = load16(slot + (lane.chunk ^ (block * 128 + s * 64)) + 8 * kUnit);
    }
    const float scale = fp8_scale(slot, block, uint32_t(reinterpret_cast<uint64_t>(w.scale)) + 2 * unit + block);
    float first[4] = {}, second[4] = {};  // two chains of products instead of one
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t at = column + block * 256 + s * 128;
      uint32_t a[4], b[4];
      decode_fp8(a, low[s].x, low[s].y);
      decode_fp8(b, high[s].x, high[s].y);
      multiply<plain>(first, a, b, load16(at + s * 16));
      decode_fp8(a, low[s].z, low[s].w);
      decode_fp8(b, high[s].z, high[s].w);
      multiply<plain>(second, a, b, load16(at + (1 - s) * 16));
    }
    float2 of_column = make_float2(1.0f, 1.0f);
    if (!plain) of_column = load_floats(in.scale + (2 * unit + block) * kColumns * 4);
    const float x = scale * of_column.x, y = scale * of_column.y;
    sum[0] += (first[0] + second[0]) * x;
    sum[1] += (first[1] + second[1]) * y;
    sum[2] += (first[2] + second[2]) * x;
    sum[3] += (first[3] + second[3]) * y;
  }
}

template <bool plain>
DSV4_D void unit_mxfp4(float (&sum)[4], uint32_t slot, const Lane& lane, const Columns& in, int unit) {
  const uint32_t t = lane_id() & 3, column = in.data + unit * (4 * kUnit), scales = slot + kSlotScales + (lane_id() >> 2) * 16;
  uint32_t low_codes[4], high_codes[4], low_scales, high_scales;
  const auto load = [&](int s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = slot + (lane.word ^ ((4 * s + i) * 16));
      low_codes[i] = load4(at);
      high_codes[i] = load4(at + 8 * kUnit);
    }
    low_scales = load4(scales + s * 4), high_scales = load4(scales + 8 * 16 + s * 4);
  };
#pragma unroll 1
  for (int s = 0; s < 4; ++s) {  // 128 elements
    load(s);
    float part[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = 4 * s + i;
      uint32_t a[4], b[4];
      decode_e2m1(a, low_codes[i]);
      decode_e2m1(b, high_codes[i]);
      float block[4] = {};
      multiply<plain>(block, a, b, load16(column + chunk * 64 + (t ^ (chunk >> 1 & 1)) * 16));
      const float low = bits_float((i < 3 ? low_scales << (23 - 8 * i) : low_scales >> 1) & 0x7F800000u);
      const float high = bits_float((i < 3 ? high_scales << (23 - 8 * i) : high_scales >> 1) & 0x7F800000u);
      part[0] += low * block[0];
      part[1] += low * block[1];
      part[2] += high * block[2];
      part[3] += high * block[3];
    }
    float2 of_column = make_float2(1.0f, 1.0f);
    if (!plain) of_column = load_floats(in.scale + (4 * unit + s) * kColumns * 4);
    sum[0] += part[0] * of_column.x;
    sum[1] += part[1] * of_column.y;
    sum[2] += part[2] * of_column.x;
    sum[3] += part[3] * of_column.y;
  }
}

DSV4_D void unit_nvfp4(float (&sum)[4], uint32_t slot, const Lane& lane, const Columns& in, int unit) {
  const uint32_t t = lane_id() & 3, scales = slot + kSlotScales + (lane_id() >> 2) * kScaleRow + t * 2;
  const uint32_t column = in.data + unit * (4 * kUnit) + t * 64 + (t >> 1) * 16, other_column = column + 16 - (t >> 1) * 32;
  float other[4] = {};  // two chains of products instead of one
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint32_t low[2][4], high[2][4], low_scales[2], high_scales[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int s = 2 * half + j;
      const uint4 x = load16(slot + (lane.chunk ^ (s * 64))), y = load16(slot + (lane.chunk ^ (s * 64)) + 8 * kUnit);
      low[j][0] = x.x, low[j][1] = x.y, low[j][2] = x.z, low[j][3] = x.w;
      high[j][0] = y.x, high[j][1] = y.y, high[j][2] = y.z, high[j][3] = y.w;
      low_scales[j] = e4m3x2_to_f16x2(load2(scales + s * 8));
      high_scales[j] = e4m3x2_to_f16x2(load2(scales + 8 * kScaleRow + s * 8));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t both = i < 2 ? 0x1010 : 0x3232;  // this word's block, in both halves
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t low_scale = __byte_perm(low_scales[j], 0, both), high_scale = __byte_perm(high_scales[j], 0, both);
        const uint4 columns = load16((i & 1 ? other_column : column) + (2 * half + j) * 256 + (i >> 1) * 32);
        uint32_t a[4], b[4];
        decode_e2m1(a, low[j][i]);
        decode_e2m1(b, high[j][i]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          a[e] = multiply_f16x2(a[e], low_scale);
          b[e] = multiply_f16x2(b[e], high_scale);
        }
        multiply<false>(j ? other : sum, a, b, columns);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += other[i];
}

// sum += rows of the ring's oldest slot, which is released, times the columns, over the K of one unit. FP4 sums lack kE2m1Factor,
// NVFP4 ones also the global scales.
template <uint32_t kinds, class Ring>
DSV4_D void multiply_unit(float (&sum)[4], Ring& ring, int kind, const WeightRows& w, const Columns& in, int unit) {
  const uint32_t slot = ring.wait();
  const Lane& lane = ring.lane;
  if (is<kinds, kNvfp4>(kind)) {
    unit_nvfp4(sum, slot, lane, in, unit);
  } else if (is<kinds, kFp8>(kind)) {
    unit_fp8<false>(sum, slot, lane, w, in, unit);
  } else if (is<kinds, kMxfp4>(kind)) {
    unit_mxfp4<false>(sum, slot, lane, in, unit);
  } else if (is<kinds, kBf16>(kind)) {
    unit_bf16(sum, slot, lane, in, unit);
  } else if (is<kinds, kFp8Plain>(kind)) {
    unit_fp8<true>(sum, slot, lane, w, in, unit);
  } else if (is<kinds, kMxfp4Plain>(kind)) {
    unit_mxfp4<true>(sum, slot, lane, in, unit);
  }
  ring.release();
}

}  // namespace dsv4
