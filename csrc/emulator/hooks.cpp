// What -fsanitize=thread makes compiled code call.
#include <cstring>

#include "emulator/block.h"

#define TDC_HOOK extern "C" __attribute__((visibility("hidden"), noinline))
#define TDC_ACCESS(kind, address, bytes)                                                             \
  using tdc::emulator::RaceCheck;                                                                    \
  if (RaceCheck::active) {                                                                           \
    tdc::emulator::block.note(address, bytes, RaceCheck::Access::kind, __builtin_return_address(0)); \
  }
#define TDC_HOOKS(bytes)                                                                              \
  TDC_HOOK void __tsan_read##bytes(void* address){                                                    \
      TDC_ACCESS(kRead, address, bytes)} TDC_HOOK void __tsan_write##bytes(void* address){            \
      TDC_ACCESS(kWrite, address, bytes)} TDC_HOOK void __tsan_unaligned_read##bytes(void* address){  \
      TDC_ACCESS(kRead, address, bytes)} TDC_HOOK void __tsan_unaligned_write##bytes(void* address) { \
    TDC_ACCESS(kWrite, address, bytes)                                                                \
  }

TDC_HOOKS(1)
TDC_HOOKS(2)
TDC_HOOKS(4)
TDC_HOOKS(8)
TDC_HOOKS(16)
TDC_HOOK void __tsan_read_range(void* address, size_t bytes){TDC_ACCESS(kRead, address, bytes)} TDC_HOOK
    void __tsan_write_range(void* address, size_t bytes){TDC_ACCESS(kWrite, address, bytes)} TDC_HOOK
    void __tsan_init() {
  tdc::emulator::RaceCheck::enabled = true;
}
TDC_HOOK void __tsan_func_entry(void*) {}
TDC_HOOK void __tsan_func_exit() {}
TDC_HOOK void __tsan_vptr_update(void**, void*) {}
TDC_HOOK void __tsan_vptr_read(void**) {}
// Clang's.
TDC_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  {
    TDC_ACCESS(kRead, from, bytes)
  }
  {
    TDC_ACCESS(kWrite, to, bytes)
  }
  return std::memcpy(to, from, bytes);
}
TDC_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  {
    TDC_ACCESS(kRead, from, bytes)
  }
  {
    TDC_ACCESS(kWrite, to, bytes)
  }
  return std::memmove(to, from, bytes);
}
TDC_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  TDC_ACCESS(kWrite, to, bytes)
  return std::memset(to, value, bytes);
}
