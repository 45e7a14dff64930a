"""Every tile that a Triton convolution may choose, run by name on a GPU: none is trusted for having compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_table import tiles_of
from tdc_fast.ops import reference
from tdc_fast.ops.checks import conv_problem
from tdc_fast.ops.layout import channel_innermost, nhwc
from tests.cases import ConvCase, Routing
from tests.gpu.problems import gradients, moved, on_device, plan_on, settings_on, upstream
from tests.gpu.shapes import CONV_CASES, CONV_FORMS, conv
from tests.tolerance import assert_as_accurate_as_torch

OPS = {"forward": "y", "dgrad": "dx", "wgrad": "dweight"}
RAGGED = {
    "ragged widths": conv(  # that end within a K-step and within a tile, in its first half and in its second
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None), (192, 128), (12, 12),
        in_widths=(192, 100, 24, 136), out_widths=(128, 56, 0, 104),
    ),
    "ragged widths, stride 2": conv(
        Routing((0, 1, 1, 2), 3, 3, None), (136, 128), (16, 16), stride=(2, 2),
        in_widths=(136, 64, 40), out_widths=(120, 64, 8),
    ),
}  # fmt: skip
CASES = {name: CONV_CASES[name] for name in CONV_FORMS if name != "odd channels"} | RAGGED
Runs = Iterator[tuple[str, Callable[[], Tensor]]]


class Prepared:
    """A case's tensors as the kernels take them."""

    def __init__(self, case: ConvCase, op: str, device: str) -> None:
        self.case, self.device = case, device
        tensors = {k: v.detach().to(device) for k, v in case.tensors(torch.bfloat16).items()}
        self.plan = plan_on(case.routing, device)
        settings = settings_on(case, device)
        self.widths = settings["in_widths"], settings["out_widths"]
        self.x, self.weight = nhwc(tensors["x"]), channel_innermost(tensors["weight"])
        self.extras = tensors.get("bias"), tensors.get("sample_bias"), tensors.get("residual")
        residual = self.extras[2]
        self.extras = (*self.extras[:2], None if residual is None else nhwc(residual))
        shape = torch.Size((case.routing.batch, case.out_channels, *case.out_size))
        self.dy = nhwc(upstream(case, shape, torch.bfloat16).to(device))
        self.tiles = tiles_of(self.plan.tiles, self.plan.offsets, case.routing.batch)
        name = "routed_conv2d" if op == "forward" else f"routed_conv2d_{op}"
        routing = (self.plan.offsets, self.plan.weight_index, *self.widths)
        image = tuple(self.x.shape)
        self.problem = conv_problem(name, self.x, image, self.weight, *routing, case.stride, case.padding)


def every_tile(p: Prepared, op: str) -> Runs:
    """(name, call) per tile of the tile functions for this GPU."""
    from tdc_fast.kernels import tile_shapes, wgrad_tiles
    from tdc_fast.kernels.conv_dgrad import conv_dgrad
    from tdc_fast.kernels.conv_forward import conv_forward
    from tdc_fast.kernels.conv_wgrad import conv_wgrad

    facts, index = tile_shapes.device_of(torch.device(p.device)), p.plan.weight_index
    if op == "wgrad":
        for tile in wgrad_tiles.wgrad_candidates(p.problem, facts):
            for splits in (1, 3):

                def run(tile: Any = tile, splits: int = splits) -> Tensor:
                    out = torch.full_like(p.weight, float("nan"))
                    offsets = p.plan.offsets
                    conv_wgrad(p.problem, p.dy, p.x, out, offsets, index, *p.widths, tile=tile, splits=splits)
                    return out

                yield f"{tile}, {splits} splits", run
        return
    for tile in tile_shapes.candidates(op, p.problem, facts):
        if op == "forward":
            call = lambda tile=tile: conv_forward(  # noqa: E731
                p.problem, p.x, p.weight, *p.extras, p.tiles, index, *p.widths, tile=tile
            )
        else:
            call = lambda tile=tile: conv_dgrad(p.problem, p.dy, p.weight, p.tiles, index, *p.widths, tile=tile)  # noqa: E731
        yield str(tile), call


def the_reference(p: Prepared, op: str) -> Runs:
    """What the dry run puts in the tiles' place."""
    problem: ConvProblem = p.problem
    routing = (p.plan.offsets, p.plan.tiles, p.plan.weight_index, *p.widths)
    if op == "forward":
        yield "reference", lambda: reference.conv2d(problem, p.x, p.weight, *p.extras, *routing)
    elif op == "dgrad":
        yield "reference", lambda: reference.conv2d_dgrad(problem, p.dy, p.weight, *routing)
    else:
        mask, rest = (True, False, False), (routing[0], *routing[2:])
        yield "reference", lambda: reference.conv2d_wgrad(problem, p.dy, p.x, p.weight, *rest, mask)[0]  # type: ignore[return-value]


@on_device
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CASES)
def test_every_tile_is_as_accurate_as_torch(name: str, op: str, device: str, nan_filled_memory: None) -> None:
    case = CASES[name]
    wide = moved(case.tensors(torch.float64), "cpu", "channels_last")
    low = moved(case.tensors(torch.bfloat16), device, "channels_last")
    result = case.plain(wide)
    dy = upstream(case, result.shape, torch.bfloat16)
    exact, torchs = gradients(result, wide, dy.double()), gradients(case.plain(low), low, dy)
    prepared, key, tried = Prepared(case, op, device), OPS[op], 0
    for tile, run in (every_tile if device == "cuda" else the_reference)(prepared, op):
        first, again = run().cpu(), run().cpu()
        assert_as_accurate_as_torch(first, torchs[key], exact[key], f"{op} with {tile}", terms=4096)
        assert torch.equal(first, again), f"{op} with {tile} gives other bits when run again"
        tried += 1
    assert tried > (1 if device == "cuda" else 0)
