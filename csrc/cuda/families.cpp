#include "cuda/families.h"

#include "cuda/conv_dgrad_kernels.h"
#include "cuda/conv_forward_kernels.h"
#include "cuda/conv_wgrad_kernels.h"
#include "cuda/group_norm_kernels.h"
#include "cuda/pack_kernels.h"
#include "cuda/plan_kernels.h"

namespace tdc {

const std::map<std::string, std::vector<std::string>>& kernel_families() {
#define NAME(name, threads, Params) #name,
#define FAMILY(family, LIST) {#family, {LIST(NAME)}},
  static const std::map<std::string, std::vector<std::string>> families = {
#include "cuda/families.def"
  };
#undef FAMILY
#undef NAME
  return families;
}

}  // namespace tdc
