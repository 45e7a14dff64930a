"""The Hopper form of stride 2, in which upsampled images run too, in the emulator: equals one convolution per group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast.kernels.problems import ConvTensors
from tdc_fast.ops import hopper as hopper_backend
from tdc_fast.ops.checks import conv_problem
from tests.cases import ConvCase
from tests.emulator.conv import (
    DTYPES,
    RING_PLANTS,
    STORE_PLANTS,
    assert_a_mask_is_missed,
    assert_accurate,
    conv_case,
    emulator,
    hopper_settings,
    results,
    uneven,
)
from tests.emulator.harness import AT_RUNTIME, SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.generated import examples

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
FAMILIES = ("conv_hopper_strided", "conv_hopper_rows_wgrad")
EVERY = ("x", "weight", "bias", "sample_bias")  # gradient that the kernels compute


@contextmanager
def hopper(multiprocessors: int = 3, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with few SMs, so that a block computes several tiles, and that cuts divide units of wgrad."""
    with emulator((90, multiprocessors, 232448), FAMILIES, **dict.fromkeys(FAMILIES, AT_RUNTIME)) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    return conv_case(**{"in_channels": 64, "out_channels": 64, "size": (8, 8), "stride": (2, 2)} | changes)


# Changes to a case, SMs, and the tiles that forward and dgrad must take.
EDGES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "images of 32x32, several blocks of channels": (
        {"routing": uneven(1), "size": (32, 32), "in_channels": 72, "out_channels": 72, "extras": ("sample_bias",)},
        1,
        "256x128",
        "256x128",
    ),
    "odd images of several tiles": ({"routing": uneven(1, 0, 1), "size": (35, 11)}, 3, "128x64", "128x64"),
    "even and odd sides": ({"routing": uneven(2, 1), "size": (16, 9), "out_channels": 136}, 3, "128x64", "128x64"),
    "4x4 pixels of many samples": (
        {"routing": uneven(3, 0, 9), "size": (8, 8), "in_channels": 72, "out_channels": 136},
        3,
        "128x128",
        "128x128",
    ),
    "the smallest images": ({"routing": uneven(3, 2), "size": (4, 5), "extras": ("residual",)}, 3, "128x64", "128x64"),
    "widths of no multiple": (
        {
            "routing": uneven(1, 1, 1, 0, weight_index=(0, 0, 1, 1)),
            "size": (9, 7),
            "in_channels": 136,
            "out_channels": 144,
            "in_widths": (67, 136, 0, 8),
            "out_widths": (144, 3, 95, 0),
        },
        3,
        "128x128",
        "128x128",
    ),
    "nothing is added": ({"routing": uneven(2), "in_widths": (40,), "extras": ()}, 3, "128x64", "128x64"),
}
# fp16 differs from bf16 in products and rounding, not in layout; sanitizers look at addresses.
RAGGED = ("even and odd sides", "nothing is added")
EDGE_CASES = [(edge, "bf16") for edge in (RAGGED if SANITIZED else EDGES)]
EDGE_CASES += [] if SANITIZED else [(RAGGED[1], "fp16")]


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, multiprocessors, *tiles = EDGES[edge]
    with hopper(multiprocessors) as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], ("x",), backend="hopper")
    names = [f"tdc_conv_hopper_strided_{direction}_{dtype}_" for direction in ("forward", "dgrad")]
    assert launcher.launched == [name + tile for name, tile in zip(names, tiles, strict=True)]


@st.composite
def cases(draw: st.DrawFn, most_eights: int = 17, most_pixels: int = 19) -> ConvCase:
    """Images of any size that is served."""
    settings = draw(hopper_settings(of_group=2, of_batch=3, eights=(8, most_eights), two_inputs=False))
    return case_of(size=(draw(st.integers(4, most_pixels)), draw(st.integers(4, most_pixels))), **settings)


def test_any_case_is_as_accurate_as_torch() -> None:
    @given(case=cases(), schedule=st.sampled_from(SCHEDULES), multiprocessors=st.integers(1, 5))
    @examples(1 if SANITIZED else 2)
    def check(case: ConvCase, schedule: int, multiprocessors: int) -> None:
        with hopper(multiprocessors, schedule) as launcher:
            assert_accurate(case, torch.bfloat16, EVERY, backend="hopper")
        assert [kernel.split("_")[3] for kernel in launcher.launched] == ["strided", "strided", "wgrad", "wgrad"]

    check()


