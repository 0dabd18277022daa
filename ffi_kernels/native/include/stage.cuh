// The inputs of few-token products, brought to shared memory in the form that tile.cuh multiplies: given in a quantized
// format, plain, or plain and quantized here (bit for bit as the quantize ops do).
//
// A column (token) is K elements of 16 bits, padded with zeros to a multiple of 512 and then by 16 bytes, so that lanes
// that read the same place of different columns meet no bank twice; its 16-byte chunks are permuted by column_chunk. Quantized forms hold their elements in groups of eight
// in the order 0, 2, 4, 6, 1, 3, 5, 7, as decode_fp8 and decode_e2m1 produce those of the weights.
#pragma once

#include "ring.cuh"

namespace dsv4 {

// One activation tensor: rows of k elements. Row strides follow from the format.
struct InputRows {
  const void* data;           // bf16 [rows, k] | e4m3 [rows, k] | packed e2m1 [rows, k / 2]
  const uint8_t* scale;       // e8m0 [rows, ceil(k / 128)] | e4m3 [rows, k / 16]; null if data is bf16
  const float* global_scale;  // NVFP4: fp32 [rows]; null if data is bf16
  int k;                      // a multiple of 8
  int form;                   // InputForm: what the columns hold; with data in bf16, they are quantized here
};

// The form of the input of a kind. Known to the compiler where all of `kinds` have the same one.
template <uint32_t kinds>
DSV4_D int form_of(int kind) {
  constexpr uint32_t fp8 = 1u << kFp8 | 1u << kMxfp4, plain = 1u << kFp8Plain | 1u << kMxfp4Plain;
  if ((kinds & ~fp8) == 0) return kFp8Input;
  if ((kinds & ~plain) == 0) return kPlainMixed;
  return is<kinds, kNvfp4>(kind) ? kNvfp4Input : is<kinds, kBf16>(kind) ? kPlain : kind >= kFp8Plain ? kPlainMixed : kFp8Input;
}

// Where columns lie in shared memory.
struct ColumnSpace {
  uint8_t* data;    // [columns, column_bytes(k)]
  float* scale;     // kFp8Input: [ceil(padded k / 128), 8]
  float* factor;    // [8]: kNvfp4Input: global scales; otherwise 1
};

DSV4_HD int padded_k(int k) { return (k + 511) / 512 * 512; }
DSV4_HD int column_bytes(int k) { return 2 * padded_k(k) + 16; }
DSV4_HD int column_scale_bytes(int k) { return padded_k(k) / 128 * kColumns * 4; }
// Bytes of one ColumnSpace: columns, scales, factors.
DSV4_HD int column_space_bytes(int k, int columns) { return columns * column_bytes(k) + column_scale_bytes(k) + kColumns * 4; }

DSV4_D ColumnSpace column_space(uint8_t* at, int k, int columns) {
  uint8_t* scale = at + columns * column_bytes(k);
  return {at, reinterpret_cast<float*>(scale), reinterpret_cast<float*>(scale + column_scale_bytes(k))};
}

DSV4_D Columns columns_of(const ColumnSpace& space, int k, int columns) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  return {shared_address(space.data + (g < columns ? g : columns - 1) * column_bytes(k)), shared_address(space.scale + 2 * t)};
}

DSV4_D void unpack_bf16(float (&x)[8], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = bf16_low(words[i]);
    x[2 * i + 1] = bf16_high(words[i]);
  }
}

DSV4_D uint32_t largest(const float (&x)[8]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = max(most, magnitude_bits(x[i]));
  return most;
}

DSV4_D uint4 mixed(const uint4& x) {
  return make_uint4(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x7632));
}

