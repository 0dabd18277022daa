// NVFP4 times NVFP4 on the tensor cores of sm_100a: x [M, K] w [N, K]^T -> [M, N]. Contract: ffi_kernels/matmul.py.
//
// One CTA, or a pair, works on one tile after the other. A tile has 128 columns (rows of w) and 128 rows of x for each CTA; each
// CTA of a pair copies its own rows of x and half of those of w, of which the pair's products read both halves.
// One warp copies (TMA) into a ring of stages of 256 K; one multiplies, in a pair that of the first CTA for both; four
// read the sums out of tensor memory, apply the global scales and store, while the next tile is multiplied into the other
// accumulator. Barriers of a pair: `full` and `drained` are those of the first CTA, `empty` and `summed` of each.
#include "../include/dependent.cuh"
#include "../include/tcgen05.cuh"
#include "../include/tma.cuh"

namespace dsv4 {
namespace {

constexpr int kTile = 128;                               // rows of x of one CTA, rows of w
constexpr int kMultiplyK = 64;                           // K of one product
constexpr int kMultiplies = 4;                           // products of a stage
constexpr int kRowBytes = kMultiplies * kMultiplyK / 2;  // of a stage: one swizzled row
constexpr int kScaleBytes = 512;                         // scale factors of 128 rows for one product
constexpr int kAccumulators = 2;
constexpr int kBoxBytes = 32 * 128;                      // of the result: 32 rows of 128 bytes
constexpr int kBoxes = 2;                                // of a warp, so that one is stored while the next is written
constexpr int kEpilogueWarps = 4, kCopyWarp = 4, kMultiplyWarp = 5, kThreads = 192;

// Columns of tensor memory: the accumulators, then for each stage the scale factors of x and of w. A stage has columns of its
// own: its scale factors are overwritten only after the products that used them are known to be done.
constexpr int kScaleColumns = kTile / 32;
constexpr int kFirstScale = kAccumulators * kTile;
constexpr int kStageColumns = 2 * kMultiplies * kScaleColumns;
constexpr int kTensorColumns = 512;

struct MatmulParams {
  TensorMap x, x_scale, w, w_scale, out;
  const void *x_data, *x_scales;  // read through the maps
  const float* x_global;          // one, or one for each row
  const void *w_data, *w_scales;
  const float* w_global;          // one
  void* out_data;
  int32_t rows, columns;          // M, N
  int32_t multiplies;             // of a tile: ceil(K / 64)
  int32_t x_global_stride;        // 0 or 1
};

template <int group>
struct Layout {  // of shared memory
  static constexpr int kStages = group == 1 ? 5 : 6;
  // in a stage, after the rows of x
  static constexpr int kW = kTile * kRowBytes, kXScales = kW + kTile / group * kRowBytes;
  static constexpr int kWScales = kXScales + kMultiplies * kScaleBytes, kStageBytes = kWScales + kMultiplies * kScaleBytes;
  // after the stages
  static constexpr int kOut = kStages * kStageBytes, kFull = kOut + kEpilogueWarps * kBoxes * kBoxBytes;
  static constexpr int kEmpty = kFull + 8 * kStages, kSummed = kEmpty + 8 * kStages, kDrained = kSummed + 8 * kAccumulators;
  static constexpr int kTensorAddress = kDrained + 8 * kAccumulators, kBytes = kTensorAddress + 8;
  static_assert(kStageBytes % 1024 == 0, "the pattern of a swizzle of 128 bytes repeats every 1024");
  static_assert(kFirstScale + kStages * kStageColumns <= kTensorColumns, "tensor memory");
  static_assert(kBytes <= 232448, "shared memory");
};

// Tiles of this CTA or pair, those of one column of tiles after each other: they share rows of w.
template <int group>
struct Tiles {
  int down, tile, step, count;
  DSV4_D explicit Tiles(const MatmulParams& p)
      : down((p.rows + group * kTile - 1) / (group * kTile)), tile(blockIdx.x / group), step(gridDim.x / group),
        count(down * ((p.columns + kTile - 1) / kTile)) {}
  DSV4_D bool more() const { return tile < count; }
  DSV4_D void advance() { tile += step; }
  DSV4_D int row_tile(uint32_t rank) const { return tile % down * group + int(rank); }  // of 128 rows of x
  DSV4_D int column_tile() const { return tile / down; }
};

template <int group>
DSV4_D void copy_tiles(const MatmulParams& p, uint32_t shared, uint32_t rank) {
  using L = Layout<group>;
  const uint32_t full = group == 1 ? shared + L::kFull : peer_address(shared + L::kFull, 0);
  RingCursor<L::kStages> at;
  for (Tiles<group> tiles(p); tiles.more(); tiles.advance()) {
    const int row = tiles.row_tile(rank), column = tiles.column_tile();
    for (int m = 0; m < p.multiplies; m += kMultiplies) {
      const uint32_t stage = shared + at.slot * L::kStageBytes, barrier = full + 8 * at.slot;
      mbarrier_wait(shared + L::kEmpty + 8 * at.slot, at.parity ^ 1);
      if (rank == 0) mbarrier_arrive_expect(shared + L::kFull + 8 * at.slot, group * L::kStageBytes);
      const int byte = m * (kMultiplyK / 2);
      load_box<group>(stage, p.x, barrier, byte, row * kTile);
      load_box<group>(stage + L::kW, p.w, barrier, byte, column * kTile + int(rank) * (kTile / group));
      load_box<group>(stage + L::kXScales, p.x_scale, barrier, 0, m, row);
      load_box<group>(stage + L::kWScales, p.w_scale, barrier, 0, m, column);
      at.advance();
    }
  }
  // The last products of the ring arrive here, from the other CTA too: this one must not end before.
  for (int i = 0; i < L::kStages; ++i, at.advance()) mbarrier_wait(shared + L::kEmpty + 8 * at.slot, at.parity ^ 1);
}

template <int group>
DSV4_D void multiply_tiles(const MatmulParams& p, uint32_t shared, uint32_t tensor) {
  using L = Layout<group>;
  constexpr uint32_t instruction = nvfp4_instruction(group * kTile, kTile);
  RingCursor<L::kStages> at;
  RingCursor<kAccumulators> sums;
  for (Tiles<group> tiles(p); tiles.more(); tiles.advance()) {
    mbarrier_wait(shared + L::kDrained + 8 * sums.slot, sums.parity ^ 1);
    tensor_fence_after();
    const uint32_t sum = tensor + sums.slot * kTile;
    for (int first = 0; first < p.multiplies; first += kMultiplies) {
      const uint32_t stage = shared + at.slot * L::kStageBytes;
      const uint32_t x_scales = tensor + kFirstScale + at.slot * kStageColumns, w_scales = x_scales + kMultiplies * kScaleColumns;
      const int here = min(kMultiplies, p.multiplies - first);
      mbarrier_wait(shared + L::kFull + 8 * at.slot, at.parity);
      tensor_fence_after();
      const uint64_t x = rows_descriptor(stage), w = rows_descriptor(stage + L::kW);
      const uint64_t from_x = scales_descriptor(stage + L::kXScales), from_w = scales_descriptor(stage + L::kWScales);
#pragma unroll
      for (int i = 0; i < kMultiplies; ++i) {
        if (i >= here) break;
        copy_scales<group>(x_scales + i * kScaleColumns, from_x + i * (kScaleBytes / 16));
        copy_scales<group>(w_scales + i * kScaleColumns, from_w + i * (kScaleBytes / 16));
      }
#pragma unroll
      for (int i = 0; i < kMultiplies; ++i) {
        if (i >= here) break;
        const uint32_t k = i * (kMultiplyK / 2 / 16);
        multiply_nvfp4<group>(sum, x + k, w + k, instruction, x_scales + i * kScaleColumns, w_scales + i * kScaleColumns, first + i > 0);
      }
      commit_products<group>(shared + L::kEmpty + 8 * at.slot);
      at.advance();
    }
    commit_products<group>(shared + L::kSummed + 8 * sums.slot);
    sums.advance();
  }
}

DSV4_D float scaled(uint32_t sum, float x_global, float w_global) { return bits_float(sum) * x_global * w_global; }

// 128 bytes of a row of the result: 32 fp32, or 64 bf16.
template <bool bf16>
DSV4_D void load_row(uint32_t (&out)[32], uint32_t from, float x_global, float w_global) {
  if constexpr (bf16) {
    uint32_t low[32], high[32];
    load_tensor_32(low, from);
    load_tensor_32(high, from + 32);
    wait_tensor_loads(low, high);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      out[i] = pack_bf16(scaled(low[2 * i], x_global, w_global), scaled(low[2 * i + 1], x_global, w_global));
      out[16 + i] = pack_bf16(scaled(high[2 * i], x_global, w_global), scaled(high[2 * i + 1], x_global, w_global));
    }
  } else {
    load_tensor_32(out, from);
    wait_tensor_loads(out);
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = float_bits(scaled(out[i], x_global, w_global));
  }
}

template <int group, bool bf16>
DSV4_D void store_tiles(const MatmulParams& p, uint8_t* dynamic, uint32_t tensor, uint32_t rank) {
  using L = Layout<group>;
  constexpr int kBoxColumns = bf16 ? 64 : 32;
  const uint32_t lane = lane_id(), warp = warp_id(), shared = shared_address(dynamic);
  uint8_t* boxes = dynamic + L::kOut + warp * kBoxes * kBoxBytes;
  const uint32_t drained = group == 1 ? shared + L::kDrained : peer_address(shared + L::kDrained, 0);
  const float w_global = *p.w_global;
  RingCursor<kAccumulators> sums;
  RingCursor<kBoxes> box;
  for (Tiles<group> tiles(p); tiles.more(); tiles.advance()) {
    const int first_row = tiles.row_tile(rank) * kTile + int(warp) * 32, first_column = tiles.column_tile() * kTile;
    const int row = first_row + int(lane), columns = first_row < p.rows ? min(kTile, p.columns - first_column) : 0;
    const float x_global = row < p.rows ? p.x_global[row * p.x_global_stride] : 0.0f;
    const uint32_t sum = tensor + (warp * 32 << 16) + sums.slot * kTile;
    mbarrier_wait(shared + L::kSummed + 8 * sums.slot, sums.parity);
    tensor_fence_after();
    for (int column = 0; column < columns; column += kBoxColumns) {
      uint32_t out[32];
      load_row<bf16>(out, sum + column, x_global, w_global);
      uint8_t* from = boxes + box.slot * kBoxBytes;
      if (lane == 0) wait_stores_read<kBoxes - 1>();
      __syncwarp();  // all lanes may write the box
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {  // as a swizzle of 128 bytes wants it, and free of bank conflicts
        uint4* to = reinterpret_cast<uint4*>(from + lane * 128 + ((i ^ (lane & 7)) << 4));
        *to = make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
      }
      fence_async();
      __syncwarp();  // all lanes have written it
      if (lane == 0) {
        store_box(p.out, shared_address(from), first_column + column, first_row);
        commit_stores();
      }
      box.advance();
    }
    tensor_fence_before();  // the loads, in the arrival
    __syncwarp();
    if (lane == 0) mbarrier_arrive_relaxed(drained + 8 * sums.slot);
    sums.advance();
  }
  if (lane == 0) wait_stores<0>();
}

template <int group, bool bf16>
DSV4_D void matmul(const MatmulParams& p) {
  using L = Layout<group>;
  extern __shared__ __align__(1024) uint8_t dynamic[];
  const uint32_t shared = shared_address(dynamic), warp = warp_id();
  const uint32_t rank = group == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::kStages; ++i) {
      mbarrier_init(shared + L::kFull + 8 * i, 1);
      mbarrier_init(shared + L::kEmpty + 8 * i, 1);
    }
    for (int i = 0; i < kAccumulators; ++i) {
      mbarrier_init(shared + L::kSummed + 8 * i, 1);
      mbarrier_init(shared + L::kDrained + 8 * i, group * kEpilogueWarps);
    }
    mbarrier_init_fence();
  }
  if constexpr (group == 2) cluster_sync();  // the other CTA runs, with its barriers
  if (warp == kMultiplyWarp) allocate_tensor_memory<group>(shared + L::kTensorAddress, kTensorColumns);
  tensor_fence_before();
  __syncthreads();  // tensor memory has its address
  tensor_fence_after();
  const uint32_t tensor = *reinterpret_cast<const uint32_t*>(dynamic + L::kTensorAddress);

  if (warp < kEpilogueWarps) {
    store_tiles<group, bf16>(p, dynamic, tensor, rank);
  } else if (warp == kCopyWarp && elect_lane()) {
    for (const TensorMap* map : {&p.x, &p.w, &p.x_scale, &p.w_scale, &p.out}) prefetch_map(*map);
    copy_tiles<group>(p, shared, rank);
  } else if (warp == kMultiplyWarp && rank == 0 && elect_lane()) {
    multiply_tiles<group>(p, shared, tensor);
  }
  __syncwarp();
  tensor_fence_before();
  if constexpr (group == 1) __syncthreads();  // nobody needs tensor memory or, in a pair, the other CTA's barriers any more
  if constexpr (group == 2) cluster_sync();
  tensor_fence_after();
  if (warp == kMultiplyWarp) free_tensor_memory<group>(tensor, kTensorColumns);
}

}  // namespace

#define DSV4_MATMUL(name, group, bf16)                                                                      \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ MatmulParams p) { \
    dsv4::start_after_previous();                                                                           \
    matmul<group, bf16>(p);                                                                                 \
  }

DSV4_MATMUL(nvfp4_matmul_one_fp32, 1, false)
DSV4_MATMUL(nvfp4_matmul_one_bf16, 1, true)
DSV4_MATMUL(nvfp4_matmul_pair_fp32, 2, false)
DSV4_MATMUL(nvfp4_matmul_pair_bf16, 2, true)

}  // namespace dsv4
