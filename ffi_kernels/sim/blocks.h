// Large blocks of host memory: registers, shared memory, the cells of hazard checks. They outlive the launch that used
// them, because mapping fresh pages for every CTA costs more than most kernels of a test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace dsv4::sim {

class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);  // aligned to 1024; what it holds is undefined
  ~Block();
  Block(Block&& o) noexcept : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Block& operator=(Block&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    return *this;
  }
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace dsv4::sim
