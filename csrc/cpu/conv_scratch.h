// Reusable aligned memory of one thread.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace tdc {

// Grows on demand and keeps at most kKept bytes between uses; the content is never preserved.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  template <typename T>
  T* get(size_t count) {
    return static_cast<T*>(reserve(count * sizeof(T)));
  }

  void* reserve(size_t bytes) {
    if (bytes > size_ || (size_ > kKept && bytes <= kKept)) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      const size_t rounded = (bytes + kAlignment) / kAlignment * kAlignment;
      memory_ = std::aligned_alloc(kAlignment, rounded);
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  static constexpr size_t kAlignment = 64, kKept = size_t{8} << 20;
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tdc
