"""The CUDA sources, installed as tdc_fast.cuda_sources: NVRTC compiles them where there is a GPU and no nvcc."""
