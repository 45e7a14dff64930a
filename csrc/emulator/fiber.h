#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TDC_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TDC_EMULATOR_ASAN 1
#endif
#endif
#ifndef TDC_EMULATOR_ASAN
#define TDC_EMULATOR_ASAN 0
#endif

namespace tdc::emulator {

// Memory for a number of stacks, each with a page below it that must not be touched.
class Stacks {
 public:
  // `bytes` of each: a multiple of the page. Memory is taken when it is touched.
  Stacks(size_t count, size_t bytes);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  unsigned char* stack(size_t i) const { return memory_ + i * stride_ + (stride_ - bytes_); }
  size_t bytes() const { return bytes_; }
  const unsigned char* begin() const { return memory_; }
  size_t size() const { return count_ * stride_; }

 private:
  size_t count_, bytes_, stride_;
  unsigned char* memory_;
};

// A call stack that can be suspended and resumed in a few nanoseconds. One CUDA thread runs on each. Every switch
// of stacks is announced to ASan.
class Fiber {
 public:
  // The stack of the code that makes this object, from which the first fiber is started.
  Fiber() = default;
  Fiber(unsigned char* stack, size_t bytes) : stack_(stack), bytes_(bytes), own_(true) {}
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which must never return. What ran on the stack before is discarded.
  void prepare(void (*entry)());

  // Leaves this fiber, which must be the running one, for `next`. Returns when a fiber switches back.
  void switch_to(Fiber& next) { change(next, false); }
  // The same, without return.
  void leave_for(Fiber& next) { change(next, true); }

 private:
  static void begin();
  void change(Fiber& next, bool for_good);

  unsigned char* stack_ = nullptr;  // lowest usable address; for a caller's own stack known only to ASan
  size_t bytes_ = 0;
  void* context_ = nullptr;  // the saved stack pointer, or a ucontext_t
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;         // ASan's
  [[maybe_unused]] bool own_ = false;  // not the stack of the code that made this object
};

}  // namespace tdc::emulator
