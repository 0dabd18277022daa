// sim_launch: validates a launch as the driver would, lays out memory, runs the grid, turns errors into sentences.
#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace dsv4 {
namespace sim {

thread_local uint64_t last_instructions = 0;

namespace {

Options options_of(const char* text) {  // DSV4_SIM="schedule=random seed=7 limit=1000000 checks=off"
  Options o;
  std::string s = text ? text : "";
  std::replace(s.begin(), s.end(), ',', ' ');
  size_t at = 0;
  while (at < s.size()) {
    const size_t end = std::min(s.find(' ', at), s.size());
    const std::string word = s.substr(at, end - at);
    at = end + 1;
    if (word.empty()) continue;
    const size_t equal = word.find('=');
    const std::string key = word.substr(0, equal), value = equal == std::string::npos ? "" : word.substr(equal + 1);
    if (key == "schedule" && value == "eager") o.schedule = Options::eager;
    else if (key == "schedule" && value == "lazy") o.schedule = Options::lazy;
    else if (key == "schedule" && value == "random") o.schedule = Options::random;
    else if (key == "seed" && !value.empty()) o.seed = std::strtoull(value.c_str(), nullptr, 10);
    else if (key == "limit" && !value.empty()) o.limit = std::strtoull(value.c_str(), nullptr, 10);
    else if (key == "checks" && (value == "on" || value == "off")) o.checks = value == "on";
    else if (key == "strict" && (value == "on" || value == "off")) o.strict = value == "on";
    else if (key == "statistics" && (value == "on" || value == "off")) o.statistics = value == "on";
    else fail("DSV4_SIM holds '%s'; known are schedule=eager|lazy|random, seed=N, limit=N, checks=on|off, strict=on|off, statistics=on|off", word.c_str());
  }
  return o;
}

struct DefaultArithmetic {  // XLA's threads flush subnormals; kernels do not
  std::fenv_t before;
  DefaultArithmetic() { std::fegetenv(&before); std::fesetenv(FE_DFL_ENV); }
  ~DefaultArithmetic() { std::fesetenv(&before); }
};
}  // namespace

void Machine::prepare() {
  const char* axis[] = {"x", "y", "z"};
  const uint64_t block_limit[] = {1024, 1024, 64}, grid_limit[] = {0x7FFFFFFF, 65535, 65535};
  uint64_t threads = 1, ctas = 1, cluster = 1;
  for (int i = 0; i < 3; ++i) {
    const uint32_t b = launch.block[i], g = launch.grid[i], c = std::max(1u, launch.cluster[i]);
    if (b < 1 || b > block_limit[i]) fail("block.%s is %u; it must lie in 1..%llu", axis[i], b, (unsigned long long)block_limit[i]);
    if (g < 1 || g > grid_limit[i]) fail("grid.%s is %u; it must lie in 1..%llu", axis[i], g, (unsigned long long)grid_limit[i]);
    if (c > 16) fail("cluster.%s is %u; a cluster has at most 16 CTAs", axis[i], c);
    if (g % c) fail("grid.%s is %u, which is not a multiple of cluster.%s = %u", axis[i], g, axis[i], c);
    if (kernel.max_threads[i] == 0 && kernel.required_threads[i] && b != kernel.required_threads[i]) {
      fail("block.%s is %u; the kernel requires %u (.reqntid)", axis[i], b, kernel.required_threads[i]);
    }
    if (kernel.required_cluster[i] && c != kernel.required_cluster[i]) {
      fail("cluster.%s is %u; the kernel requires %u (__cluster_dims__)", axis[i], c, kernel.required_cluster[i]);
    }
    cluster_dims[i] = c;
    clusters[i] = g / c;
    threads *= b;
    ctas *= g;
    cluster *= c;
    if (ctas > (uint64_t{1} << 32)) fail("the grid has more than 2^32 CTAs");
  }
  if (threads > 1024) fail("a block of %llu threads; the limit is 1024", (unsigned long long)threads);
  if (cluster > 16) fail("a cluster of %llu CTAs; the limit is 16", (unsigned long long)cluster);
  if (kernel.max_threads[0]) {
    const uint64_t most = uint64_t{kernel.max_threads[0]} * std::max(1u, kernel.max_threads[1]) * std::max(1u, kernel.max_threads[2]);
    if (threads > most) fail("a block of %llu threads; the kernel was compiled for at most %llu (__launch_bounds__)", (unsigned long long)threads, (unsigned long long)most);
  }
  if (ctas * ((threads + 31) / 32) > (uint64_t{1} << 24)) {
    fail("a grid of %llu CTAs of %llu threads is too large to interpret; use a smaller shape (at most 2^24 warps)", (unsigned long long)ctas, (unsigned long long)threads);
  }
  total_clusters = ctas / cluster;
  uint64_t bytes = 0;
  for (const Variable& v : kernel.params) bytes = std::max(bytes, v.offset + v.size);
  if (launch.params_bytes != bytes) fail("the launch gives %zu bytes of parameters; the kernel declares %llu", launch.params_bytes, (unsigned long long)bytes);
  if (bytes && !launch.params) fail("the launch has no parameters; the kernel declares %llu bytes", (unsigned long long)bytes);
  uint64_t align = 16;
  for (const Variable& v : module.variables) if (v.dynamic) align = std::max(align, v.align);
  const uint64_t fixed = kernel.shared_base + kernel.shared_bytes;
  static_shared = static_cast<uint32_t>(fixed);
  dynamic_offset = static_cast<uint32_t>((fixed + kSharedBase + align - 1) / align * align - kSharedBase);
  const uint64_t total = launch.shared_bytes ? uint64_t{dynamic_offset} + launch.shared_bytes : fixed;
  if (fixed > 48 * 1024) fail("the kernel declares %llu bytes of static shared memory; the limit is 49152", (unsigned long long)fixed);
  if (total > 232448) fail("%u bytes of dynamic and %llu of static shared memory; a CTA has at most 232448 together", launch.shared_bytes, (unsigned long long)fixed);
  shared_bytes = static_cast<uint32_t>(total);
  for (const Memory& b : launch.memory) {
    if (!b.bytes) continue;
    const uint64_t low = reinterpret_cast<uint64_t>(b.data);
    if (!low) fail("a buffer of %zu bytes has no address", b.bytes);
    regions.push_back({low, low + b.bytes, b.writable, b.settled});
  }
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.low != b.low ? a.low < b.low : a.high < b.high; });
  std::vector<Region> merged;  // the same or overlapping buffers (aliases): writable where one of them is
  for (const Region& r : regions) {
    if (!merged.empty() && r.low < merged.back().high) {
      merged.back().high = std::max(merged.back().high, r.high);
      merged.back().writable |= r.writable;
      merged.back().settled &= r.settled;
    } else merged.push_back(r);
  }
  regions = merged;
}

}  // namespace sim

