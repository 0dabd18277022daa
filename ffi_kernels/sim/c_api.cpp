// The interpreter for ctypes: runs a kernel of a PTX file, without XLA. Tests and experiments use it.
#include <algorithm>

#include "launch.h"
#include "machine.h"
#include "tensor_map.h"

#ifndef DSV4_SIM_SOURCES
#define DSV4_SIM_SOURCES ""
#endif

namespace {
// dims: grid, block, cluster; buffers: address, bytes, writable for each
const char* keep(const std::string& text, char* error, size_t error_bytes) {
  if (error_bytes) {
    const size_t n = std::min(text.size(), error_bytes - 1);
    std::copy_n(text.data(), n, error);
    error[n] = 0;
  }
  return error;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int dsv4_sim_run(const char* path, const char* kernel, const uint32_t* dims, uint32_t shared_bytes,
                                                                  const uint8_t* params, size_t params_bytes, const uint64_t* buffers, size_t count,
                                                                  char* error, size_t error_bytes) {
  dsv4::add_image("file", path, path);
  dsv4::Launch launch;
  launch.arch = "file";
  launch.module = path;
  launch.kernel = kernel;
  std::copy_n(dims, 3, launch.grid);
  std::copy_n(dims + 3, 3, launch.block);
  std::copy_n(dims + 6, 3, launch.cluster);
  launch.shared_bytes = shared_bytes;
  launch.params = params;
  launch.params_bytes = params_bytes;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t use = buffers[3 * i + 2];  // 1: the kernel may write it; 2: so does a launch before this one, which need not have ended
    launch.memory.push_back({reinterpret_cast<void*>(buffers[3 * i]), buffers[3 * i + 1], (use & 1) != 0, !(use & 2)});
    launch.follows |= (use & 2) != 0;
  }
  const std::string text = dsv4::sim_launch(launch);
  keep(text, error, error_bytes);
  return text.empty() ? 0 : 1;
}

extern "C" __attribute__((visibility("default"))) int dsv4_sim_encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                                                                           const uint32_t* box, const uint32_t* element_strides, int swizzle, int fill, char* error,
                                                                           size_t error_bytes) {
  const std::string text = dsv4::sim_encode_tiled(map, type, rank, address, dims, strides, box, element_strides, 0, swizzle, 0, fill);
  keep(text, error, error_bytes);
  return text.empty() ? 0 : 1;
}

// Warp instructions of the last launch of this thread.
extern "C" __attribute__((visibility("default"))) uint64_t dsv4_sim_instructions() { return dsv4::sim::last_instructions; }

// The state of the interpreter's sources, as native/CMakeLists.txt digests them.
extern "C" __attribute__((visibility("default"))) const char* dsv4_sim_sources() { return DSV4_SIM_SOURCES; }
