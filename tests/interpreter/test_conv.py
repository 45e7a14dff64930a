"""The Triton convolution equals one convolution per group, forward and dgrad, on both of its paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tdc_fast.kernels.conv_dgrad import conv_dgrad
from tdc_fast.kernels.conv_forward import conv_forward
from tdc_fast.kernels.problems import ConvTensors
from tdc_fast.kernels.tile_shapes import ConvTile, samples_per_tile
from tdc_fast.kernels.tile_table import tile_table
from tdc_fast.ops.checks import conv_problem
from tests.cases import ConvCase, Routing, conv_cases
from tests.tolerance import assert_as_accurate_as_torch

# Small tiles: every loop runs more than once, and the interpreter stays fast.
POINTER = ConvTile("pointer", 32, 16, 16, 2, 4)
TMA = ConvTile("tma", 32, 16, 16, 2, 4)
WIDE = [ConvTile(path, 16, 128, 16, 2, 4) for path in ("pointer", "tma")]  # with a second half that may be dead
UNEVEN = Routing((0, 0, 0, 1, 2), 4, 3, (2, 0, 1, 0))
WIDTHS: dict[str, Any] = {"in_widths": (24, 9, 20, 0), "out_widths": (24, 16, 7, 0)}


def case_of(**changes: Any) -> ConvCase:
    """Channels past a block of 16, tiles of several samples, a group without samples, shared experts."""
    standard = {
        "routing": UNEVEN,
        "in_channels": 24,
        "out_channels": 24,
        "size": (3, 4),
        "filter": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "in_widths": None,
        "out_widths": None,
        "extras": ("bias", "sample_bias", "residual"),
        "layout": "channels_last",
        "seed": 5,
    }
    return ConvCase(**(standard | changes))


CASES = {
    "3x3": case_of(),
    "3x3 widths": case_of(**WIDTHS),
    "3x3 widths of whole blocks": case_of(in_widths=(16, 0, 24, 8), out_widths=(16, 8, 0, 24)),
    "3x3 widths within whole blocks": case_of(
        in_channels=32, out_channels=32, in_widths=(32, 9, 20, 0), out_widths=(32, 16, 7, 0), extras=()
    ),
    "3x3 larger than a tile": case_of(size=(6, 7), routing=Routing((1, 0), 2, 2, None), extras=()),
    "3x3 stride 2": case_of(size=(4, 6), stride=(2, 2)),
    "3x3 stride 2 widths": case_of(size=(4, 6), stride=(2, 2), **WIDTHS),
    "1x1 stride 2": case_of(size=(4, 6), stride=(2, 2), filter=(1, 1), padding=(0, 0), **WIDTHS),
    "1x1 of one pixel": case_of(size=(1, 1), filter=(1, 1), padding=(0, 0), **WIDTHS),
    "5x1 padded": case_of(size=(3, 2), filter=(5, 1), padding=(3, 2), extras=("bias",)),
    "4x4 stride 2": case_of(size=(4, 6), filter=(4, 4), stride=(2, 2), **WIDTHS),  # the adjoint of an upsampling 3x3
    "two inputs": case_of(in_channels=40, x2_channels=16),  # 24 + 16: one whole block, and one and a half
    "two inputs 1x1 widths": case_of(
        filter=(1, 1),
        padding=(0, 0),
        in_channels=40,
        x2_channels=24,
        in_widths=(40, 9, 16, 30),
        out_widths=(24, 16, 7, 0),
    ),
    "two inputs stride 2": case_of(size=(4, 6), stride=(2, 2), in_channels=32, x2_channels=8, in_widths=(32, 25, 8, 0)),
}
POINTER_ONLY = {
    "three channels": case_of(in_channels=3, out_channels=17, size=(5, 5)),
    "odd everything": case_of(
        in_channels=19, out_channels=5, size=(5, 7), stride=(2, 1), in_widths=(19, 3, 17, 0), out_widths=(5, 0, 2, 1)
    ),
    "two inputs, odd seam": case_of(
        in_channels=19, x2_channels=6, size=(3, 5), in_widths=(19, 3, 15, 0), out_widths=(5, 13, 2, 24)
    ),
    "odd image, stride 2": case_of(size=(5, 3), stride=(2, 2), padding=(0, 2)),
}
HALF_DEAD = case_of(
    in_channels=200, out_channels=136, size=(2, 2), in_widths=(64, 65, 193, 0), out_widths=(65, 64, 129, 7),
    filter=(1, 3), padding=(0, 1),
)  # fmt: skip
RUNS = [
    *(
        pytest.param(replace(HALF_DEAD, **image), tile, torch.float16, id=f"{tile.path}-fp16-half dead tiles, {name}")
        for tile in WIDE
        for name, image in {"1x3": {}, "stride 2": {"size": (4, 4), "stride": (2, 2)}}.items()
    ),
    *(pytest.param(case, POINTER, torch.float32, id=f"pointer-fp32-{name}") for name, case in CASES.items()),
    *(pytest.param(case, POINTER, torch.float32, id=f"pointer-fp32-{name}") for name, case in POINTER_ONLY.items()),
    pytest.param(POINTER_ONLY["odd everything"], POINTER, torch.float16, id="pointer-fp16-odd everything"),
    *(pytest.param(case, TMA, torch.float16, id=f"tma-fp16-{name}") for name, case in CASES.items()),
]


def upstream(case: ConvCase, dtype: torch.dtype) -> Tensor:
    """dy (B, C_out, OH, OW), NaN where it is dead."""
    shape = (case.routing.batch, case.out_channels, *case.out_size)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(dtype)
    if case.out_widths is not None:
        for group, _, start, stop in case.routing.segments():
            dy[start:stop, case.out_widths[group] :] = float("nan")
    return dy.contiguous(memory_format=torch.channels_last)


def run(
    case: ConvCase, tensors: dict[str, Tensor], dy: Tensor, tile: ConvTile, dead_zeros: bool = False, **overrides: Any
) -> dict[str, Tensor]:
    """y and dx by the kernels."""
    plan = case.routing.plan()
    given = {name: tensor.detach() for name, tensor in tensors.items()}
    x = given["x"].contiguous(memory_format=torch.channels_last)
    weight = given["weight"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    x2 = given["x2"].contiguous(memory_format=torch.channels_last) if "x2" in given else None
    residual = given.get("residual")
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    arguments = case.settings() | {"weight_index": plan.weight_index} | overrides
    widths = arguments["in_widths"], arguments["out_widths"]
    index = arguments["weight_index"]
    extras = (given.get("bias"), given.get("sample_bias"), residual)
    t = ConvTensors(x, weight, plan.offsets, plan.tiles, index, *widths, *extras, x2)
    problem = replace(conv_problem("routed_conv2d", t, case.stride, case.padding), dead_zeros=dead_zeros)
    t = t._replace(tiles=tile_table(plan.offsets, problem.batch))
    dx, dx2 = conv_dgrad(problem, dy, t, tile=tile)
    return {"y": conv_forward(problem, t, tile=tile), "dx": dx} | ({} if dx2 is None else {"dx2": dx2})


def plain(case: ConvCase, dtype: torch.dtype, dy: Tensor) -> dict[str, Tensor]:
    """The same in torch, one convolution per group."""
    tensors = case.tensors(dtype)
    y = case.plain(tensors)
    inputs = {name: tensors[name] for name in ("x", "x2") if name in tensors}
    if not y.requires_grad:
        return {"y": y, **{f"d{name}": torch.zeros_like(tensor) for name, tensor in inputs.items()}}
    dy = dy.nan_to_num().to(dtype)
    grads = torch.autograd.grad(y, list(inputs.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def check(case: ConvCase, tile: ConvTile, dtype: torch.dtype) -> None:
    dy = upstream(case, dtype)
    ours = run(case, case.tensors(dtype), dy, tile)
    torchs, exact = plain(case, dtype, dy), plain(case, torch.float64, dy)
    terms = case.filter[0] * case.filter[1] * max(case.in_channels, case.out_channels)
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], exact[name], f"{name} of {case}", max(terms, 64))
        assert ours[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("case", "tile", "dtype"), RUNS)
def test_forward_and_dgrad_are_as_accurate_as_torch(
    case: ConvCase, tile: ConvTile, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    check(case, tile, dtype)


@pytest.mark.parametrize(("tile", "dtype"), [(POINTER, torch.float32), (TMA, torch.float16)], ids=["pointer", "tma"])
def test_where_dead_gradients_are_known_to_be_zeros_nothing_is_masked(
    tile: ConvTile, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    """The results are those of the masked kernels, on a gradient that is NaN there."""
    case = case_of(**WIDTHS)
    dy = upstream(case, dtype)
    zeros = torch.where(dy.isnan(), 0, dy)
    masked = run(case, case.tensors(dtype), dy, tile)["dx"]
    assert torch.equal(run(case, case.tensors(dtype), zeros, tile, dead_zeros=True)["dx"], masked)


def test_the_pointer_path_serves_any_problem(nan_filled_memory: None) -> None:
    @given(case=conv_cases())
    @settings(max_examples=10, deadline=None, derandomize=True)
    def check_any(case: ConvCase) -> None:
        check(case, POINTER, torch.float32)

    check_any()


def test_rows_of_a_box_past_the_end_of_its_group_are_dropped(nan_filled_memory: None) -> None:
    """Even if the next group has NaN there."""
    case = case_of(routing=Routing((0, 1, 1), 2, 2, None), size=(2, 2))
    assert samples_per_tile(TMA, 2, 2) == 8
    dy = upstream(case, torch.float16)
    tensors = {name: tensor.detach() for name, tensor in case.tensors(torch.float16).items()}
    expected = run(case, tensors, dy, TMA)
    for poisoned in (tensors["x"], tensors["residual"], dy):
        poisoned[0] = float("nan")
    actual = run(case, tensors, dy, TMA)
    for name in expected:
        assert torch.equal(actual[name][1:], expected[name][1:]), name


@pytest.mark.parametrize("tile", [POINTER, TMA], ids=lambda tile: tile.path)
def test_nan_in_one_expert_does_not_affect_others(tile: ConvTile) -> None:
    """Blocks of weights run past the last channel of an expert into the next one's memory."""
    case = case_of(routing=Routing((0, 2), 3, 3, None))
    dy = upstream(case, torch.float16)
    tensors = {name: tensor.detach() for name, tensor in case.tensors(torch.float16).items()}
    tensors["weight"][1] = float("nan")
    for result in run(case, tensors, dy, tile).values():
        assert result.isfinite().all()