// Eight codes times 64 * 2**-6 and their block's scale.
DSV4_D uint4 scaled_e2m1(uint32_t codes, uint32_t scale) {
  uint32_t out[4];
  decode_e2m1(out, codes);
  const uint32_t both = multiply_f16x2(e4m3x2_to_f16x2(uint16_t(scale | scale << 8)), 0x54005400u);  // times 64: exact
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = multiply_f16x2(out[i], both);
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// x rounded to the nearest e2m1, ties to even, at most 6, for an x of at most 2**20: adding 1.5 * 2**23 steps rounds to whole
// steps, which are 1/2 of the power of two below |x|, or of 1 where |x| is smaller.
DSV4_D float round_e2m1(float x) {
  const float steps = bits_float(max(float_bits(x) & 0x7F800000u, 0x3F800000u)) * 6291456.0f;
  return fminf(fmaxf((x + steps) - steps, -6.0f), 6.0f);
}

// The values that nvfp4_codes stands for, times the block's scale, as f16 pairs (0, 2), (4, 6), (1, 3), (5, 7). One reciprocal
// serves all eight quotients: each is corrected by its exact remainder, which rounds it correctly where no step leaves the
// normal range; a quotient so small that one does is rounded to zero all the same.
DSV4_D uint4 nvfp4_values(const float (&x)[8], const Nvfp4Scale& scale) {
  if (!(scale.unit >= 1e-25f && scale.unit <= 1e25f)) return scaled_e2m1(nvfp4_codes(x, scale), scale.code);
  float inverse, q[8];
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale.unit));
  inverse = fmaf(fmaf(-scale.unit, inverse, 1.0f), inverse, inverse);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float quotient = x[i] * inverse;
    quotient = fmaf(fmaf(-scale.unit, quotient, x[i]), inverse, quotient);
    q[i] = round_e2m1(fmaf(fmaf(-scale.unit, quotient, x[i]), inverse, quotient));
  }
  const uint32_t both = e4m3x2_to_f16x2(uint16_t(scale.code | scale.code << 8));
  const auto pair = [&](int low, int high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(q[high]), "f"(q[low]));
    return multiply_f16x2(out, both);
  };
  return make_uint4(pair(0, 2), pair(4, 6), pair(1, 3), pair(5, 7));
}

// Asks for inputs early, so that they lie in L1 when they are staged; `keep` what `touch` returns once the wait is over.
DSV4_D uint32_t touch(const void* data, int64_t bytes) {
  constexpr int line = 128;
  uint32_t word = 0;
  const int64_t offset = int64_t(threadIdx.x) * line;
  if (data != nullptr && offset < bytes) asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(word) : "l"(static_cast<const uint8_t*>(data) + (offset & ~int64_t(3))));
  return word;
}
DSV4_D void keep(uint32_t word) { asm volatile("" ::"r"(word)); }

// One row on its way to a column.
struct StagedRow {
  InputRows in;
  int64_t row;
  ColumnSpace out;
  int column;  // negative: nothing to do
};

DSV4_D bool scaled_here(const InputRows& in) { return in.form == kNvfp4Input && in.scale == nullptr; }

// e4m3 values in fp16 of a block with scale 2**exponent: those whose product leaves the range of fp32 become inf.
DSV4_D void overflow(uint32_t (&pairs)[4], int exponent) {
  if (exponent < 119) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int half = 0; half < 32; half += 16) {
      const uint32_t magnitude = (pairs[i] >> half) & 0x7FFFu, largest = uint32_t(128 - exponent + 15) << 10;  // 2**(128 - exponent)
      if (magnitude >= largest && magnitude <= 0x7C00u) pairs[i] = (pairs[i] & ~(0x7FFFu << half)) | (0x7C00u << half);
    }
  }
}

// Eight elements from k on of a row as they lie in memory: 16 bytes of bf16; 8 bytes of e4m3 and the block's scale; 4 bytes of
// e2m1 and the block's scale. Zero beyond the row.
DSV4_D uint4 load_chunk(const InputRows& in, int64_t row, int k) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (k >= in.k) return raw;
  if (in.scale == nullptr) return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in.data) + row * in.k + k);
  if (in.form == kFp8Input) {
    const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(in.data) + row * in.k + k);
    return make_uint4(x.x, x.y, in.scale[row * ((in.k + 127) / 128) + k / 128], 0);
  }
  raw.x = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(in.data) + (row * in.k + k) / 2);
  raw.z = in.scale[row * (in.k / 16) + k / 16];
  return raw;
}

// The largest magnitude of the bf16 elements of `width` lanes, eight in each, as that of an fp32. All lanes of the warp.
template <int width>
DSV4_D uint32_t largest_magnitude(const uint4& x) {
  constexpr uint32_t mask = 0x7FFF7FFFu;
  uint32_t most = __vmaxu2(__vmaxu2(x.x & mask, x.y & mask), __vmaxu2(x.z & mask, x.w & mask));
#pragma unroll
  for (int offset = width / 2; offset; offset /= 2) most = __vmaxu2(most, __shfl_xor_sync(0xFFFFFFFFu, most, offset));
  return max(most << 16, most & 0xFFFF0000u);
}

