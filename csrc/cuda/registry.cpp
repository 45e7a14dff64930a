#include "cuda/registry.h"

namespace tdc {

#define FAMILY(family, LIST) void register_##family(KernelTable& table);
#include "cuda/families.def"
#undef FAMILY

const KernelTable& kernel_table() {
  static const KernelTable table = [] {
    KernelTable made;
#define FAMILY(family, LIST) register_##family(made);
#include "cuda/families.def"
#undef FAMILY
    return made;
  }();
  return table;
}

}  // namespace tdc
