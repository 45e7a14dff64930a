"""The Triton weight gradient and bias gradients, run by Triton's interpreter, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from torch import Tensor

from tdc_fast.kernels.conv_wgrad import conv_wgrad
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.split_sums import share_start
from tdc_fast.kernels.wgrad_tiles import WgradTile
from tdc_fast.ops import reference
from tdc_fast.ops.checks import conv_problem
from tdc_fast.ops.layout import empty_channel_innermost, nhwc
from tests.cases import ConvCase, Routing, conv_cases
from tests.tolerance import assert_as_accurate_as_torch

Mask = tuple[bool, bool, bool]  # which of dweight, dbias and dsample_bias are wanted
ALL: Mask = (True, True, True)
MASKS: list[Mask] = [
    ALL,
    (True, True, False),
    (True, False, True),
    (False, True, True),
    (False, True, False),
    (False, False, True),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
SMALL_STEP = WgradTile("pointer", 16, 16, 16, 2, 4)  # several tiles and steps even in a tiny problem
BOXED = WgradTile("tma", 16, 16, 16, 2, 4)
WIDE = WgradTile("pointer", 128, 128, 16, 2, 4)  # dead halves of it are skipped


def some_case(**changes: Any) -> ConvCase:
    settings = {
        "routing": Routing((0, 2, 2, 1, 0, 2), 3, 3, None),
        "in_channels": 11,
        "out_channels": 9,
        "size": (6, 5),
        "filter": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "in_widths": (11, 4, 7),
        "out_widths": (3, 9, 5),
        "extras": (),
        "layout": "channels_last",
        "seed": 3,
    }
    return ConvCase(**(settings | changes))


class Backward:
    """dy of a case with NaN and x with zeros in what is dead, and the gradients by kernel, by torch, and in fp64."""

    def __init__(self, case: ConvCase, dtype: torch.dtype) -> None:
        tensors, settings = case.tensors(dtype), case.settings()
        self.x, self.weight = nhwc(tensors["x"].detach()), tensors["weight"].detach()
        draw = torch.Generator().manual_seed(0)
        dy = torch.randn(case.routing.batch, case.out_channels, *case.out_size, generator=draw)
        dy = dy.to(torch.bfloat16).to(dtype)
        for group, _, start, stop in case.routing.segments():
            if case.out_widths is not None:
                dy[start:stop, case.out_widths[group] :] = float("nan")
        self.dy = nhwc(dy)
        plan = case.routing.plan()
        widths = settings["in_widths"], settings["out_widths"]
        x2 = nhwc(tensors["x2"].detach()) if "x2" in tensors else None
        self.tensors = ConvTensors(self.x, self.weight, plan.offsets, plan.tiles, plan.weight_index, *widths, x2=x2)
        geometry = (case.stride, case.padding)
        self.problem: ConvProblem = conv_problem(
            "routed_conv2d_wgrad", self.tensors, *geometry, upsample=case.upsample, dy=self.dy
        )

    def dweight(self, tile: WgradTile | None = None, splits: int | None = None) -> Tensor:
        out = empty_channel_innermost(self.weight.shape, self.weight.dtype)
        conv_wgrad(self.problem, self.dy, self.tensors, out, tile=tile, splits=splits)
        return out

    def gradients(self, tile: WgradTile | None, splits: int | None, mask: Mask = ALL) -> tuple[Tensor | None, ...]:
        """dweight, dbias and dsample_bias of one call, None where not in the mask."""
        shapes = self.weight.shape, self.weight.shape[:2], self.dy.shape[:2]
        made = [self.dy.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, mask, strict=True)]
        if mask[0]:
            made[0] = empty_channel_innermost(self.weight.shape, self.weight.dtype)
        conv_wgrad(self.problem, self.dy, self.tensors, *made, tile=tile, splits=splits)
        return tuple(made)

    def sums(self, mask: Mask = ALL) -> tuple[Tensor | None, ...]:
        """dbias and dsample_bias."""
        return self.gradients(SMALL_STEP, 2, mask)[1:]

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x2 = None if self.tensors.x2 is None else self.tensors.x2.to(dtype)
        tensors = self.tensors._replace(x=self.x.to(dtype), weight=self.weight.to(dtype), x2=x2)
        return reference.conv2d_wgrad(self.problem, self.dy.to(dtype), tensors, (True, True, True))


def assert_accurate(
    case: ConvCase, dtype: torch.dtype, tile: WgradTile | None, splits: int | None, mask: Mask = ALL
) -> None:
    run = Backward(case, dtype)
    exact, torchs = run.reference(torch.float64), run.reference(dtype)
    terms = max(64, case.routing.batch * case.out_size[0] * case.out_size[1])
    gradients = run.gradients(tile, splits, mask)
    assert tuple(gradient is not None for gradient in gradients) == mask
    for name, ours, theirs, right in zip(("dweight", "dbias", "dsample_bias"), gradients, torchs, exact, strict=True):
        if ours is not None:
            assert_as_accurate_as_torch(ours, theirs, right, f"{name} of {case}, {mask}", terms)


@DTYPES
def test_any_problem_is_as_accurate_as_torch(dtype: torch.dtype, nan_filled_memory: None) -> None:
    """Odd filters, strides, paddings, widths, shared experts, empty groups; one split and several."""

    @given(case=conv_cases().filter(lambda case: case.routing.batch > 0))
    @settings(max_examples=8, deadline=None, derandomize=True)
    def check(case: ConvCase) -> None:
        assert_accurate(case, dtype, SMALL_STEP, 1 + case.seed % 3, MASKS[(case.seed + case.in_channels) % len(MASKS)])

    check()


@pytest.mark.parametrize("tile", [SMALL_STEP, BOXED], ids=["pointer", "tma"])
@pytest.mark.parametrize("x2_channels", [16, 24])
def test_two_inputs_share_one_gradient(tile: WgradTile, x2_channels: int, nan_filled_memory: None) -> None:
    """Widths that end in either of them or at the seam; partials of both, and biases with the first."""
    case = some_case(
        in_channels=40, x2_channels=x2_channels, out_channels=16, size=(4, 4), in_widths=(40, 24, 9),
        out_widths=(16, 3, 10), filter=(1, 1), padding=(0, 0),
    )  # fmt: skip
    for splits in (1, 3):
        assert_accurate(case, torch.float16, tile, splits)


@pytest.mark.parametrize(
    ("changes", "dtype", "splits"),
    [
        ({"size": (3, 5)}, torch.float32, 3),
        ({"size": (3, 5), "in_widths": None}, torch.float16, 1),
        ({"size": (5, 4), "stride": (2, 1), "filter": (3, 1), "padding": (2, 0)}, torch.float32, 1),
        ({"size": (2, 3), "filter": (1, 5), "padding": (0, 2), "x2_channels": 4}, torch.float16, 3),
    ],
    ids=["fp32", "fp16", "strided", "two inputs"],
)
def test_an_upsampled_image_is_read_where_it_is(
    changes: dict[str, Any], dtype: torch.dtype, splits: int, nan_filled_memory: None
) -> None:
    """At half of row and column, several samples in a step and several steps in a sample; biases of the large dy."""
    case = some_case(upsample=2, routing=Routing((0, 2, 2, 1), 3, 3, None), **changes)
    assert_accurate(case, dtype, SMALL_STEP, splits)


@pytest.mark.parametrize("mask", MASKS[1:], ids=str)
def test_gradients_that_are_wanted_do_not_depend_on_the_others(mask: Mask, nan_filled_memory: None) -> None:
    """Bias gradients come from the weight gradient's launch, or from one of their own."""
    case = some_case(
        routing=Routing((0,) * 3 + (2,) * 9, 3, 3, None), out_channels=70, out_widths=(70, 3, 65), size=(3, 5),
        filter=(1, 1), padding=(0, 0),
    )  # fmt: skip
    for splits in (1, 3):
        assert_accurate(case, torch.float32, replace(SMALL_STEP, block_out=64), splits, mask)


