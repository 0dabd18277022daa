// The interpreter's encoder of tensor maps: the limits of cuTensorMapEncodeTiled as sentences.
#include "tensor_map.h"

#include <cstring>

#include "launch.h"
#include "module.h"

namespace dsv4 {

std::string sim_encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                             const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill) {
  using sim::text_of;
  struct Kind { uint8_t pack, bytes, held; };
  static const Kind kinds[] = {{1, 1, 1}, {1, 2, 2}, {1, 4, 4}, {1, 4, 4}, {1, 8, 8}, {1, 8, 8}, {1, 2, 2}, {1, 4, 4}, {1, 8, 8}, {1, 2, 2}, {1, 4, 4},
                               {1, 4, 4}, {1, 4, 4}, {2, 1, 1}, {16, 8, 16}, {16, 12, 16}};
  // u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16 f32-ftz tf32 tf32-ftz 16u4-align8 16u4-align16 16u6-align16
  if (type < 0 || type > 15) return text_of("tensor map: data type %d; it must lie in 0..15", type);
  const Kind kind = kinds[type];
  const bool padded = kind.held != kind.bytes;
  if (rank < 1 || rank > 5) return text_of("tensor map: rank %u; it must lie in 1..5", rank);
  if (interleave != 0) return "tensor map: interleaved layouts are not modelled";
  if (swizzle < 0 || swizzle > 4) return text_of("tensor map: swizzle %d is not modelled (0 to 4: none, 32, 64, 128 bytes, 128 bytes in pieces of 32)", swizzle);
  if (promotion < 0 || promotion > 3) return text_of("tensor map: L2 promotion %d", promotion);
  const auto at = reinterpret_cast<uint64_t>(address);
  const unsigned align = padded ? 32 : 16;
  if (at % align) return text_of("tensor map: the address 0x%llx is not a multiple of %u", (unsigned long long)at, align);
  if (padded && (dims[0] % 128 || box[0] != 128)) return text_of("tensor map: %llu packed elements in a row and %u in the box; of this type the row has a multiple of 128, the box 128", (unsigned long long)dims[0], box[0]);
  if (dims[0] % kind.pack || box[0] % kind.pack) return text_of("tensor map: the row of %llu packed elements or the box of %u is not a multiple of %u", (unsigned long long)dims[0], box[0], kind.pack);
  sim::TensorMap m;
  std::memset(&m, 0, sizeof m);
  m.magic = sim::kTensorMapMagic;
  m.address = at;
  m.rank = static_cast<uint8_t>(rank);
  m.type = static_cast<uint8_t>(type);
  m.pack = kind.pack;
  m.element = kind.bytes;
  m.held = kind.held;
  m.real = type >= 6 && type <= 12;
  m.fill_nan = fill == 1;
  m.swizzle = static_cast<uint8_t>(swizzle == 4 ? 7 : swizzle ? 4 + swizzle : 0);
  m.atom = swizzle == 4 ? 5 : 4;
  if (fill < 0 || fill > 1 || (fill == 1 && !m.real)) return "tensor map: the fill is 0 (zeros) or, for floats, 1 (nan)";
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] < 1 || dims[i] > (uint64_t{1} << 32)) return text_of("tensor map: dimension %u has %llu elements; the limit is 2^32", i, (unsigned long long)dims[i]);
    if (box[i] < 1 || box[i] > 256) return text_of("tensor map: the box has %u elements in dimension %u; the limit is 256", box[i], i);
    if (element_strides[i] < 1 || element_strides[i] > 8) return text_of("tensor map: element stride %u in dimension %u; the limit is 8", element_strides[i], i);
    if (!i && element_strides[0] != 1) return text_of("tensor map: element stride %u in dimension 0; a device ignores it there, so it must be 1", element_strides[0]);
    m.dims[i] = static_cast<uint32_t>(dims[i] / (i ? 1 : kind.pack) - 1);
    m.box[i] = static_cast<uint16_t>(box[i] / (i ? 1 : kind.pack));
    m.element_strides[i] = static_cast<uint8_t>(element_strides[i]);
    if (!i) continue;
    if (strides[i - 1] % align || strides[i - 1] >> 40) return text_of("tensor map: stride %llu of dimension %u is not a multiple of %u below 2^40", (unsigned long long)strides[i - 1], i, align);
    m.strides[i - 1] = strides[i - 1];
  }
  const uint32_t inner = m.box[0] * m.held;
  if (inner % 16) return text_of("tensor map: the box's inner dimension has %u bytes, which is not a multiple of 16", inner);
  if (m.swizzle && inner > (1u << m.swizzle)) return text_of("tensor map: the box's inner dimension has %u bytes, more than the swizzle's %u", inner, 1u << m.swizzle);
  std::memset(map, 0, 128);
  std::memcpy(map, &m, sizeof m);
  return "";
}

std::string sim_encode(const TensorMapArguments& t, void* map) {
  return sim_encode_tiled(map, t.type, t.rank, t.address, t.dims, t.strides, t.box, t.kElementStrides, t.kInterleave, t.swizzle, t.kPromotion, t.kFill);
}

}  // namespace dsv4
