"""A remembered launch passes the same arguments to the driver as Triton's own launch.

A stand-in for Triton's driver records the launches; kernels are compiled for sm_90 and run nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.stand_in_gpu import StandInDriver, stand_in_gpu
from tdc_fast import RoutingPlan
from tdc_fast.kernels import launch
from tdc_fast.kernels.bias_sums import bias_launches
from tdc_fast.kernels.problems import ConvTensors, NormTensors
from tdc_fast.kernels.tile_table import no_tiles, tiles_of
from tdc_fast.ops import triton as backend
from tdc_fast.ops.checks import conv_problem, norm_problem


def calls() -> dict[str, Callable[[], Any]]:
    """Calls of the Triton backend: the operators of one layer of a residual block."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    plan = RoutingPlan.from_groups(torch.arange(64) * 8 // 64, 8)
    tiles = tiles_of(plan.tiles, plan.offsets, 64)
    x = made(64, 128, 16, 16).to(memory_format=torch.channels_last)
    weight = made(8, 128, 3, 3, 128).permute(0, 1, 4, 2, 3)
    bias, scale, shift = made(8, 128), made(64, 128), made(64, 128)
    t = ConvTensors(x, weight, plan.offsets, plan.tiles, plan.weight_index, bias=bias, residual=x)

    def conv(op: str) -> Any:
        return conv_problem(op, t, (1, 1), (1, 1))

    forward, dgrad, wgrad = (conv(f"routed_conv2d{suffix}") for suffix in ("", "_dgrad", "_wgrad"))
    half = torch.full((8,), 128 // 2, dtype=torch.int32)
    t = t._replace(tiles=tiles)
    pruned = t._replace(in_widths=half, out_widths=half)
    n = NormTensors(x, bias, bias, plan.offsets, plan.weight_index, scale=scale, shift=shift)
    norm = norm_problem("routed_group_norm", n, 32, 1e-5, True)
    _, mean, rstd, counters = backend.group_norm(norm, n)
    n = n._replace(counters=counters)
    return {
        "conv forward": lambda: backend.conv2d(forward, t),
        "conv forward, widths": lambda: backend.conv2d(forward, pruned),
        "conv dgrad": lambda: backend.conv2d_dgrad(dgrad, x, t),
        "conv wgrad + bias": lambda: backend.conv2d_wgrad(wgrad, x, t, (True, True, False)),
        "conv wgrad, widths": lambda: backend.conv2d_wgrad(wgrad, x, pruned, (True, False, False)),
        "norm forward": lambda: backend.group_norm(norm, n),
        "norm backward": lambda: backend.group_norm_backward(norm, x, mean, rstd, n, (True,) * 5 + (False,)),
    }


@pytest.fixture(scope="module")
def driver() -> Iterator[StandInDriver]:
    with stand_in_gpu(records=True) as stand_in:
        yield stand_in


def described(argument: Any) -> Any:
    """A comparable form of an argument. Results are new tensors on every call, so only layouts are compared."""
    if isinstance(argument, Tensor):
        return "tensor", argument.shape, argument.stride(), argument.dtype
    if hasattr(argument, "block_shape"):
        return "descriptor", argument.base.data_ptr(), argument.shape, argument.strides, argument.block_shape
    return argument


@pytest.mark.parametrize(
    "operator",
    [
        *("conv forward", "conv forward, widths", "conv dgrad", "conv wgrad + bias", "conv wgrad, widths"),
        *("norm forward", "norm backward"),
    ],
)
def test_a_remembered_launch_passes_what_triton_would(driver: StandInDriver, operator: str) -> None:
    call = calls()[operator]
    launch._compiled.clear()
    driver.launched.clear()
    call()
    through_triton = [(grid, [described(a) for a in arguments]) for grid, arguments in driver.launched]
    remembered = len(launch._compiled)
    driver.launched.clear()
    call()
    assert len(launch._compiled) == remembered == len(through_triton) > 0
    assert [(grid, [described(a) for a in arguments]) for grid, arguments in driver.launched] == through_triton


def sums_of(dy: Tensor, dbias: Tensor | None, dsample_bias: Tensor | None) -> launch.Launch:
    """The first launch of the sums of dy (2, C, H, W) for two experts."""
    offsets, index = torch.tensor([0, 1, 2], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    x, weight = dy.new_empty(dy.shape[0], 8, *dy.shape[2:]), dy.new_empty(2, dy.shape[1], 8, 1, 1)
    t = ConvTensors(x, weight, offsets, no_tiles(dy.device), index)
    problem = conv_problem("routed_conv2d_wgrad", t, (1, 1), (0, 0), dy=dy)
    return bias_launches(problem, dy, t, dbias, dsample_bias)[0]


def test_launches_that_triton_specialises_differently_are_kept_apart(driver: StandInDriver) -> None:
    memory = torch.zeros(2 * 8 * 4 * 4 + 8, dtype=torch.bfloat16)
    memory = memory[(-memory.data_ptr() % 16) // 2 :]
    aligned = memory[: 2 * 8 * 16].view(2, 8, 4, 4)
    odd = memory[1 : 1 + 2 * 8 * 16].view(2, 8, 4, 4)  # not at a multiple of 16 bytes
    total = torch.empty(2, 8)
    launch._compiled.clear()
    launches = [
        (aligned, total, None),
        (odd, total, None),  # alignment
        (aligned, None, torch.empty(2, 8, dtype=torch.bfloat16)),  # which arguments are given
        (aligned.float(), total, None),  # dtype
        (aligned[:, :, :2], total, None),  # shape
    ]
    for dy, *biases in launches:
        sums_of(dy, *biases).run()
    assert len(launch._compiled) == len(launches)
    compiled = {id(kernel) for kernel, _ in launch._compiled.values()}
    assert len(compiled) == 4  # other sizes need no other machine code: the last launch shares the first one's
    driver.launched.clear()
    for dy, *biases in launches:
        sums_of(dy, *biases).run()
    assert len(launch._compiled) == len(launches) == len(driver.launched)
    assert [arguments[0].data_ptr() for _, arguments in driver.launched] == [dy.data_ptr() for dy, *_ in launches]


def test_an_empty_grid_starts_nothing(driver: StandInDriver) -> None:
    launched = sums_of(torch.empty(2, 8, 4, 4, dtype=torch.bfloat16), torch.empty(2, 8), None)
    driver.launched.clear()
    launch.Launch(launched.kernel, (0, 1), launched.tensors, launched.constants, launched.options, "empty").run()
    assert driver.launched == []


def test_the_number_of_remembered_launches_is_limited(driver: StandInDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_LIMIT", 2)
    launch._compiled.clear()
    for size in (1, 2, 3, 4, 5):
        sums_of(torch.empty(2, 8, size, size, dtype=torch.bfloat16), torch.empty(2, 8), None).run()
        assert 1 <= len(launch._compiled) <= 2