@DTYPES
def test_the_chosen_tile_and_splits_are_accurate(dtype: torch.dtype, nan_filled_memory: None) -> None:
    assert_accurate(some_case(), dtype, None, None)


@pytest.mark.parametrize(
    ("size", "filter_", "padding", "splits"),
    [
        ((4, 4), (3, 3), (1, 1), 3),  # a box is an image
        ((4, 8), (1, 1), (0, 0), 1),  # a box is some rows
        ((2, 32), (1, 3), (0, 1), 2),  # a box is part of a row
        ((6, 4), (3, 1), (0, 0), 1),  # the result is smaller than the image
    ],
)
def test_boxes_are_as_accurate_as_pointers(
    size: tuple[int, int], filter_: tuple[int, int], padding: tuple[int, int], splits: int, nan_filled_memory: None
) -> None:
    widths = {"in_channels": 24, "out_channels": 8, "in_widths": (24, 0, 13), "out_widths": (8, 8, 5)}
    case = some_case(size=size, filter=filter_, padding=padding, **widths)
    assert_accurate(case, torch.float16, BOXED, splits)


@pytest.mark.parametrize("path", ["pointer", "tma"])
@pytest.mark.parametrize(
    "widths", [((24, 200), (65, 9)), ((64, 50), (64, 136)), ((65, 200), (3, 64)), ((2, 64), (7, 0))]
)
def test_dead_halves_of_a_tile_are_zeros(path: str, widths: tuple[Any, Any], nan_filled_memory: None) -> None:
    """Also if an expert has several groups: the widest group decides."""
    for weight_index in ((0, 1), (1, 1)):
        routing = Routing((0, 1, 1), 2, 2, weight_index)
        case = some_case(
            routing=routing, in_channels=200, out_channels=136, in_widths=widths[0], out_widths=widths[1], size=(4, 4),
            filter=(1, 1), padding=(0, 0),
        )  # fmt: skip
        assert_accurate(case, torch.float16, replace(WIDE, path=path), 2)


