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
};

struct Launch {
  std::string arch;    // "sm_90a", "sm_100a": which image to run
  std::string module;  // stem of the .cu file
  std::string kernel;  // extern "C" name
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];
  uint32_t shared_bytes;  // dynamic
  const uint8_t* params;  // the kernel's one argument, a POD
  size_t params_bytes;
  std::vector<Memory> memory;
};

// Images (cubin for the driver, PTX for the interpreter) are files; Python registers them when it loads the library.
void add_image(const std::string& arch, const std::string& module, const std::string& path);
std::string image_path(const std::string& arch, const std::string& module);  // empty if there is none

// CUDA driver. `prepare` loads the module and sets the kernel's attributes; `launch` only enqueues on `stream`.
std::string driver_prepare(const Launch& launch);
std::string driver_launch(const Launch& launch, void* stream);

// Interpreter: runs to the end before it returns. Schedule and checks come from the variable DSV4_SIM.
std::string sim_launch(const Launch& launch);

}  // namespace dsv4