// Eight bf16 elements in the form of the columns. Whole warps, 256 elements of one row. `factor`: NVFP4, of the row; `exponent`: FP8, of
// the scale of their block.
DSV4_D uint4 column_values(int form, const uint4& raw, const float* factor, int& exponent) {
  if (form == kPlain) return raw;
  if (form == kPlainMixed) return mixed(raw);
  float x[8];
  unpack_bf16(x, raw);
  if (form == kFp8Input) {
    uint32_t out[4];
    exponent = fp8_exponent(largest_magnitude<16>(raw));
    const float inverse = power_of_two(-exponent);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= inverse;
    out[0] = e4m3x2_to_f16x2(pack_e4m3(x[0], x[2]));
    out[1] = e4m3x2_to_f16x2(pack_e4m3(x[4], x[6]));
    out[2] = e4m3x2_to_f16x2(pack_e4m3(x[1], x[3]));
    out[3] = e4m3x2_to_f16x2(pack_e4m3(x[5], x[7]));
    overflow(out, exponent);
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
  return nvfp4_values(x, nvfp4_block_scale(largest_magnitude<2>(raw), *factor));
}

// Such a chunk in the form of the columns; writes the scale of its FP8 block, too. Whole warps, 256 elements of one row.
DSV4_D uint4 stage_chunk(const InputRows& in, const uint4& raw, int k, int column, const ColumnSpace& out) {
  const bool quantize = in.scale == nullptr;
  if (in.form == kPlain) return raw;
  if (in.form == kPlainMixed) return mixed(raw);
  if (in.form == kNvfp4Input && !quantize) return scaled_e2m1(raw.x, raw.z);
  uint32_t out8[4];
  if (in.form == kFp8Input && !quantize) {
    decode_fp8(out8, raw.x, raw.y);
    overflow(out8, int(raw.z) - 127);
    if (k % 128 == 0) out.scale[k / 128 * kColumns + column] = e8m0_to_float(uint8_t(raw.z));
    return make_uint4(out8[0], out8[1], out8[2], out8[3]);
  }
  int exponent = 0;
  const uint4 values = column_values(in.form, raw, out.factor + column, exponent);
  if (in.form == kFp8Input && k % 128 == 0) out.scale[k / 128 * kColumns + column] = power_of_two(exponent);
  return values;
}

// The chunks of eight elements of `count` rows of `padded` elements that a thread takes: those of warps in turn, each within one
// row.
struct Chunks {
  int row, k;
  const int count, padded;
  DSV4_D Chunks(int count, int padded) : row(0), k(int(threadIdx.x) * 8), count(count), padded(padded) { settle(); }
  DSV4_D bool more() const { return row < count; }
  DSV4_D void next() {
    k += kTileThreads * 8;
    settle();
  }
  DSV4_D void settle() {
    while (k >= padded) k -= padded, ++row;
  }
};

// The rows that a CTA brings to columns. `Rows` has at(i), a StagedRow, for i < count, each with k <= most_k. Chunks that the CTA
// has loaded ahead come before the weights in the queue of the memory, where they would wait long for their turn.
template <int ahead, class Rows>
struct Stage {
  const Rows& rows;
  const int count, padded;
  uint4 raw[ahead];
  bool loaded = false;

  DSV4_D Stage(const Rows& rows, int count, int most_k) : rows(rows), count(count), padded(padded_k(most_k)) {}

  DSV4_D bool fits() const { return count * padded <= ahead * 8 * kTileThreads; }

  // Loads everything ahead, where it fits.
  DSV4_D void load() {
    loaded = true;
    Chunks c(count, padded);
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      raw[i] = make_uint4(0, 0, 0, 0);
      if (c.more()) {
        const StagedRow r = rows.at(c.row);
        if (r.column >= 0) raw[i] = load_chunk(r.in, r.row, c.k);
        c.next();
      }
    }
  }

  template <class Use>
  DSV4_D void each(const Use& use) {
    Chunks c(count, padded);
    if (loaded) {
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (!c.more()) break;
        const StagedRow r = rows.at(c.row);
        if (r.column >= 0 && c.k < padded_k(r.in.k)) use(r, c, raw[i]);
        c.next();
      }
    } else {
#pragma unroll 1
      for (; c.more(); c.next()) {
        const StagedRow r = rows.at(c.row);
        if (r.column >= 0 && c.k < padded_k(r.in.k)) use(r, c, load_chunk(r.in, r.row, c.k));
      }
    }
  }

  // All threads of the CTA; the caller synchronises after it, and before it if the columns or `amax`, a word per row, were
  // in use. `global`: whether any row gets its global scale here.
  DSV4_D void write(bool global, uint32_t* amax) {
    if (global) {
      for (int i = threadIdx.x; i < count; i += kTileThreads) amax[i] = 0;
      __syncthreads();
      each([&](const StagedRow& r, const Chunks& c, const uint4& chunk) {
        if (!scaled_here(r.in)) return;
        float x[8];
        unpack_bf16(x, chunk);
        const uint32_t most = __reduce_max_sync(0xFFFFFFFFu, largest(x));
        if (lane_id() == 0) atomicMax(amax + c.row, most);
      });
      __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += kTileThreads) {
      const StagedRow r = rows.at(i);
      if (r.column < 0) continue;
      float factor = 1.0f;
      if (r.in.form == kNvfp4Input) factor = scaled_here(r.in) ? nvfp4_global_scale(amax[i]) : r.in.global_scale[r.row];
      r.out.factor[r.column] = factor;
    }
    if (global) __syncthreads();  // the chunks below divide by the factors
    each([&](const StagedRow& r, const Chunks& c, const uint4& chunk) {
      *reinterpret_cast<uint4*>(r.out.data + r.column * column_bytes(r.in.k) + column_chunk(c.k / 8) * 16) = stage_chunk(r.in, chunk, c.k, r.column, r.out);
    });
  }
};

