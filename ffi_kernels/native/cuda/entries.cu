// What a decode step makes of its latent projections (ffi_kernels/entries.py): the normed input of the query
// projections in the format that they take, window entries in the format of the cache, query heads, and the copy of
// accepted rows into the rings. Also the FP8 cache format by itself. Everything here is bound by latency: one warp per
// row or head, and all loads of a thread before its first use. Not here: compressed entries (compressor.cu).
#include "dependent.cuh"
#include "latent_rows.cuh"

using namespace dsv4;

// --- attention_inputs ----------------------------------------------------------------------------------------------

struct AttentionInputsParams {
  LatentInputs in;
  LatentOutputs out;
  LatentShape shape;
};

extern "C" __global__ void __launch_bounds__(1024) attention_inputs(const __grid_constant__ AttentionInputsParams p) {
  start_after_previous();
  latent_row(p.in, p.out, p.shape, int(blockIdx.x));
}

// --- queries -------------------------------------------------------------------------------------------------------

struct QueriesParams {
  const uint16_t* q;        // bf16 [R, H, K]
  const uint16_t* index_q;  // bf16 [R, Hi, Ki] | null
  const float* cos;         // [R, rope/2]
  const float* sin;         // [R, rope/2]
  uint16_t* q_out;          // bf16 [R, H, K]
  uint16_t* index_out;      // bf16 [R, Hi, Ki] | null
  int32_t rows, heads, width, index_heads, index_width, rope, fp4;
  float eps, hadamard_scale;
};

extern "C" __global__ void __launch_bounds__(128) queries(const __grid_constant__ QueriesParams p) {
  let_next_start();
  const int warp = int(blockIdx.x * (blockDim.x / 32) + warp_id());
  const int index = warp - p.rows * p.heads;  // of the index head, which come after the main ones
  if (index >= p.rows * p.index_heads) return wait_for_previous();
  const bool is_main = index < 0;
  const size_t head = is_main ? warp : index;
  const size_t row = head / (is_main ? p.heads : p.index_heads);
  WarpRow x;
  RowAngles angles;
  x.width = is_main ? p.width : p.index_width;
  const uint16_t* const from = (is_main ? p.q : p.index_q) + head * x.width;
  uint16_t* const to = (is_main ? p.q_out : p.index_out) + head * x.width;
  angles.load(p.cos + row * (p.rope / 2), p.sin + row * (p.rope / 2), x.width, p.rope);
  x.clear();
#pragma unroll 1
  for (int pass = kRehearsal; pass <= kReal; ++pass) {
    if (pass == kReal) {
      wait_for_previous();
      x.load(from);
    }
    if (is_main) x.norm(nullptr, p.eps);
    angles.rotate(x);
    if (!is_main && p.fp4) {
      x.hadamard(p.hadamard_scale);
      const int exponent = x.fp4_block();
      const uint32_t codes = x.fp4_codes(exponent);
#pragma unroll
      for (int i = 0; i < kVector; ++i) x.x[0][i] = times_power_of_two(e2m1_to_float(codes >> (4 * i)), exponent);
    }
    if (pass == kReal) x.store_plain(to);
  }
}

// --- encode_kv, kv_values ------------------------------------------------------------------------------------------

struct EncodeKvParams {
  const void* values;  // bf16 or fp32 [R, K]
  uint8_t* data;       // [R, K + rope]
  uint8_t* scale;      // [R, scales]
  int32_t rows, width, rope, scales;
};

template <typename Value>
DSV4_D void encode_rows(const EncodeKvParams& p) {
  start_after_previous();
  const size_t row = size_t(blockIdx.x) * (blockDim.x / 32) + warp_id();
  if (row >= size_t(p.rows)) return;
  WarpRow x;
  x.width = p.width;
  x.load(static_cast<const Value*>(p.values) + row * p.width);
  x.store_fp8(p.data + row * (p.width + p.rope), p.scale + row * p.scales, p.rope, p.scales);
}

extern "C" __global__ void __launch_bounds__(128) encode_kv_bf16(const __grid_constant__ EncodeKvParams p) { encode_rows<uint16_t>(p); }
extern "C" __global__ void __launch_bounds__(128) encode_kv_fp32(const __grid_constant__ EncodeKvParams p) { encode_rows<float>(p); }

