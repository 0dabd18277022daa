// Tensor maps of the interpreter: 128 bytes like the driver's, in a form of its own (the driver's is opaque).
#pragma once

#include <cstdint>
#include <string>

namespace dsv4::sim {

struct TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 to 4
  uint32_t dims[5];     // minus one; of packed types the first counts packs, here and in the box
  uint16_t box[5];
  uint8_t element_strides[5];
  uint8_t rank, fill_nan, real;
  uint8_t swizzle, atom;         // log2 of the bytes of a swizzled row (0: none) and of the pieces that stay together
  uint8_t pack, element, held;   // elements of a pack (1: not packed); its bytes in global and in shared memory
  uint8_t type;                  // as of cuTensorMapEncodeTiled
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint64_t kTensorMapMagic = 0x70616D726F736E74;

}  // namespace dsv4::sim

namespace dsv4 {
// Arguments as of cuTensorMapEncodeTiled (the numbers of its enums too): type, rank, address, dims, strides in bytes of
// dimensions 1.., box, element strides, interleave, swizzle, L2 promotion, fill. Empty, or a sentence.
std::string sim_encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                             const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill);
}  // namespace dsv4
