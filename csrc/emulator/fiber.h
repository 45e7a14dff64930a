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

// A call stack that can be left in the middle and taken up again, a few nanoseconds each way. One CUDA thread runs on
// each. Stacks end in a page that must not be touched, and ASan is told of every change of stack.
class Fiber {
 public:
  // The stack of whoever makes this object: what the first fiber was started from.
  Fiber() = default;
  // A stack of its own, of `bytes` bytes, a multiple of the page.
  explicit Fiber(size_t bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next switch to this fiber calls `entry`, which must never return. Whatever ran on the stack is forgotten.
  void prepare(void (*entry)());

  // Leaves this fiber, which must be the running one, for `next`. Returns when somebody switches back.
  void switch_to(Fiber& next) { change(next, false); }
  // The same, for good.
  void leave_for(Fiber& next) { change(next, true); }

 private:
  static void begin();
  void change(Fiber& next, bool for_good);

  unsigned char* stack_ = nullptr;  // lowest usable address; for a caller's own stack known only to ASan
  size_t bytes_ = 0;
  void* context_ = nullptr;  // the saved stack pointer, or a ucontext_t
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // ASan's
  bool owned_ = false;
};

}  // namespace tdc::emulator
