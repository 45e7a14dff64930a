#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// A switch saves only the registers that a callee must preserve. On other processors (or with -DTDC_EMULATOR_UCONTEXT)
// ucontext does it, with a system call per switch.
#if !defined(TDC_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define TDC_EMULATOR_UCONTEXT
#endif
#ifdef TDC_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#if TDC_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef TDC_EMULATOR_UCONTEXT
// Stores the stack pointer at *from and continues where the stack pointer `to` was stored.
extern "C" __attribute__((visibility("hidden"))) void tdc_emulator_switch(void** from, void* to);
#ifdef __x86_64__
asm(R"(
.text
.hidden tdc_emulator_switch
.globl tdc_emulator_switch
.type tdc_emulator_switch, @function
tdc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tdc_emulator_switch, .-tdc_emulator_switch
)");
constexpr int kReturnAddress = 6;  // its word
constexpr int kFrameWords = 8;     // with a zero return address of the entry, which also aligns the stack
#else
asm(R"(
.text
.hidden tdc_emulator_switch
.globl tdc_emulator_switch
.type tdc_emulator_switch, %function
tdc_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tdc_emulator_switch, .-tdc_emulator_switch
)");
constexpr int kReturnAddress = 11;  // x30
constexpr int kFrameWords = 20;
#endif
#endif

namespace tdc::emulator {
namespace {

Fiber* arriving = nullptr;  // set before every switch, for the first function on a new stack
Fiber* leaving = nullptr;

}  // namespace

Stacks::Stacks(size_t count, size_t bytes) : count_(count), bytes_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  stride_ = bytes + page;
  void* memory = mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < count; ++i) {
    if (mprotect(stack(i) - page, page, PROT_NONE) == 0) continue;
    munmap(memory_, size());
    throw std::bad_alloc();
  }
}

Stacks::~Stacks() {
#if TDC_EMULATOR_ASAN
  __asan_unpoison_memory_region(memory_, size());  // for what the system puts at this address next
#endif
  munmap(memory_, size());
}

Fiber::~Fiber() {
#ifdef TDC_EMULATOR_UCONTEXT
  delete static_cast<ucontext_t*>(context_);
#endif
}

void Fiber::prepare(void (*entry)()) {
  entry_ = entry;
  fake_stack_ = nullptr;
#if TDC_EMULATOR_ASAN
  __asan_unpoison_memory_region(stack_, bytes_);  // abandoned frames have poisoned parts of it
#endif
#ifdef TDC_EMULATOR_UCONTEXT
  if (context_ == nullptr) context_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = bytes_;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::begin, 0);
#else
  auto* frame = reinterpret_cast<uintptr_t*>(stack_ + bytes_) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = 0;
  frame[kReturnAddress] = reinterpret_cast<uintptr_t>(&Fiber::begin);
  context_ = frame;
#endif
}

void Fiber::begin() {
#if TDC_EMULATOR_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!leaving->own_) {
    leaving->stack_ = static_cast<unsigned char*>(const_cast<void*>(bottom));
    leaving->bytes_ = bytes;
  }
#endif
  arriving->entry_();
}

void Fiber::change(Fiber& next, [[maybe_unused]] bool for_good) {
  leaving = this;
  arriving = &next;
#if TDC_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, next.stack_, next.bytes_);
#endif
#ifdef TDC_EMULATOR_UCONTEXT
  if (context_ == nullptr) context_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(next.context_));
#else
  tdc_emulator_switch(&context_, next.context_);
#endif
#if TDC_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace tdc::emulator
