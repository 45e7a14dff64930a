"""Loads the native module, `tdc_fast._native`, which a pure-Python install lacks.

`native.module` is the module, or None; `native.why_missing` then holds the reason that `explain` shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, NormProblem

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
module: Any = None
why_missing = ""
try:
    from tdc_fast import _native

    module = _native
except ImportError as error:
    why_missing = f"the native module is not there ({error}); install with TDC_FAST_BUILD=cpu to see why"


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def conv_sizes(p: ConvProblem) -> dict[str, Any]:
    """The sizes and the dtype of a convolution of one input that is not upsampled, by the names in native code."""
    return {
        "dtype": DTYPE_CODES[p.dtype],
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "filter_height": p.filter[0],
        "filter_width": p.filter[1],
        "stride_height": p.stride[0],
        "stride_width": p.stride[1],
        "pad_height": p.padding[0],
        "pad_width": p.padding[1],
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
    }


def norm_sizes(p: NormProblem) -> dict[str, Any]:
    """The sizes, the dtype and the settings of a group norm of one input, by the names in native code."""
    return {
        "dtype": DTYPE_CODES[p.dtype],
        "batch": p.batch,
        "height": p.height,
        "width": p.width,
        "channels": p.channels,
        "num_norm_groups": p.num_norm_groups,
        "eps": p.eps,
        "silu": p.silu,
        "num_groups": p.num_groups,
        "num_experts": p.num_experts,
    }


def addresses(tensors: Any) -> dict[str, int]:
    """The addresses of a named tuple's tensors, by field name."""
    return {name: 0 if t is None else t.data_ptr() for name, t in zip(tensors._fields, tensors, strict=True)}