@pytest.mark.parametrize(
    ("in_widths", "out_widths", "counted"),
    [
        (None, None, 2 * 256 * 256),
        ((128, 64), (64, 128), 128 * 64 + 64 * 128),
        ((64, 192), (64, 0), 64 * 64),
        ((192, 256), (256, 129), 192 * 256 + 256 * 192),
        ((250, 10), (190, 64), 256 * 192 + 64 * 64),  # to whole halves
    ],
)
@pytest.mark.parametrize("path", ["pointer", "tma"])
def test_only_live_channels_are_multiplied(
    path: str,
    in_widths: tuple[int, ...] | None,
    out_widths: tuple[int, ...] | None,
    counted: int,
    multiply_adds: list[int],
) -> None:
    """counted: input times output channels, per pixel of y and tap, of one sample of each group."""
    case = some_case(
        routing=Routing((0, 1), 2, 2, None), in_channels=256, out_channels=256, in_widths=in_widths,
        out_widths=out_widths, size=(4, 4), filter=(1, 3), padding=(0, 1),
    )  # fmt: skip
    Backward(case, torch.float16).dweight(replace(WIDE, path=path), 1)
    assert sum(multiply_adds) == 16 * 3 * counted


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64)], ids=str)
def test_a_tile_of_64_channels_is_not_halved(
    blocks: tuple[int, int], multiply_adds: list[int], nan_filled_memory: None
) -> None:
    """Half of it would not fill wgmma's 64 rows; of a tile of 128 channels the dead half is skipped."""
    case = some_case(
        routing=Routing((0,), 1, 1, None), in_channels=128, out_channels=128, in_widths=(32,), out_widths=(32,),
        size=(4, 4), filter=(1, 1), padding=(0, 0),
    )  # fmt: skip
    tile = replace(WIDE, block_out=blocks[0], block_in=blocks[1])
    assert_accurate(case, torch.float16, tile, 1, (True, False, False))
    assert sum(multiply_adds) == 16 * 64 * 64  # pixels, output and input channels