@pytest.mark.parametrize("tile", [POINTER, TMA], ids=lambda tile: tile.path)
@pytest.mark.parametrize("x2_channels", [0, 16], ids=["one input", "the second dead"])
def test_dead_channels_of_the_weights_change_nothing(tile: ConvTile, x2_channels: int) -> None:
    fused = {"in_channels": 40, "x2_channels": x2_channels}
    case = case_of(routing=Routing((0, 1), 2, 2, None), in_widths=(20, 3), out_widths=(21, 24), **fused)
    dy = upstream(case, torch.float16)
    tensors = {name: tensor.detach() for name, tensor in case.tensors(torch.float16).items()}
    expected = run(case, tensors, dy, tile)
    for expert, (live_in, live_out) in enumerate(((20, 21), (3, 24))):
        tensors["weight"][expert, :, live_in:] = 1e4
        tensors["weight"][expert, live_out:] = -1e4
        tensors["bias"][expert, live_out:] = float("nan")
    actual = run(case, tensors, dy, tile)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("tile", WIDE, ids=lambda tile: tile.path)
@pytest.mark.parametrize(
    ("stride", "in_widths", "out_widths", "counted"),
    [
        ((1, 1), None, None, 2 * 256 * 256),
        ((1, 1), (128, 64), (64, 128), 128 * 64 + 64 * 128),
        ((1, 1), (192, 0), (64, 256), 192 * 64),
        ((1, 1), (250, 256), (190, 0), 256 * 192),  # to whole blocks of channels
        ((2, 2), (128, 256), (192, 64), 128 * 192 + 256 * 64),
    ],
)
def test_only_live_channels_and_taps_that_reach_are_multiplied(
    tile: ConvTile,
    stride: tuple[int, int],
    in_widths: tuple[int, ...] | None,
    out_widths: tuple[int, ...] | None,
    counted: int,
    multiply_adds: list[int],
) -> None:
    """counted: input times output channels, per pixel of y and tap, of one sample of each group."""
    case = case_of(
        routing=Routing((0, 1), 2, 2, None), in_channels=256, out_channels=256, in_widths=in_widths,
        out_widths=out_widths, size=(4 * stride[0], 4 * stride[1]), stride=stride, extras=(), filter=(1, 3),
        padding=(0, 1),
    )  # fmt: skip
    run(case, case.tensors(torch.float16), upstream(case, torch.float16), tile)
    assert sum(multiply_adds) == 2 * 16 * 3 * counted  # forward and dgrad


def test_widths_and_experts_out_of_range_are_clamped() -> None:
    """A GPU cannot raise an error for them, so they must not be used as indices."""
    sane = case_of(in_widths=(24, 0, 20, 24), out_widths=(20, 24, 0, 24))
    dy = upstream(replace(sane, out_widths=None), torch.float32)
    tensors = sane.tensors(torch.float32)
    wild = {
        "in_widths": torch.tensor([200, -5, 20, 99], dtype=torch.int32),
        "out_widths": torch.tensor([20, 99, -(10**6), 99], dtype=torch.int32),
        "weight_index": torch.tensor([99, -1, 1, 0], dtype=torch.int32),
    }
    expected, actual = run(sane, tensors, dy, POINTER), run(sane, tensors, dy, POINTER, **wild)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
