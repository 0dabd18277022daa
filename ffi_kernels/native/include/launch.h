// One kernel launch, and the two machines that can carry it out: a GPU behind the CUDA driver, and the PTX interpreter.
// Host C++17 only. Every function returns an empty string, or a sentence that says what is wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dsv4 {

struct Memory {  // a buffer that the kernel may touch
  void* data;
  size_t bytes;
  bool writable;
  bool settled = true;  // no launch of its custom call that may still run when this one starts writes it
};

// A buffer as TMA sees it: a tensor of which boxes are copied. Numbers as cuTensorMapEncodeTiled takes them; sizes count from the
// innermost dimension, in elements; strides, of all other dimensions, in bytes.
struct TensorMapArguments {
  static constexpr size_t kBytes = 128, kAlign = 64;  // encoded
  int type, swizzle;
  uint32_t rank;
  void* address;
  uint64_t dims[5], strides[4];
  uint32_t box[5];
  static constexpr uint32_t kElementStrides[5] = {1, 1, 1, 1, 1};
  static constexpr int kInterleave = 0, kPromotion = 3, kFill = 0;  // none; rows to L2 by 256 bytes; zeros beyond the bounds
};
using EncodeTensorMap = std::string (*)(const TensorMapArguments& tensor, void* map);

struct Launch {
  std::string arch;    // "sm_90a", "sm_100a": which image to run
  std::string module;  // stem of the .cu file
  std::string kernel;  // extern "C" name
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];
  uint32_t shared_bytes;  // dynamic
  bool follows = false;   // another launch of its custom call: it may start early, and waits by griddepcontrol.wait
  bool late = false;      // lets the next one start only after that
  const uint8_t* params;  // the kernel's one argument, a POD; its tensor maps are encoded
  size_t params_bytes;
  std::vector<Memory> memory;
};

// Images (cubin for the driver, PTX for the interpreter) are files; Python registers them when it loads the library.
void add_image(const std::string& arch, const std::string& module, const std::string& path);
std::string image_path(const std::string& arch, const std::string& module);  // empty if there is none

// CUDA driver. `prepare` loads the module and sets the kernel's attributes; `launch` only enqueues on `stream`.
std::string driver_prepare(const Launch& launch);
std::string driver_launch(const Launch& launch, void* stream);
std::string driver_encode(const TensorMapArguments& tensor, void* map);

// Interpreter: runs to the end before it returns. Schedule and checks come from the variable DSV4_SIM.
std::string sim_launch(const Launch& launch);
std::string sim_encode(const TensorMapArguments& tensor, void* map);

}  // namespace dsv4
