# What CMakeLists.txt builds from this folder: kernels (once per instruction set), host code, bindings.
list(APPEND TDC_FAST_ISA_SOURCES)
list(APPEND TDC_FAST_SOURCES)
set(TDC_FAST_BINDINGS)
