#include "cuda/launch/registry.h"

#include "cuda/conv/few_kernels.h"
#include "cuda/conv/hopper_kernels.h"
#include "cuda/conv/kernels.h"
#include "cuda/group_norm/kernels.h"
#include "cuda/pack/kernels.h"
#include "cuda/plan/kernels.h"

// Each kernel is defined in the object file of its family, where nvcc makes the function of this name that is its
// handle.
#define DECLARE(name, Params, ...) extern "C" void name(Params p);
#define FAMILY(family, ...) TDC_KERNELS_##family(DECLARE)
#include "cuda/families.def"
#undef FAMILY
#undef DECLARE

namespace tdc {

const KernelTable& kernel_table() {
#define ENTRY(name, ...) {#name, reinterpret_cast<const void*>(&name)},
#define FAMILY(family, ...) TDC_KERNELS_##family(ENTRY)
  static const KernelTable table = {
#include "cuda/families.def"
  };
#undef FAMILY
#undef ENTRY
  return table;
}

}  // namespace tdc