@plain_only
def test_results_do_not_depend_on_which_thread_goes_first() -> None:
    """More steps than stages, several tiles for one block, a ragged depth, a residual."""
    case = case_of(routing=uneven(1, 1), size=(9, 11), in_channels=72, out_channels=72)
    found = []
    for schedule in (1, 3):
        with hopper(1, schedule):
            found.append(results(case, torch.bfloat16, ("x",), backend="hopper"))
    first, other = found
    assert set(first) == {"y", "dx"}
    for name, value in first.items():
        assert torch.equal(other[name], value), name


@plain_only
def test_what_is_not_live_is_not_multiplied() -> None:
    """Nine taps of 128 rows in forward; in dgrad four planes, which share the nine. Widths count as everywhere."""
    case = case_of(
        routing=uneven(1, 1, 5),
        in_channels=136,
        out_channels=192,
        in_widths=(136, 33, 77),
        out_widths=(192, 90, 129),
        extras=(),
    )
    rows = (64, 64, 128)  # of the half of a tile that has samples, or of both
    with hopper() as launcher:
        counts = [launcher.multiply_adds()]
        y = results(case, torch.bfloat16, (), backend="hopper")["y"]
        counts.append(launcher.multiply_adds())
        t, problem = arguments(case)
        hopper_backend.conv2d_dgrad(problem, torch.ones_like(y), t)
        counts.append(launcher.multiply_adds())
    assert {kernel.rsplit("_", 1)[1] for kernel in launcher.launched} == {"128x128"}
    forward = sum(9 * r * k * n for r, k, n in zip(rows, (144, 48, 80), (192, 96, 192), strict=True))
    dgrad = sum(9 * r * k * n for r, k, n in zip(rows, (192, 96, 144), (192, 64, 96), strict=True))
    assert [after - before for before, after in zip(counts, counts[1:], strict=False)] == [forward, dgrad]


def arguments(case: ConvCase, *routing: torch.Tensor) -> tuple[ConvTensors, Any]:
    """The tensors and the problem of a case; with other offsets, weight index and widths where given."""
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    plan = case.routing.plan()
    own = [None if w is None else torch.tensor(w, dtype=torch.int32) for w in (case.in_widths, case.out_widths)]
    offsets, index, ins, outs = routing or (plan.offsets, plan.weight_index, *own)
    extras = {name: tensors[name] for name in case.extras}
    t = ConvTensors(tensors["x"], tensors["weight"], offsets, plan.tiles, index, ins, outs, **extras)
    return t, conv_problem("routed_conv2d", t, case.stride, case.padding, case.upsample)


PLANTS = {**RING_PLANTS, **STORE_PLANTS}


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    extras = ("bias",) if plant == "HOPPER_NO_STORE_WAIT" else ("residual",)
    case = case_of(routing=uneven(2), size=(17, 17), out_channels=136, extras=extras)
    with hopper(1, 3) as launcher, launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
        results(case, torch.bfloat16, (), backend="hopper")


@pytest.mark.parametrize("garbage", [-7, 2**31 - 1])
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    case = case_of(routing=uneven(1, 0, 1), size=(5, 6), extras=("bias", "sample_bias"))
    groups = case.routing.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    for sound in range(4):
        routing = list(wrong)
        routing[sound] = torch.zeros_like(routing[sound])
        t, problem = arguments(case, *routing)
        with hopper() as launcher:
            y = hopper_backend.conv2d(problem, t)
            hopper_backend.conv2d_dgrad(problem, torch.ones_like(y), t)
        assert [kernel.split("_")[4] for kernel in launcher.launched] == ["forward", "dgrad"]


# Changes to a case, the input channels of a unit, and the SMs.
WGRAD_EDGES: dict[str, tuple[dict[str, Any], int, int]] = {
    "patches of 8x8, odd images": ({"routing": uneven(1), "size": (17, 30), "in_channels": 136}, 256, 4),
    "4x4 pixels of four samples, groups that end within": (
        {"routing": uneven(1, 5, 0, 1), "size": (8, 7), "extras": ("bias", "sample_bias")},
        128,
        5,
    ),
    "cuts within samples": ({"routing": uneven(1, 2), "size": (32, 31), "extras": ("sample_bias",)}, 128, 36),
    "experts that several groups share, and one that none has": (
        {
            "routing": uneven(1, 2, 0, 1, 1, weight_index=(2, 0, 2, 2, 0)),
            "size": (5, 4),
            "in_channels": 136,
            "out_channels": 72,
            "in_widths": (136, 100, 8, 37, 128),
            "out_widths": (72, 64, 72, 3, 9),
            "extras": ("bias", "sample_bias"),
        },
        256,
        4,
    ),
}
WGRAD_CASES = [(edge, "bf16") for edge in (list(WGRAD_EDGES)[1::2] if SANITIZED else WGRAD_EDGES)]
WGRAD_CASES += [] if SANITIZED else [("patches of 8x8, odd images", "fp16")]


