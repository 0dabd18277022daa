// The few declarations of the CUDA driver API that the launch layer needs, so that it builds without the toolkit and
// loads libcuda.so.1 at run time: one library for the CUDA 12 and 13 plugins of jax. The ABI is that of cuda.h 12.0+.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv4::cuda {

using Result = int;  // CUresult
using Device = int;
using Library = void*;
using Kernel = void*;
using Stream = void*;

constexpr Result kSuccess = 0;
constexpr int kMaxDynamicSharedBytes = 8;       // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedCarveout = 9;              // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent
constexpr int kNonPortableClusterSize = 14;     // CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
constexpr int kCapabilityMajor = 75;            // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kCapabilityMinor = 76;
constexpr int kClusterDimension = 4;            // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
constexpr int kStartsEarly = 6;                 // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char pad[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int starts_early;
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute has 72 bytes");

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Api {
  Result (*cuInit)(unsigned);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuCtxGetDevice)(Device*);
  Result (*cuDeviceGetAttribute)(int*, int, Device);
  Result (*cuLibraryLoadFromFile)(Library*, const char*, int*, void**, unsigned, int*, void**, unsigned);
  Result (*cuLibraryGetKernel)(Kernel*, Library, const char*);
  Result (*cuKernelSetAttribute)(int, int, Kernel, Device);
  Result (*cuKernelGetParamInfo)(Kernel, size_t, size_t*, size_t*);  // null before CUDA 12.4
  Result (*cuLaunchKernelEx)(const LaunchConfig*, Kernel, void**, void**);
  Result (*cuTensorMapEncodeTiled)(void* map, int type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides,
                                   const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill);
};

}  // namespace dsv4::cuda
