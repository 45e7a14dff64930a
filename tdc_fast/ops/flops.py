"""FLOPs of the routed operators for torch's FlopCounterMode, counted over live widths.

Two per multiply-add, as torch counts a convolution: twice n_g * OH * OW * R * S * live_in_g * live_out_g, summed over
the groups; the same for forward, dgrad and wgrad. With upsampling that is the convolution of the upsampled image, of
which a kernel may multiply less. The group norm has no formula, nor has torch's own. Widths that cannot be read (fake
tensors) count as full. Torch's fused attention counts on the CPU as it does on a GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_COUNTER = "torch.utils.flop_counter"


def _values(tensor: Tensor) -> list[int] | None:
    return None if isinstance(tensor, FakeTensor) or tensor.device.type == "meta" else tensor.tolist()


def _convolution(
    output: Sequence[int],
    weight: Tensor,
    offsets: Tensor,
    in_widths: Tensor | None,
    out_widths: Tensor | None,
) -> int:
    """FLOPs of one pass, where the forward's output has shape `output`, (B, C_out, OH, OW)."""
    _, out_channels, in_channels, *taps = weight.shape
    per_pair = 2 * math.prod(output[2:]) * math.prod(taps)  # of one sample, one input and one output channel
    groups = offsets.shape[0] - 1
    bounds = _values(offsets)
    live_in = None if in_widths is None else _values(in_widths)
    live_out = None if out_widths is None else _values(out_widths)
    if bounds is None or (live_in is None and live_out is None):
        return per_pair * output[0] * in_channels * out_channels
    live_in = live_in or [in_channels] * groups
    live_out = live_out or [out_channels] * groups
    return per_pair * sum((bounds[g + 1] - bounds[g]) * live_in[g] * live_out[g] for g in range(groups))


def _forward(
    x: Tensor, weight: Tensor, bias: Any, sample_bias: Any, residual: Any, x2: Any, offsets: Tensor, tiles: Tensor,
    weight_index: Tensor, in_widths: Tensor | None, out_widths: Tensor | None, *settings: Any, out_val: Tensor,
    **_: Any,
) -> int:  # fmt: skip
    return _convolution(out_val.shape, weight, offsets, in_widths, out_widths)


def _dgrad(
    dy: Tensor, weight: Tensor, offsets: Tensor, tiles: Tensor, weight_index: Tensor, in_widths: Tensor | None,
    out_widths: Tensor | None, *settings: Any, **_: Any,
) -> int:  # fmt: skip
    return _convolution(dy.shape, weight, offsets, in_widths, out_widths)


def _wgrad(
    dy: Tensor, x: Tensor, x2: Any, weight: Tensor, offsets: Tensor, weight_index: Tensor, in_widths: Tensor | None,
    out_widths: Tensor | None, stride: Any, padding: Any, upsample: int, mask: Sequence[bool], *settings: Any, **_: Any,
) -> int:  # fmt: skip
    return _convolution(dy.shape, weight, offsets, in_widths, out_widths) if mask[0] else 0


def _image(tokens: Sequence[int]) -> tuple[int, ...]:
    """The shape of (B, C) or (B, T, C) as of an image: (B, C) or (B, C, T)."""
    return (tokens[0], tokens[-1], *tokens[1:-1])


def _linear_forward(x: Tensor, *args: Any, out_val: Tensor, **_: Any) -> int:
    weight, _, _, offsets, _, _, in_widths, out_widths = args[:8]
    return _convolution(_image(out_val.shape), weight, offsets, in_widths, out_widths)


def _linear_dgrad(dy: Tensor, *args: Any, **_: Any) -> int:
    weight, offsets, _, _, in_widths, out_widths = args[:6]
    return _convolution(_image(dy.shape), weight, offsets, in_widths, out_widths)


def _linear_wgrad(dy: Tensor, x: Tensor, *args: Any, **_: Any) -> int:
    weight, offsets, _, in_widths, out_widths, mask = args[:6]
    return _convolution(_image(dy.shape), weight, offsets, in_widths, out_widths) if mask[0] else 0


def _register_now(counter: ModuleType) -> None:
    ops, aten = torch.ops.tdc_fast, torch.ops.aten
    formulas = {
        ops.routed_conv2d: _forward,
        ops.routed_conv2d_dgrad: _dgrad,
        ops.routed_conv2d_wgrad: _wgrad,
        ops.routed_linear: _linear_forward,
        ops.routed_linear_dgrad: _linear_dgrad,
        ops.routed_linear_wgrad: _linear_wgrad,
        aten._scaled_dot_product_flash_attention_for_cpu: counter.sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: counter.sdpa_backward_flop,
    }
    for target, formula in formulas.items():
        if target not in counter.flop_registry:
            counter.register_flop_formula(target, get_raw=True)(formula)


class _AfterImport(MetaPathFinder, Loader):
    """Registers the formulas right after the flop counter is imported for the first time.

    Importing it here would import triton, which takes longer than importing this whole package.
    """

    def __init__(self) -> None:
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register_now(module)


def register() -> None:
    """Makes FlopCounterMode count the routed operators, now or when it is first imported."""
    if _COUNTER in sys.modules:
        _register_now(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
