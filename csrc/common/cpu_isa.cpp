#include "common/cpu_isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tdc {
namespace {

bool supported(CpuIsa isa) {
#if defined(TDC_FAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case CpuIsa::kPortable:
      return true;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == CpuIsa::kPortable;
#endif
}

const char* name(CpuIsa isa) { return isa == CpuIsa::kAvx512 ? "avx512" : isa == CpuIsa::kAvx2 ? "avx2" : "portable"; }

CpuIsa choose() {
  const CpuIsa best_first[] = {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kPortable};
  const char* wanted = std::getenv("TDC_FAST_CPU_ISA");
  for (CpuIsa isa : best_first) {
    if (wanted && *wanted) {
      if (wanted != std::string(name(isa))) continue;
      if (supported(isa)) return isa;
      throw std::runtime_error(std::string("TDC_FAST_CPU_ISA: got '") + wanted +
                               "', which this processor or build lacks; expected a set that it has, or unset");
    }
    if (supported(isa)) return isa;
  }
  throw std::runtime_error(std::string("TDC_FAST_CPU_ISA: got '") + wanted +
                           "'; expected 'portable', 'avx2' or 'avx512'");
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

const char* cpu_isa_name() { return name(cpu_isa()); }

}  // namespace tdc
