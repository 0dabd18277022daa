// Where the compiled kernels lie: (arch, module) -> file. Filled by Python when it loads the library.
#include <map>
#include <mutex>

#include "launch.h"

namespace dsv4 {
namespace {
std::mutex mutex;
std::map<std::pair<std::string, std::string>, std::string>& images() {
  static std::map<std::pair<std::string, std::string>, std::string> map;
  return map;
}
}  // namespace

void add_image(const std::string& arch, const std::string& module, const std::string& path) {
  std::lock_guard<std::mutex> lock(mutex);
  images()[{arch, module}] = path;
}

std::string image_path(const std::string& arch, const std::string& module) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = images().find({arch, module});
  return found == images().end() ? "" : found->second;
}

}  // namespace dsv4
