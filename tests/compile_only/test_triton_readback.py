"""The Triton backend launches every operator without reading a value of any tensor.

It runs on "meta" tensors, which have shapes and no memory: `.item()`, `.tolist()`, `bool(tensor)`, `nonzero`, a copy to
the host and an index by a tensor's value raise there. So grids and tiles depend on shapes alone, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormTensors
from tdc_fast.kernels.tile_table import no_tiles
from tdc_fast.ops.checks import conv_problem, norm_problem

pytest.importorskip("triton")

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.ops import triton as backend

META = torch.device("meta")


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched, on a device of this architecture."""
    names: list[str] = []
    gpu = Device(request.param, 132, 166912)
    for module in (tile_shapes, __import__("tdc_fast.kernels.conv_wgrad", fromlist=["device_of"])):
        monkeypatch.setattr(module, "device_of", lambda device: gpu)
    monkeypatch.setattr(Launch, "run", lambda launch: names.append(launch.kernel.__name__))
    return names


@contextmanager
def nothing_synchronises(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", refuse)
        for name in ("cpu", "item", "tolist", "numpy", "nonzero"):
            patch.setattr(Tensor, name, refuse)
        yield


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def integers(count: int) -> Tensor:
    return made(count, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients(
    dtype: torch.dtype, stride: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = made(16, 64, 16, 16, dtype=dtype), made(4, 64, 64, 3, 3, dtype=dtype)
    y, bias, rows = (
        made(16, 64, 16 // stride, 16 // stride, dtype=dtype),
        made(4, 64, dtype=dtype),
        made(16, 64, dtype=dtype),
    )
    offsets, index, widths, tiles = integers(5), integers(4), integers(4), no_tiles(META)
    t = ConvTensors(x, weight, offsets, tiles, index, widths, widths, bias, rows, y)

    def problem(op: str) -> ConvProblem:
        return conv_problem(op, t._replace(tiles=None), (stride, stride), (1, 1))

    with nothing_synchronises(monkeypatch):
        backend.conv2d(problem("routed_conv2d"), t)
        backend.conv2d_dgrad(problem("routed_conv2d_dgrad"), y, t)
        grads = backend.conv2d_wgrad(problem("routed_conv2d_wgrad"), y, t, (True, True, True))
        backend.conv2d_wgrad(problem("routed_conv2d_wgrad"), y, t, (False, True, False))
    assert [grad.shape for grad in grads if grad is not None] == [weight.shape, bias.shape, rows.shape]
    assert len(launched) >= 4 and {"wgrad_kernel", "bias_kernel"} <= set(launched)


def test_a_group_norm_and_its_gradients(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, affine, rows, widths = made(16, 64, 8, 8), made(4, 64), made(16, 64), integers(4)
    t = NormTensors(x, affine, affine, integers(5), integers(4), widths, rows, rows)
    with nothing_synchronises(monkeypatch):
        p = norm_problem("routed_group_norm", t, 32, 1e-5, True)
        y, mean, rstd, counters = backend.group_norm(p, t)
        for scratch in (counters, None):
            t = t._replace(counters=scratch)
            backend.group_norm_backward(p, y, mean, rstd, t, (True,) * 5 + (False,))
    assert launched == ["norm_forward_kernel", *["norm_backward_kernel"] * 2, "sum_per_expert_kernel"]


def test_reading_a_value_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_synchronises(monkeypatch), pytest.raises(AssertionError, match="waits for the device"):
        integers(3)[0].item()
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(integers(3).any())