@pytest.mark.parametrize("edge, dtype", WGRAD_CASES)
def test_wgrad_is_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, channels, multiprocessors = WGRAD_EDGES[edge]
    case = case_of(**{"extras": ("bias",)} | changes)
    with hopper(multiprocessors) as launcher:
        assert_accurate(case, DTYPES[dtype], EVERY[1:], backend="hopper")
    unit = f"rows{channels}_{dtype}"
    assert launcher.launched[1:] == [f"tdc_conv_hopper_wgrad_{unit}", f"tdc_conv_hopper_wgrad_reduce_{unit}"]


def upsampled(**changes: Any) -> ConvCase:
    return conv_case(**{"in_channels": 64, "out_channels": 64, "size": (4, 4), "upsample": 2} | changes)


# Changes to a case, SMs, and the tiles that forward and dgrad must take. Units of wgrad have 128 input channels.
UPSAMPLED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "images of 16x16": (
        {"routing": uneven(1), "size": (16, 16), "out_channels": 72, "extras": ("sample_bias",)},
        1,
        "256x128",
        "128x64",
    ),
    "odd images, all that is added": (
        {"routing": uneven(2, 0, 1, weight_index=(0, 0, 0)), "size": (5, 9), "in_channels": 72, "out_channels": 72},
        3,
        "128x128",
        "128x128",
    ),
    "the smallest images, many samples": (
        {"routing": uneven(3, 9), "size": (2, 3), "extras": ("residual",)},
        3,
        "128x64",
        "128x64",
    ),
    "widths of no multiple": (
        {
            "routing": uneven(1, 1, 1, 0, weight_index=(0, 0, 1, 1)),
            "in_channels": 72,
            "out_channels": 80,
            "in_widths": (37, 72, 0, 8),
            "out_widths": (80, 3, 64, 0),
        },
        3,
        "128x128",
        "128x128",
    ),
}
ODD = "odd images, all that is added"
UPSAMPLED_CASES = [(edge, "bf16") for edge in ([ODD] if SANITIZED else UPSAMPLED)]
UPSAMPLED_CASES += [] if SANITIZED else [(ODD, "fp16")]


@pytest.mark.parametrize("edge, dtype", UPSAMPLED_CASES)
def test_upsampled_images_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, multiprocessors, *tiles = UPSAMPLED[edge]
    with hopper(multiprocessors) as launcher:
        assert_accurate(upsampled(**changes), DTYPES[dtype], EVERY, backend="hopper")
    merge, name = f"tdc_conv_hopper_merge_taps_{dtype}", "tdc_conv_hopper_strided_{}_" + dtype + "_"
    forward, dgrad = (name.format(way) + tile for way, tile in zip(("dgrad", "forward"), tiles, strict=True))
    wgrad = [f"tdc_conv_hopper_{part}_{dtype}" for part in ("window_sums", "wgrad_rows128", "wgrad_reduce_rows128")]
    assert launcher.launched == [merge, forward, merge, dgrad, *wgrad]


def test_any_upsampled_image_is_as_accurate_as_torch() -> None:
    @given(case=cases(most_eights=10, most_pixels=9), schedule=st.sampled_from(SCHEDULES))
    @examples(1 if SANITIZED else 2)
    def check(case: ConvCase, schedule: int) -> None:
        with hopper(schedule=schedule) as launcher:
            assert_accurate(replace(case, stride=(1, 1), upsample=2), torch.bfloat16, EVERY, backend="hopper")
        kinds = ["merge", "strided"] * 2 + ["window", "wgrad", "wgrad"]
        assert [kernel.split("_")[3] for kernel in launcher.launched] == kinds

    check()


@plain_only
def test_four_ninths_of_the_products_of_upsampled_images_remain() -> None:
    """16 of the 36 pairs of a tap and one of the 2 x 2 pixels that a pixel stands for, in both passes."""
    case = upsampled(routing=uneven(8), out_channels=128, out_widths=(70,), in_widths=(40,), extras=())
    with hopper(1) as launcher:
        before = launcher.multiply_adds()
        y = results(case, torch.bfloat16, (), backend="hopper")["y"]
        forward = launcher.multiply_adds() - before
        results(case, torch.bfloat16, ("x",), backend="hopper")
        dgrad = launcher.multiply_adds() - before - 2 * forward
    assert y.shape == (8, 128, 8, 8)
    # 8 samples of 4 x 4 pixels; depth in steps of 16, columns of three quarters of a tile and of half of one
    assert (forward, dgrad) == (16 * 128 * 48 * 96, 16 * 128 * 80 * 64)


