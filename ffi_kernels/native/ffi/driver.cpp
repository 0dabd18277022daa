// Launches on a GPU through the CUDA driver. Modules are loaded once per process (cuLibrary is independent of contexts),
// attributes are set once per kernel and device; after that a launch only enqueues, so that it can be captured in a graph.
// A launch that follows another of its custom call starts while that one runs (programmatic dependent launch): what the other
// writes is there once griddepcontrol.wait has returned.
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "cuda_driver.h"
#include "launch.h"

namespace dsv4 {
namespace {

using namespace cuda;

struct Loaded {
  Api api{};
  std::string error;
};

template <typename F>
bool symbol(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

Loaded load() {
  Loaded result;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    result.error = std::string("the CUDA driver could not be loaded (") + dlerror() + "); use backend('xla') on this machine";
    return result;
  }
  Api& api = result.api;
  bool complete = symbol(library, "cuInit", api.cuInit) && symbol(library, "cuGetErrorString", api.cuGetErrorString) &&
                  symbol(library, "cuCtxGetDevice", api.cuCtxGetDevice) &&
                  symbol(library, "cuDeviceGetAttribute", api.cuDeviceGetAttribute) &&
                  symbol(library, "cuLibraryLoadFromFile", api.cuLibraryLoadFromFile) &&
                  symbol(library, "cuLibraryGetKernel", api.cuLibraryGetKernel) &&
                  symbol(library, "cuKernelSetAttribute", api.cuKernelSetAttribute) &&
                  symbol(library, "cuLaunchKernelEx", api.cuLaunchKernelEx) &&
                  symbol(library, "cuTensorMapEncodeTiled", api.cuTensorMapEncodeTiled);
  symbol(library, "cuKernelGetParamInfo", api.cuKernelGetParamInfo);
  if (!complete) result.error = "the CUDA driver is older than 12.0 and lacks cuLibrary or cuLaunchKernelEx; update it";
  return result;
}

const Loaded& driver() {
  static const Loaded loaded = load();
  return loaded;
}

std::string describe(const std::string& what, Result code) {
  const char* text = nullptr;
  driver().api.cuGetErrorString(code, &text);
  return what + " failed: " + (text ? text : "unknown error") + " (" + std::to_string(code) + ")";
}

std::string describe(const Launch& launch, const std::string& what, Result code) {
  return "kernel " + launch.kernel + " (" + launch.module + ", " + launch.arch + "): " + describe(what, code);
}

std::mutex mutex;
std::map<std::pair<std::string, std::string>, Library> libraries;
std::map<std::tuple<std::string, std::string, std::string>, Kernel> kernels;
std::set<std::tuple<Kernel, Device, uint32_t, bool>> prepared;

std::string device_matches(const Launch& launch, Device device) {
  int major = 0, minor = 0;
  driver().api.cuDeviceGetAttribute(&major, kCapabilityMajor, device);
  driver().api.cuDeviceGetAttribute(&minor, kCapabilityMinor, device);
  std::string present = "sm_" + std::to_string(major) + std::to_string(minor) + "a";
  if (present == launch.arch) return "";
  return "kernel " + launch.kernel + " is for " + launch.arch + ", but the device is " + present +
         "; choose its backend, or backend('xla')";
}

// The kernel and its attributes, under the lock.
std::string resolve(const Launch& launch, Kernel& kernel) {
  const Api& api = driver().api;
  Device device = 0;
  if (Result code = api.cuCtxGetDevice(&device)) return describe(launch, "cuCtxGetDevice", code);
  auto name = std::make_tuple(launch.arch, launch.module, launch.kernel);
  auto known = kernels.find(name);
  if (known == kernels.end()) {
    if (auto error = device_matches(launch, device); !error.empty()) return error;
    Library& library = libraries[{launch.arch, launch.module}];
    if (!library) {
      std::string path = image_path(launch.arch, launch.module);
      if (path.empty())
        return "module " + launch.module + " was not compiled for " + launch.arch + "; run python -m ffi_kernels.build where nvcc is";
      if (Result code = api.cuLibraryLoadFromFile(&library, path.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0)) {
        library = nullptr;
        return describe(launch, "loading " + path, code);
      }
    }
    Kernel found = nullptr;
    if (Result code = api.cuLibraryGetKernel(&found, library, launch.kernel.c_str())) return describe(launch, "cuLibraryGetKernel", code);
    size_t offset = 0, bytes = launch.params_bytes;
    if (api.cuKernelGetParamInfo) api.cuKernelGetParamInfo(found, 0, &offset, &bytes);
    if (bytes != launch.params_bytes)
      return "kernel " + launch.kernel + " takes " + std::to_string(bytes) + " bytes of params, the op passes " +
             std::to_string(launch.params_bytes) + ": its Python and its CUDA source disagree";
    known = kernels.emplace(name, found).first;
  }
  kernel = known->second;
  bool wide = launch.cluster[0] * launch.cluster[1] * launch.cluster[2] > 8;
  auto setting = std::make_tuple(kernel, device, launch.shared_bytes, wide);
  if (prepared.count(setting)) return "";
  // 227 KB may be asked for; the attribute only ever grows, because launches of other sizes share the kernel
  uint32_t shared = launch.shared_bytes;
  for (const auto& done : prepared)
    if (std::get<0>(done) == kernel && std::get<1>(done) == device) shared = std::max(shared, std::get<2>(done));
  if (Result code = api.cuKernelSetAttribute(kMaxDynamicSharedBytes, int(shared), kernel, device))
    return describe(launch, "asking for " + std::to_string(shared) + " bytes of shared memory", code);
  // Kernels of one custom call stand on a multiprocessor together, which they can only with the same division of its memory.
  if (Result code = api.cuKernelSetAttribute(kSharedCarveout, 100, kernel, device)) return describe(launch, "asking for shared memory before L1", code);
  if (wide)
    if (Result code = api.cuKernelSetAttribute(kNonPortableClusterSize, 1, kernel, device))
      return describe(launch, "asking for a cluster of more than 8", code);
  prepared.insert(setting);
  return "";
}

}  // namespace

std::string driver_prepare(const Launch& launch) {
  if (!driver().error.empty()) return driver().error;
  std::lock_guard<std::mutex> lock(mutex);
  Kernel kernel;
  return resolve(launch, kernel);
}

// On the host alone, from the addresses of this launch: XLA calls the handler again when a graph's buffers have moved.
std::string driver_encode(const TensorMapArguments& t, void* map) {
  if (!driver().error.empty()) return driver().error;
  if (Result code = driver().api.cuTensorMapEncodeTiled(map, t.type, t.rank, t.address, t.dims, t.strides, t.box, t.kElementStrides,
                                                        t.kInterleave, t.swizzle, t.kPromotion, t.kFill))
    return describe("cuTensorMapEncodeTiled", code);
  return "";
}

std::string driver_launch(const Launch& launch, void* stream) {
  if (!driver().error.empty()) return driver().error;
  Kernel kernel;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto error = resolve(launch, kernel); !error.empty()) return error;
  }
  LaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (launch.cluster[0] * launch.cluster[1] * launch.cluster[2] > 1) {
    attributes[count].id = kClusterDimension;
    attributes[count++].value.cluster = {launch.cluster[0], launch.cluster[1], launch.cluster[2]};
  }
  if (launch.follows) {
    attributes[count].id = kStartsEarly;
    attributes[count++].value.starts_early = 1;
  }
  LaunchConfig config{{launch.grid[0], launch.grid[1], launch.grid[2]},
                      {launch.block[0], launch.block[1], launch.block[2]},
                      launch.shared_bytes,
                      stream,
                      attributes,
                      count};
  void* params[] = {const_cast<uint8_t*>(launch.params)};
  if (Result code = driver().api.cuLaunchKernelEx(&config, kernel, params, nullptr)) return describe(launch, "the launch", code);
  return "";
}

}  // namespace dsv4
