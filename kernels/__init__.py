"""Triton kernels, one file per kernel family; installed as `tdc_fast.kernels`."""