def test_groups_that_share_an_expert_add_up_although_their_dead_channels_differ(nan_filled_memory: None) -> None:
    """A channel that is dead (NaN in dy) in one group and live in the next contributes only where it is live."""
    case = some_case(routing=Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)), filter=(3, 1), padding=(1, 0))
    assert_accurate(case, torch.float32, SMALL_STEP, 2)
    assert_accurate(case, torch.float32, None, 1)


def test_dead_channels_and_unused_experts_have_gradients_of_exact_zero(nan_filled_memory: None) -> None:
    case = some_case(
        routing=Routing((0, 2, 2, 0, 2), 3, 4, (3, 1, 0)), in_widths=(4, 11, 0), out_widths=(9, 9, 5),
        filter=(1, 1), padding=(0, 0),
    )  # fmt: skip
    run = Backward(case, torch.float32)
    for splits in (1, 2):
        dweight = run.dweight(SMALL_STEP, splits)
        for zero in (dweight[0], dweight[1], dweight[2], dweight[3, :, 4:]):
            assert torch.equal(zero, torch.zeros_like(zero))
        assert dweight[3, :, :4].abs().min() > 0
    for mask in (ALL, (False, True, True)):
        dbias, dsample_bias = run.sums(mask)
        assert dbias is not None and dsample_bias is not None
        for zero in (dbias[1:3], dbias[0, 5:], dsample_bias[2:, 5:]):
            assert torch.equal(zero, torch.zeros_like(zero))


def test_two_runs_are_bitwise_equal_and_splits_change_the_rounding_only() -> None:
    run = Backward(some_case(filter=(1, 3), padding=(0, 1)), torch.float32)
    split = run.dweight(SMALL_STEP, 3)
    assert torch.equal(split, run.dweight(SMALL_STEP, 3))
    torch.testing.assert_close(run.dweight(SMALL_STEP, 1), split, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(run.sums(), run.sums(), strict=True))


@triton.jit
def starts_kernel(out, steps, splits):
    tl.store(out + tl.program_id(0), share_start(steps, tl.program_id(0), splits))


@pytest.mark.parametrize(("steps", "splits"), [(7, 3), (2, 5), (0, 4), (2**26 - 1, 64)])
def test_shares_are_equal_and_cover_every_step(steps: int, splits: int) -> None:
    """2**26 steps times 64 splits do not fit 32 bits."""
    starts = torch.empty(splits + 1, dtype=torch.int32)
    starts_kernel[(splits + 1,)](starts, steps, splits)
    assert starts[0] == 0 and starts[-1] == steps
    sizes = starts.diff()
    assert sizes.max() - sizes.min() <= 1 and sizes.min() == steps // splits


def test_widths_and_experts_out_of_range_are_clamped() -> None:
    """Nothing checks them on a GPU."""
    whole = {"in_widths": (11, 11, 11), "out_widths": (9, 9, 9), "filter": (1, 1), "padding": (0, 0)}
    run = Backward(some_case(**whole), torch.float32)
    expected, sums = run.dweight(SMALL_STEP), run.sums()
    sane = run.tensors
    _, _, offsets, _, weight_index, in_widths, out_widths, *_ = sane
    run.tensors = sane._replace(
        weight_index=weight_index * 1000, in_widths=in_widths * 1000, out_widths=out_widths * 1000
    )
    wild, wild_sums = run.dweight(SMALL_STEP), run.sums()
    assert sums[1] is not None and wild_sums[1] is not None
    assert torch.equal(wild[0], expected[0])
    torch.testing.assert_close(wild[2], expected[1] + expected[2])
    assert torch.equal(wild[1], torch.zeros_like(wild[1]))
    assert torch.equal(wild_sums[1], sums[1])
    run.tensors = sane._replace(in_widths=-in_widths, out_widths=-out_widths)
    assert not run.dweight(SMALL_STEP).any()
    run.tensors = sane._replace(offsets=offsets * 1000)
    assert not run.dweight(SMALL_STEP)[1:].any()  # every sample belongs to the first group