// The rows of one token, all of them bf16 that become one column each in the same form, at most `chunks` * 4096 elements with their
// padding. Where they come from and go to is found out at once; `load` and `write` are short. The last chunks may be beyond all rows.
template <int chunks>
struct TokenStage {
  const uint4* from[chunks];  // or null for zeros
  uint32_t to[chunks], scale[chunks];
  const float* factor[chunks];
  int row[chunks];            // negative beyond all rows
  uint4 raw[chunks];

  // at(i): row i < rows, its input bf16.
  template <class At>
  DSV4_D TokenStage(int rows, const At& at) {
    int i = 0, k = int(threadIdx.x) * 8;
#pragma unroll
    for (int c = 0; c < chunks; ++c, k += kTileThreads * 8) {
      StagedRow r{};
      for (; i < rows; ++i) {
        r = at(i);
        if (k < padded_k(r.in.k)) break;
        k -= padded_k(r.in.k);
      }
      row[c] = i < rows ? i : -1;
      from[c] = i < rows && k < r.in.k ? reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(r.in.data) + r.row * r.in.k + k) : nullptr;
      to[c] = shared_address(r.out.data) + column_chunk(k / 8) * 16;
      scale[c] = shared_address(r.out.scale) + k / 128 * kColumns * 4;
      factor[c] = r.out.factor;
    }
  }

  DSV4_D void load() {  // from L2: it may be early
#pragma unroll
    for (int c = 0; c < chunks; ++c) raw[c] = from[c] ? __ldcg(from[c]) : make_uint4(0, 0, 0, 0);
  }

  // As Stage::write; `amax` has a word per row. Every row gets its factor.
  template <class At>
  DSV4_D void write(int rows, const At& at, int form, uint32_t* amax) {
    if (form == kNvfp4Input) {
      for (int i = threadIdx.x; i < rows; i += kTileThreads) amax[i] = 0;
      __syncthreads();
#pragma unroll
      for (int c = 0; c < chunks; ++c) {
        if (row[c] < 0) break;
        float x[8];
        unpack_bf16(x, raw[c]);
        const uint32_t most = __reduce_max_sync(0xFFFFFFFFu, largest(x));
        if (lane_id() == 0) atomicMax(amax + row[c], most);
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < rows; i += kTileThreads) *at(i).out.factor = form == kNvfp4Input ? nvfp4_global_scale(amax[i]) : 1.0f;
    if (form == kNvfp4Input) __syncthreads();  // the chunks below divide by the factors
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      if (row[c] < 0) break;
      int exponent = 0;
      store16(to[c], column_values(form, raw[c], factor[c], exponent));
      if (form == kFp8Input && lane_id() % 16 == 0) store4(scale[c], float_bits(power_of_two(exponent)));
    }
  }
};

}  // namespace dsv4