std::string sim_launch(const Launch& launch) {
  using namespace sim;
  const DefaultArithmetic arithmetic;
  try {
    const std::string path = image_path(launch.arch, launch.module);
    if (path.empty()) fail("There is no PTX of module '%s' for %s; build the native library with nvcc at hand.", launch.module.c_str(), launch.arch.c_str());
    const auto module = load_module(path);
    const auto it = module->functions.find(launch.kernel);
    if (it == module->functions.end() || !it->second->entry) fail("Module '%s' (%s) has no kernel '%s'.", launch.module.c_str(), path.c_str(), launch.kernel.c_str());
    const Function& kernel = *it->second;
    if (!kernel.error.empty()) fail("Kernel %s cannot be interpreted: %s", launch.kernel.c_str(), kernel.error.c_str());
    Machine machine(launch, *module, kernel, options_of(std::getenv("DSV4_SIM")));
    const struct Count {
      const Machine& of;
      ~Count() { last_instructions = of.instructions; }
    } count{machine};
    try {
      machine.prepare();
    } catch (const Error& e) {
      fail("Kernel %s cannot be launched: %s.", launch.kernel.c_str(), e.text.c_str());
    }
    machine.run();
    if (machine.options.statistics) std::fprintf(stderr, "dsv4 sim: %s: %llu warp instructions\n", launch.kernel.c_str(), (unsigned long long)machine.instructions);
    return "";
  } catch (const Error& e) {
    return e.text;
  } catch (const std::bad_alloc&) {
    return "Kernel " + launch.kernel + ": the interpreter is out of host memory.";
  } catch (const std::exception& e) {
    return "Kernel " + launch.kernel + ": the interpreter failed: " + e.what() + ".";
  }
}

}  // namespace dsv4
