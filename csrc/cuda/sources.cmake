# What CMakeLists.txt builds from this folder. Planning a launch is plain C++ and always built; kernels only with nvcc.
set(cuda_binding csrc/cuda/bind_cuda.cpp)
set(cuda_registry csrc/cuda/registry.cpp)
file(GLOB cuda_planners RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS csrc/cuda/*.cpp)
list(REMOVE_ITEM cuda_planners ${cuda_binding} ${cuda_registry})
list(APPEND TDC_FAST_SOURCES ${cuda_planners})
list(APPEND TDC_FAST_BINDINGS ${cuda_binding})
# One file per family of kernels, so that they compile in parallel.
file(GLOB cuda_families RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS csrc/cuda/registry_*.cu)
set(TDC_FAST_CUDA_SOURCES ${cuda_families} ${cuda_registry} csrc/cuda/launch.cu csrc/cuda/runtime.cu)
