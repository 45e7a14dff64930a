// Which of the compiled instruction sets the kernels run on.
#pragma once

namespace tdc {

enum class CpuIsa { kPortable, kAvx2, kAvx512 };

// The best set that both this build and this processor have, or what TDC_FAST_CPU_ISA (portable | avx2 | avx512)
// names. Decided once; throws std::runtime_error when the variable names an unknown or unsupported set.
CpuIsa cpu_isa();
const char* cpu_isa_name();

}  // namespace tdc

// Calls NAME in the namespace of the chosen instruction set, e.g. TDC_ISA_CALL(conv2d_forward, problem). Each set's
// namespace is declared by including a header under TDC_ISA_DECLARE.
#if defined(TDC_FAST_X86)
#define TDC_ISA_CALL(name, ...)                                                  \
  (::tdc::cpu_isa() == ::tdc::CpuIsa::kAvx512 ? ::tdc::avx512::name(__VA_ARGS__) \
   : ::tdc::cpu_isa() == ::tdc::CpuIsa::kAvx2 ? ::tdc::avx2::name(__VA_ARGS__)   \
                                              : ::tdc::portable::name(__VA_ARGS__))
#define TDC_ISA_DECLARE(declarations) \
  namespace avx512 {                  \
  declarations                        \
  }                                   \
  namespace avx2 {                    \
  declarations                        \
  }                                   \
  namespace portable {                \
  declarations                        \
  }
#else
#define TDC_ISA_CALL(name, ...) ::tdc::portable::name(__VA_ARGS__)
#define TDC_ISA_DECLARE(declarations) \
  namespace portable {                \
  declarations                        \
  }
#endif
