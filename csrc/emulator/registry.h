#pragma once

#include "emulator/block.h"

namespace tdc::emulator {

// Makes a kernel known by its name before main; TDC_KERNEL defines one.
struct Registration {
  explicit Registration(const Kernel& kernel);
};

// Whether a bug is planted at run time, see TDC_PLANTED.
bool is_planted(const char* name);

}  // namespace tdc::emulator
