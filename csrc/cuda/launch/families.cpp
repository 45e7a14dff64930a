#include "cuda/launch/families.h"

#include "cuda/conv/few_kernels.h"
#include "cuda/conv/hopper_kernels.h"
#include "cuda/conv/kernels.h"
#include "cuda/group_norm/kernels.h"
#include "cuda/pack/kernels.h"
#include "cuda/plan/kernels.h"

namespace tdc {

const std::map<std::string, std::vector<std::string>>& kernel_families() {
#define NAME(name, ...) #name,
#define FAMILY(family, ...) {#family, {TDC_KERNELS_##family(NAME)}},
  static const std::map<std::string, std::vector<std::string>> families = {
#include "cuda/families.def"
  };
#undef FAMILY
#undef NAME
  return families;
}

}  // namespace tdc