struct KvValuesParams {
  const uint8_t* data;   // [R, nope + 2 rope]
  const uint8_t* scale;  // [R, scales]
  uint16_t* values;      // bf16 [R, nope + rope]
  int32_t rows, nope, rope, scales;
};

extern "C" __global__ void __launch_bounds__(128) kv_values(const __grid_constant__ KvValuesParams p) {
  start_after_previous();
  const size_t row = size_t(blockIdx.x) * (blockDim.x / 32) + warp_id();
  if (row >= size_t(p.rows)) return;
  const int width = p.nope + p.rope;
  const uint8_t* data = p.data + row * (width + p.rope);
  uint16_t* values = p.values + row * width;
  for (int at = 8 * int(lane_id()); at < width; at += 256) {
    if (at >= p.nope) {
      *reinterpret_cast<uint4*>(values + at) = *reinterpret_cast<const uint4*>(data + p.nope + 2 * (at - p.nope));
      continue;
    }
    const uint2 codes = *reinterpret_cast<const uint2*>(data + at);
    const int exponent = decode_e8m0(p.scale[row * p.scales + at / kKvBlock]);
    float x[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x[i] = times_power_of_two(e4m3_to_float(uint8_t((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)))), exponent);
    store_vector(values + at, x);
  }
}

// --- commit_rows ---------------------------------------------------------------------------------------------------

template <int capacity>
struct CommitParams {
  const void* before[capacity];  // the rings; `ring` is the same memory
  const void* rows[capacity];    // [B, T, bytes]
  const int32_t* start;          // [B]
  const int32_t* length;         // [B]
  void* ring[capacity];          // [B, size, bytes]
  int32_t size[capacity];
  int32_t bytes[capacity];
  int32_t tokens;
};

// Copies the rows [T, units] of a sequence into its ring [size, units]. Rows that share a slot are written in order by the
// same threads, so that the last one survives.
template <typename Unit>
DSV4_D void commit_sequence(const Unit* rows, Unit* ring, int units, int tokens, int size, const int32_t* starts,
                            const int32_t* lengths) {
  constexpr int kTogether = 4;  // tokens whose loads are in flight together, and with those of start and length
  for (int first = 0; first < tokens; first += kTogether) {
    for (int at = int(threadIdx.x); at < units; at += int(blockDim.x)) {
      Unit values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i < tokens) values[i] = rows[size_t(first + i) * units + at];
      const uint32_t start = uint32_t(starts[blockIdx.y]);
      const int length = min(lengths[blockIdx.y], tokens);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int token = first + i, position = int(start + uint32_t(token));  // wraps around, as int32 arrays do
        if (token < length && position >= 0)
          ring[size_t(position % size) * units + at] = values[i];
      }
    }
  }
}

template <int capacity>
DSV4_D void commit(const CommitParams<capacity>& p) {
  start_after_previous();
  const int i = int(blockIdx.x), bytes = p.bytes[i], size = p.size[i];
  const char* rows = static_cast<const char*>(p.rows[i]) + size_t(blockIdx.y) * p.tokens * bytes;
  char* ring = static_cast<char*>(p.ring[i]) + size_t(blockIdx.y) * size * bytes;
  if (bytes % 16 == 0)
    commit_sequence(reinterpret_cast<const uint4*>(rows), reinterpret_cast<uint4*>(ring), bytes / 16, p.tokens, size, p.start, p.length);
  else if (bytes % 8 == 0)
    commit_sequence(reinterpret_cast<const uint2*>(rows), reinterpret_cast<uint2*>(ring), bytes / 8, p.tokens, size, p.start, p.length);
  else
    commit_sequence(rows, ring, bytes, p.tokens, size, p.start, p.length);
}

extern "C" __global__ void __launch_bounds__(256) commit_rows_8(const __grid_constant__ CommitParams<8> p) { commit(p); }
extern "C" __global__ void __launch_bounds__(256) commit_rows_64(const __grid_constant__ CommitParams<64> p) { commit(p); }
extern "C" __global__ void __launch_bounds__(256) commit_rows_320(const __grid_constant__ CommitParams<320> p) { commit(p); }
