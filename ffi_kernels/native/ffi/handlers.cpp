// XLA FFI handlers: buffers and attributes of a custom call -> Launch -> a machine. One pair serves every op, because
// an op's launch (kernel, grid, scalars) is static and written down where the op is: `launch` in ffi_kernels/launch.py.
#include <algorithm>
#include <cstring>

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dsv4 {
namespace {

using Ints = ffi::Span<const int64_t>;

struct Call {
  Launch launch;
  std::vector<uint8_t> params;
};

template <typename T>
bool attribute(ffi::Dictionary& attributes, const char* name, T& value, std::string& error) {
  auto found = attributes.get<T>(name);
  if (found.has_value()) {
    value = *found;
    return true;
  }
  error = std::string("the custom call lacks the attribute ") + name + " of the launch layer";
  return false;
}

void triple(Ints values, uint32_t (&out)[3]) {
  for (size_t i = 0; i < 3; ++i) out[i] = i < values.size() ? uint32_t(values[i]) : 1u;
}

// tensor_maps: for each map of the params struct the number of its buffer, type, swizzle, rank, 5 dims, 4 strides, 5 sizes of the box.
constexpr size_t kMapNumbers = 18;

std::string encode_maps(Ints numbers, const Launch& launch, EncodeTensorMap encode, uint8_t* params) {
  if (numbers.size() % kMapNumbers) return "the attribute tensor_maps does not have 18 numbers for each tensor map";
  for (size_t i = 0; i < numbers.size() / kMapNumbers; ++i) {
    const int64_t* at = numbers.begin() + kMapNumbers * i;
    if (at[0] < 0 || at[0] >= int64_t(launch.memory.size())) return "a tensor map names a buffer that the custom call lacks";
    TensorMapArguments tensor{int(at[1]), int(at[2]), uint32_t(at[3]), launch.memory[at[0]].data, {}, {}, {}};
    std::copy_n(at + 4, 5, tensor.dims);
    std::copy_n(at + 9, 4, tensor.strides);
    std::copy_n(at + 13, 5, tensor.box);
    alignas(TensorMapArguments::kAlign) uint8_t map[TensorMapArguments::kBytes];
    if (auto error = encode(tensor, map); !error.empty())
      return "kernel " + launch.kernel + ", tensor map " + std::to_string(i) + ": " + error;
    std::memcpy(params + TensorMapArguments::kBytes * i, map, sizeof map);
  }
  return "";
}

// slots: for each pointer of the params struct the number of the buffer (arguments, then results), or -1 for null. Tensor maps
// stand before the pointers; without an encoder they stay zero.
std::string decode(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes, EncodeTensorMap encode, Call& call) {
  std::string error;
  std::string_view arch, module, kernel;
  Ints grid, block, cluster, maps, slots;
  ffi::Span<const uint8_t> scalars;
  int64_t shared_bytes = 0;
  if (!(attribute(attributes, "arch", arch, error) && attribute(attributes, "module", module, error) &&
        attribute(attributes, "kernel", kernel, error) && attribute(attributes, "grid", grid, error) &&
        attribute(attributes, "block", block, error) && attribute(attributes, "cluster", cluster, error) &&
        attribute(attributes, "tensor_maps", maps, error) && attribute(attributes, "slots", slots, error) &&
        attribute(attributes, "scalars", scalars, error) &&
        attribute(attributes, "shared_bytes", shared_bytes, error)))
    return error;
  Launch& launch = call.launch;
  launch.arch = arch;
  launch.module = module;
  launch.kernel = kernel;
  triple(grid, launch.grid);
  triple(block, launch.block);
  triple(cluster, launch.cluster);
  launch.shared_bytes = uint32_t(shared_bytes);
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return "an argument is not a buffer";
    launch.memory.push_back({buffer->untyped_data(), buffer->size_bytes(), false});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return "a result is not a buffer";
    launch.memory.push_back({(*buffer)->untyped_data(), (*buffer)->size_bytes(), true});
  }
  const size_t pointers = maps.size() / kMapNumbers * TensorMapArguments::kBytes, rest = pointers + 8 * slots.size();
  const size_t align = pointers ? TensorMapArguments::kBytes : 8;  // of the struct, which has a multiple of it
  call.params.resize((rest + scalars.size() + align - 1) / align * align);
  if (encode) error = encode_maps(maps, launch, encode, call.params.data());
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= int64_t(launch.memory.size())) return "a pointer slot names a buffer that the custom call lacks";
    void* pointer = slots[i] < 0 ? nullptr : launch.memory[slots[i]].data;
    std::memcpy(&call.params[pointers + 8 * i], &pointer, 8);
  }
  if (scalars.size()) std::memcpy(&call.params[rest], scalars.begin(), scalars.size());
  launch.params = call.params.data();
  launch.params_bytes = call.params.size();
  return error;
}

ffi::Error report(const std::string& error) {
  return error.empty() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, "dsv4: " + error);
}

ffi::Error initialize(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  Call call;
  auto error = decode(args, results, attributes, nullptr, call);
  return report(error.empty() ? driver_prepare(call.launch) : error);
}

ffi::Error execute(void* stream, ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  Call call;
  auto error = decode(args, results, attributes, driver_encode, call);
  return report(error.empty() ? driver_launch(call.launch, stream) : error);
}

#ifdef DSV4_INTERPRETER
ffi::Error simulate(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  Call call;
  auto error = decode(args, results, attributes, sim_encode, call);
  return report(error.empty() ? sim_launch(call.launch) : error);
}
#endif

}  // namespace
}  // namespace dsv4

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_initialize, dsv4::initialize,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets().Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_execute, dsv4::execute,
                              ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().RemainingArgs().RemainingRets().Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});
#ifdef DSV4_INTERPRETER
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_simulate, dsv4::simulate, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
#endif

extern "C" void dsv4_add_image(const char* arch, const char* module, const char* path) { dsv4::add_image(arch, module, path); }
