// XLA FFI handlers: buffers and attributes of a custom call -> Launch -> a machine. One pair serves every op, because
// an op's launch (kernel, grid, scalars) is static and written down where the op is: `launch` in ffi_kernels/launch.py. A custom call
// may hold several launches, which run in order (ffi_kernels/chain.py).
#include <algorithm>
#include <cstring>

#include "launch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dsv4 {
namespace {

using Ints = ffi::Span<const int64_t>;

struct Buffer {
  Memory memory;
  int64_t writer = -1;  // the last launch before the present one that writes it
};

struct Call {
  std::vector<Launch> launches;
  std::vector<std::vector<uint8_t>> params;  // of each
};

template <typename T>
bool attribute(ffi::Dictionary& attributes, const std::string& name, T& value, std::string& error) {
  auto found = attributes.get<T>(name);
  if (found.has_value()) {
    value = *found;
    return true;
  }
  error = "the custom call lacks the attribute " + name + " of the launch layer";
  return false;
}

void triple(Ints values, uint32_t (&out)[3]) {
  for (size_t i = 0; i < 3; ++i) out[i] = i < values.size() ? uint32_t(values[i]) : 1u;
}

// tensor_maps: for each map of the params struct the number of its buffer, type, swizzle, rank, 5 dims, 4 strides, 5 sizes of the box.
constexpr size_t kMapNumbers = 18;

std::string encode_maps(Ints numbers, const Launch& launch, const std::vector<Buffer>& buffers, EncodeTensorMap encode, uint8_t* params) {
  if (numbers.size() % kMapNumbers) return "the attribute tensor_maps does not have 18 numbers for each tensor map";
  for (size_t i = 0; i < numbers.size() / kMapNumbers; ++i) {
    const int64_t* at = numbers.begin() + kMapNumbers * i;
    if (at[0] < 0 || at[0] >= int64_t(buffers.size())) return "a tensor map names a buffer that the custom call lacks";
    TensorMapArguments tensor{int(at[1]), int(at[2]), uint32_t(at[3]), buffers[at[0]].memory.data, {}, {}, {}};
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

// The first launch that may still run when launch `number` starts early. A launch lets the next one start at any time, or if it is late
// after all those before it have ended, as they have in any case when one starts that does not follow.
int64_t first_running(const std::vector<Launch>& launches, int64_t number) {
  int64_t first = std::max<int64_t>(number - 1, 0);
  while (first > 0 && launches[first].follows && !launches[first].late) --first;
  return first;
}

// Launch `number` of a custom call; the names of its attributes end in its number, but for those of the first one.
// slots: for each pointer of the params struct the number of the buffer (arguments, then results), or -1 for null; the first
// `inputs` of them are only read; early: those that are read before griddepcontrol.wait. Tensor maps stand before the pointers; without
// an encoder they stay zero.
std::string decode_launch(ffi::Dictionary attributes, int64_t number, EncodeTensorMap encode, std::vector<Buffer>& buffers,
                          std::vector<Launch>& launches, std::vector<uint8_t>& params) {
  Launch& launch = launches[number];
  const std::string end = number ? "_" + std::to_string(number) : "";
  std::string error;
  std::string_view arch, module, kernel;
  Ints grid, block, cluster, maps, slots, early;
  ffi::Span<const uint8_t> scalars;
  int64_t shared_bytes = 0, inputs = 0, late = 0;
  if (!(attribute(attributes, "arch" + end, arch, error) && attribute(attributes, "module" + end, module, error) &&
        attribute(attributes, "kernel" + end, kernel, error) && attribute(attributes, "grid" + end, grid, error) &&
        attribute(attributes, "block" + end, block, error) && attribute(attributes, "cluster" + end, cluster, error) &&
        attribute(attributes, "tensor_maps" + end, maps, error) && attribute(attributes, "slots" + end, slots, error) &&
        attribute(attributes, "inputs" + end, inputs, error) && attribute(attributes, "scalars" + end, scalars, error) &&
        attribute(attributes, "early" + end, early, error) && attribute(attributes, "late" + end, late, error) &&
        attribute(attributes, "shared_bytes" + end, shared_bytes, error)))
    return error;
  launch.arch = arch;
  launch.module = module;
  launch.kernel = kernel;
  triple(grid, launch.grid);
  triple(block, launch.block);
  triple(cluster, launch.cluster);
  launch.shared_bytes = uint32_t(shared_bytes);
  launch.late = late != 0;
  launch.follows = number > 0;
  const int64_t running = first_running(launches, number);
  const size_t pointers = maps.size() / kMapNumbers * TensorMapArguments::kBytes, rest = pointers + 8 * slots.size();
  const size_t align = pointers ? TensorMapArguments::kBytes : 8;  // of the struct, which has a multiple of it
  params.resize((rest + scalars.size() + align - 1) / align * align);
  if (encode) error = encode_maps(maps, launch, buffers, encode, params.data());
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= int64_t(buffers.size())) return "a pointer slot names a buffer that the custom call lacks";
    void* pointer = nullptr;
    if (slots[i] >= 0) {
      const Buffer& buffer = buffers[slots[i]];
      launch.memory.push_back(buffer.memory);
      launch.memory.back().writable = int64_t(i) >= inputs;
      launch.memory.back().settled = buffer.writer < running;
      if (buffer.writer >= running && std::find(early.begin(), early.end(), int64_t(i)) != early.end()) launch.follows = false;
      pointer = launch.memory.back().data;
    }
    std::memcpy(&params[pointers + 8 * i], &pointer, 8);
  }
  for (const Memory& written : launch.memory)
    for (Buffer& buffer : buffers)
      if (written.writable && buffer.memory.data == written.data) buffer.writer = number;  // an argument that is updated in place, too
  if (scalars.size()) std::memcpy(&params[rest], scalars.begin(), scalars.size());
  launch.params = params.data();
  launch.params_bytes = params.size();
  return error;
}

std::string decode(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes, EncodeTensorMap encode, Call& call) {
  std::string error;
  int64_t launches = 0;
  if (!attribute(attributes, "launches", launches, error)) return error;
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return "an argument is not a buffer";
    buffers.push_back({{buffer->untyped_data(), buffer->size_bytes(), false}});
  }
  for (size_t i = 0; i < results.size(); ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return "a result is not a buffer";
    buffers.push_back({{(*buffer)->untyped_data(), (*buffer)->size_bytes(), true}});
  }
  call.launches.resize(launches);
  call.params.resize(launches);
  for (int64_t i = 0; i < launches && error.empty(); ++i) error = decode_launch(attributes, i, encode, buffers, call.launches, call.params[i]);
  return error;
}

// All launches of a custom call, in order, until one fails.
template <class Use>
ffi::Error each(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes, EncodeTensorMap encode, const Use& use) {
  Call call;
  auto error = decode(args, results, attributes, encode, call);
  for (size_t i = 0; i < call.launches.size() && error.empty(); ++i) error = use(call.launches[i]);
  return error.empty() ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, "dsv4: " + error);
}

ffi::Error initialize(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return each(args, results, attributes, nullptr, driver_prepare);
}

ffi::Error execute(void* stream, ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return each(args, results, attributes, driver_encode, [&](const Launch& launch) { return driver_launch(launch, stream); });
}

#ifdef DSV4_INTERPRETER
ffi::Error simulate(ffi::RemainingArgs args, ffi::RemainingRets results, ffi::Dictionary attributes) {
  return each(args, results, attributes, sim_encode, sim_launch);
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