# The weights of another tap; pixels a line off; those of another parity, read or written; channels against the weights
# of others; taps of the merged filter left out.
SPOILERS = ("HOPPER_WRONG_TAP", "HOPPER_WRONG_LINE", "HOPPER_WRONG_PLANE", "HOPPER_WRONG_OFFSET")
SPOILED = [("strided", plant) for plant in SPOILERS]
SPOILED += [("upsampled", plant) for plant in (*SPOILERS, "CONV_MERGES_HALF")]


@plain_only
@pytest.mark.parametrize("wanted", [(), ("x",)], ids=["forward", "dgrad"])
@pytest.mark.parametrize("form, plant", SPOILED)
def test_a_planted_bug_spoils_the_result(form: str, plant: str, wanted: tuple[str, ...]) -> None:
    case = (case_of if form == "strided" else upsampled)(routing=uneven(1), extras=())
    with hopper(1) as launcher, launcher.planted(plant), pytest.raises(AssertionError):
        assert_accurate(case, torch.bfloat16, wanted, backend="hopper")


@plain_only
def test_values_of_a_gradient_past_its_width_spoil_the_result_without_the_mask() -> None:
    with hopper(1) as launcher:
        assert_a_mask_is_missed(launcher, case_of(routing=uneven(1), size=(8, 8), out_widths=(37,), extras=()))


@plain_only
def test_a_quarter_of_the_products_of_an_upsampled_image_remain_in_wgrad() -> None:
    """9 taps that meet a window each instead of 4 pixels."""
    t, problem = arguments(upsampled(routing=uneven(8), size=(8, 8), extras=()))
    with hopper(1) as launcher:
        before = launcher.multiply_adds()
        hopper_backend.conv2d_wgrad(problem, torch.ones(8, 64, 16, 16).bfloat16(), t, (True, False, False))
        # 8 samples of 8 x 8 pixels, 64 x 64 channels
        assert launcher.multiply_adds() - before == 9 * 8 * 64 * 64 * 64


# What a bug leaves right: the gradient of the weights, or those of the weights, the bias and the biases of samples.
WGRAD_SPOILED = {
    "strided, the tap of another line": ("HOPPER_WRONG_ROW", [False]),
    "strided, samples of the next group in a patch": ("HOPPER_NO_LAST_PIXEL", [False]),
    "upsampled, the tap of another line": ("HOPPER_WRONG_ROW", [False, True, True]),
    "upsampled, half of each window": ("CONV_HALF_WINDOW", [False] * 3),
}


@plain_only
@pytest.mark.parametrize("bug", WGRAD_SPOILED)
def test_a_bug_planted_in_wgrad_spoils_the_result(bug: str) -> None:
    plant, close = WGRAD_SPOILED[bug]
    wanted = (True, len(close) > 1, len(close) > 1)
    case = case_of if bug.startswith("strided") else upsampled
    t, problem = arguments(case(routing=uneven(1, 3), extras=("bias", "sample_bias")))
    y = (4, 64, problem.out_height, problem.out_width)
    dy = torch.randn(y, generator=torch.Generator().manual_seed(1)).bfloat16().to(memory_format=torch.channels_last)
    with hopper(1) as launcher:
        right = hopper_backend.conv2d_wgrad(problem, dy, t, wanted)
        with launcher.planted(plant):
            wrong = hopper_backend.conv2d_wgrad(problem, dy, t, wanted)
    pairs = [(a, b) for a, b in zip(right, wrong, strict=True) if a is not None]
    assert [torch.allclose(a, b, rtol=0.1, atol=0.1) for a, b in pairs] == close


@pytest.mark.parametrize("garbage", [-7, 2**31 - 1])
def test_no_number_in_device_memory_leads_wgrad_of_an_upsampled_image_out_of_bounds(garbage: int) -> None:
    case = upsampled(routing=uneven(1, 0, 1), size=(3, 2), extras=("bias", "sample_bias"))
    groups = case.routing.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    t, problem = arguments(case, *wrong)
    with hopper() as launcher:
        hopper_backend.conv2d_wgrad(problem, torch.ones(2, 64, 6, 4).bfloat16(), t, (True, True, True))
    assert len(launcher.launched) == 3
