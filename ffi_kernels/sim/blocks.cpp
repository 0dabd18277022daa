// Blocks of memory that are used again: see blocks.h.
#include "blocks.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace dsv4::sim {
namespace {

constexpr size_t kMost = size_t{128} << 20;  // bytes that wait for the next launch
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeep = false;  // so that the sanitizer sees every end of life
#else
constexpr bool kKeep = true;
#endif

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, uint8_t*> free;
  size_t bytes = 0;
};
Pool& pool() {
  static Pool* const p = new Pool;  // never destroyed: launches may end after static objects do
  return *p;
}

}  // namespace

Block::Block(size_t bytes) : bytes_((bytes + 1023) / 1024 * 1024) {
  if (!bytes_) return;
  if (kKeep) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto found = p.free.lower_bound(bytes_);
    if (found != p.free.end() && found->first <= 2 * bytes_) {
      bytes_ = found->first;
      data_ = found->second;
      p.bytes -= bytes_;
      p.free.erase(found);
      return;
    }
  }
  data_ = static_cast<uint8_t*>(std::aligned_alloc(1024, bytes_));
  if (!data_) throw std::bad_alloc();
}

Block::~Block() {
  if (!data_) return;
  if (kKeep) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + bytes_ <= kMost) {
      p.free.emplace(bytes_, data_);
      p.bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

}  // namespace dsv4::sim
