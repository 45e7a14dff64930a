# What CMakeLists.txt builds from this folder: kernels (once per instruction set), host code, bindings.
list(APPEND TDC_FAST_ISA_SOURCES
  csrc/cpu/conv_kernels.cpp
  csrc/cpu/group_norm_kernels.cpp
)
list(APPEND TDC_FAST_SOURCES
  csrc/cpu/conv.cpp
  csrc/cpu/conv_gather.cpp
  csrc/cpu/conv_gather_plan.cpp
  csrc/cpu/conv_geometry.cpp
  csrc/cpu/conv_panels.cpp
  csrc/cpu/conv_wgrad.cpp
  csrc/cpu/conv_wgrad_plan.cpp
  csrc/cpu/group_norm.cpp
  csrc/cpu/group_norm_backward.cpp
  csrc/cpu/group_norm_forward.cpp
  csrc/cpu/plan.cpp
)
set(TDC_FAST_BINDINGS
  csrc/cpu/bind_conv.cpp
  csrc/cpu/bind_group_norm.cpp
  csrc/cpu/bind_plan.cpp
)
