"""Which Triton convolutions mask the last block of channels: those whose blocks hold other values than zeros there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tdc_fast.kernels import conv_dgrad, conv_forward, conv_upsampled
from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import ConvTile

TILES = {path: ConvTile(path, 128, 64, 32, 3, 4) for path in ("tma", "pointer")}


def masks(
    path: str, op: str = "forward", *, channels: int = 64, x2: int = 0, stride: int = 1, widths: bool = True, **how: Any
) -> bool:
    """Whether the launch has a masked tail."""
    out = 8 // stride
    problem = ConvProblem(
        "routed_conv2d", torch.device("meta"), torch.bfloat16, 4, 8, 8, channels, channels, (3, 3), (stride, stride),
        (1, 1), out, out, 2, 2, x2_channels=x2,
    )  # fmt: skip
    x, y = (torch.empty(4, channels - x2 * (size == 8), size, size, device="meta") for size in (8, out))
    second = torch.empty(4, x2, 8, 8, device="meta") if x2 else None
    weight = torch.empty(2, channels, channels, 3, 3, device="meta")
    index, table = torch.empty(2, device="meta"), torch.empty(99, 3, device="meta")
    limits = index if widths else None
    t = ConvTensors(x, weight, index, table, index, limits, limits, x2=second)
    source, result = (y, x) if op == "dgrad" else (x, y)
    launch = conv_launch(op, problem, source, t, result, TILES[path], second if op == "dgrad" else None, **how)
    assert launch.arguments["FILLED"] is not launch.arguments["TAIL"] or not widths
    return bool(launch.arguments["TAIL"])


@pytest.mark.parametrize("path", TILES)
def test_widths_alone_need_no_mask_as_x_is_zero_past_them(path: str) -> None:
    assert not masks(path) and not masks(path, stride=2)
    assert not masks(path, channels=128, x2=32)
    assert not masks(path, "dgrad")  # of an upsampled image: the kernel of dgrad, on x


@pytest.mark.parametrize("path", TILES)
def test_a_gradient_may_hold_anything_past_its_widths(path: str) -> None:
    assert masks(path, "dgrad", dead_zeros=False) and masks(path, dead_zeros=False)
    assert not masks(path, "dgrad", widths=False, dead_zeros=False)


def test_blocks_past_the_last_channel_hold_zeros_in_boxes_of_x_alone() -> None:
    assert not masks("tma", channels=72) and not masks("tma", channels=136, x2=40)
    assert masks("tma", channels=72, stride=2)  # the next pixel
    assert masks("tma", "dgrad", channels=72)  # the next expert's weights
    assert masks("pointer", channels=72) and masks("pointer", channels=128, x2=40)
    assert masks("pointer", channels=72, widths=False) and not masks("tma", channels=72, widths=False)


def test_only_a_gradient_is_taken_for_a_source_that_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and dgrad, of an image and of an upsampled one, whose dgrad runs the kernel of the forward on dy."""
    told: list[bool] = []

    def launch(*_: Any, dead_zeros: bool = True, **__: Any) -> Any:
        told.append(dead_zeros)
        return SimpleNamespace(run=lambda: None)

    for module in (conv_forward, conv_dgrad, conv_upsampled):
        monkeypatch.setattr(module, "conv_launch", launch)
    monkeypatch.setattr(conv_upsampled, "_merged", lambda weight: weight)
    problem = ConvProblem(
        "routed_conv2d", torch.device("meta"), torch.bfloat16, 4, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), 16, 16, 2, 2,
        upsample=2,
    )  # fmt: skip
    x, dy = (torch.empty(4, 64, size, size, device="meta") for size in (8, 16))
    index, weight = torch.empty(2, device="meta"), torch.empty(2, 64, 64, 3, 3, device="meta")
    t = ConvTensors(x, weight, index, index, index, index, index)
    conv_forward.conv_forward(problem, t)
    conv_dgrad.conv_dgrad(problem, dy, t)
    conv_upsampled.upsampled_forward(problem, t)
    conv_upsampled.upsampled_dgrad(problem, dy, t)
    assert told == [True, False, True, False]
    known = replace(problem, dead_zeros=True)
    conv_dgrad.conv_dgrad(known, dy, t)
    conv_upsampled.upsampled_dgrad(known, dy, t)
    assert told[4:] == [True, True]
