"""Every tile that a Triton convolution may choose, run by name on a GPU: compiling does not prove it right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvTensors
from tdc_fast.kernels.tile_table import tiles_of
from tdc_fast.ops import reference
from tdc_fast.ops.checks import conv_problem
from tdc_fast.ops.layout import channel_innermost, dense, nhwc
from tests.cases import ConvCase, Routing, upstream
from tests.gpu.problems import gradients, moved, on_device, plan_on, settings_on
from tests.gpu.shapes import CONV_CASES, CONV_FORMS, conv
from tests.tolerance import assert_as_accurate_as_torch

OPS = {"forward": "y", "dgrad": "dx", "wgrad": "dweight"}
RAGGED = {
    "ragged widths": conv(  # they end inside a K-step, and inside both the first and the second half of a tile
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
        t = ConvTensors(
            tensors["x"],
            channel_innermost(tensors["weight"]),
            self.plan.offsets,
            self.plan.tiles,
            self.plan.weight_index,
            settings["in_widths"],
            settings["out_widths"],
            *(tensors.get(name) for name in ("bias", "sample_bias", "residual")),
        )
        shape = torch.Size((case.routing.batch, case.out_channels, *case.out_size))
        self.dy = nhwc(upstream(case, shape, torch.bfloat16).to(device))
        name = "routed_conv2d" if op == "forward" else f"routed_conv2d_{op}"
        self.problem = conv_problem(name, t, case.stride, case.padding)
        self.tensors = dense(t._replace(tiles=tiles_of(t.tiles, t.offsets, case.routing.batch)))


def every_tile(p: Prepared, op: str) -> Runs:
    """(name, call) per tile of the tile functions for this GPU."""
    from tdc_fast.kernels import tile_shapes, wgrad_tiles
    from tdc_fast.kernels.conv_dgrad import conv_dgrad
    from tdc_fast.kernels.conv_forward import conv_forward
    from tdc_fast.kernels.conv_wgrad import conv_wgrad

    facts, t = tile_shapes.device_of(torch.device(p.device)), p.tensors
    if op == "wgrad":
        for tile in wgrad_tiles.wgrad_candidates(p.problem, facts):
            for splits in (1, 3):

                def run(tile: Any = tile, splits: int = splits) -> Tensor:
                    out = torch.full_like(t.weight, float("nan"))
                    conv_wgrad(p.problem, p.dy, t, out, tile=tile, splits=splits)
                    return out

                yield f"{tile}, {splits} splits", run
        return
    for tile in tile_shapes.candidates(op, p.problem, facts):
        if op == "forward":
            call = partial(conv_forward, p.problem, t, tile=tile)
        else:
            call = partial(first_of, conv_dgrad, p.problem, p.dy, t, tile=tile)
        yield str(tile), call


def first_of(function: Callable[..., tuple[torch.Tensor, ...]], *args: Any, **settings: Any) -> torch.Tensor:
    """The first result of a call."""
    return function(*args, **settings)[0]


def the_reference(p: Prepared, op: str) -> Runs:
    """What the dry run runs in place of the tiles."""
    if op == "forward":
        yield "reference", lambda: reference.conv2d(p.problem, p.tensors)
    elif op == "dgrad":
        yield "reference", lambda: reference.conv2d_dgrad(p.problem, p.dy, p.tensors)[0]
    else:
        mask = (True, False, False)
        yield "reference", lambda: reference.conv2d_wgrad(p.problem, p.dy, p.tensors, mask)[0]  # type: ignore[return-value]


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


def bias_gradients_of_tiles(p: Prepared) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """(name, (dweight, dbias, dsample_bias)) of every tile for this GPU, with and without sums per sample."""
    from tdc_fast.kernels import tile_shapes, wgrad_tiles
    from tdc_fast.kernels.conv_wgrad import conv_wgrad

    t, shapes = p.tensors, (p.tensors.weight.shape[:2], p.dy.shape[:2])
    tiles = wgrad_tiles.wgrad_candidates(p.problem, tile_shapes.device_of(torch.device(p.device)))
    for tile in [*tiles, None]:  # None: no weight gradient
        for splits in (1, 3):
            for count in (1, 2):
                biases = [torch.empty(shape, dtype=torch.bfloat16, device=p.device) for shape in shapes[:count]]
                weight = None if tile is None else torch.empty_like(t.weight)
                conv_wgrad(p.problem, p.dy, t, weight, *biases, tile=tile, splits=splits)
                yield f"{tile}, {splits} splits, {count} sums", (None, *biases, *[None] * (2 - count))


@on_device
@pytest.mark.parametrize("name", CASES)
def test_bias_gradients_are_as_accurate_as_torch_with_every_tile(
    name: str, device: str, nan_filled_memory: None
) -> None:
    prepared = Prepared(CASES[name], "wgrad", device)
    problem, dy = prepared.problem, prepared.dy.cpu()
    t = type(prepared.tensors)._make(None if x is None else x.cpu() for x in prepared.tensors)
    exact = reference.conv2d_wgrad(problem, dy.double(), t._replace(weight=t.weight.double()), (False, True, True))
    torchs = reference.conv2d_wgrad(problem, dy, t, (False, True, True))
    dry_run = [("reference", torchs)]
    for tile, grads in bias_gradients_of_tiles(prepared) if device == "cuda" else dry_run:
        for ours, theirs, right in zip(grads, torchs, exact, strict=True):
            if ours is not None:
                assert_as_accurate_as_torch(ours.cpu(), theirs, right, f"bias gradient with {tile}", terms=4096)
