"""The Hopper form of wgrad, run in the emulator, equals the gradient of one convolution per group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    assert_accurate,
    conv_case,
    emulator,
    hopper_settings,
    results,
    uneven,
)
from tests.emulator.harness import SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.generated import examples

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
GRADIENTS = ("weight", "bias")
KERNELS = ["tdc_conv_hopper_wgrad_{}", "tdc_conv_hopper_wgrad_reduce_{}"]


@contextmanager
def hopper(multiprocessors: int = 4, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with few SMs, so that cuts divide units."""
    with emulator((90, multiprocessors, 232448), ("conv_hopper_forward", "conv_hopper_wgrad")) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    extras = ("bias", "sample_bias")
    return conv_case(**{"in_channels": 64, "out_channels": 64, "size": (8, 8), "extras": extras} | changes)


# Changes to a case, and the SMs.
EDGES: dict[str, tuple[dict[str, Any], int]] = {
    "fewer SMs than units": ({"routing": uneven(3, 0, 2)}, 4),
    "more SMs than units": ({"routing": uneven(2, 0, 1), "size": (16, 8)}, 20),
    "more SMs than patches": ({"routing": uneven(1, 1)}, 20),
    "more SMs than patches of units that cuts divide": ({"routing": uneven(2)}, 20),
    "several units each way": ({"routing": uneven(2), "in_channels": 136, "out_channels": 200}, 5),
    "clipped images": ({"routing": uneven(1, 1), "size": (9, 11), "in_channels": 72}, 4),
    "experts that several groups share, and one that none has": (
        {
            "routing": uneven(1, 2, 0, 1, 1, weight_index=(2, 0, 2, 2, 0)),
            "in_channels": 136,
            "out_channels": 72,
            "in_widths": (136, 100, 8, 37, 128),
            "out_widths": (72, 64, 72, 3, 9),
        },
        7,
    ),
    "widths of single groups": (
        {
            "routing": uneven(1, 2, 1),
            "in_channels": 200,
            "out_channels": 136,
            "in_widths": (37, 0, 200),
            "out_widths": (130, 136, 64),
        },
        4,
    ),
    "two inputs whose seam is no multiple of 64": (
        {
            "routing": uneven(2, 1, weight_index=(0, 0)),
            "in_channels": 152,
            "x2_channels": 80,
            "in_widths": (37, 152),
            "out_widths": (64, 9),
        },
        3,
    ),
    "three quarters of a unit's columns": (
        {
            "routing": uneven(1, 2, 1),
            "in_channels": 128,
            "out_channels": 128,
            "in_widths": (96, 97, 65),
            "out_widths": (96, 64, 9),
        },
        5,
    ),
    "units and parts of units that no width reaches": (
        {
            "routing": uneven(1, 2, weight_index=(0, 0)),
            "in_channels": 136,
            "out_channels": 136,
            "in_widths": (136, 64),
            "out_widths": (0, 136),
        },
        5,
    ),
    "an expert's groups on both sides of a warp's 32": (
        {"routing": uneven(1, *[0] * 32, 1, 0, 2, weight_index=(0,) * 20 + (1,) * 16)},
        5,
    ),
}


# fp16 differs from bf16 in products and rounding, not in layout; sanitizers look at addresses.
SHARED = "experts that several groups share, and one that none has"
# Where the biases of samples have gradients, too; cuts go through samples.
WITH_SAMPLES = (SHARED, "more SMs than units", "clipped images", "several units each way", "widths of single groups")
EDGE_CASES = [(edge, "bf16") for edge in ([SHARED, "clipped images"] if SANITIZED else EDGES)]
EDGE_CASES += [] if SANITIZED else [("several units each way", "fp16")]


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, multiprocessors = EDGES[edge]
    wanted = (*GRADIENTS, "sample_bias") if edge in WITH_SAMPLES else GRADIENTS
    with hopper(multiprocessors) as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], wanted, backend="hopper")
    assert launcher.launched[1:] == [kernel.format(dtype) for kernel in KERNELS]


@st.composite
def cases(draw: st.DrawFn) -> ConvCase:
    """One input or two; the biases whose gradients the form has."""
    settings = draw(hopper_settings(of_group=2, of_batch=3, eights=(8, 18))) | {"extras": ("bias", "sample_bias")}
    return case_of(size=(draw(st.integers(9, 17)), 8), **settings)  # 8x8 may take the form of rows


@plain_only
def test_any_case_is_as_accurate_as_torch() -> None:
    wanted = st.sampled_from([GRADIENTS, (*GRADIENTS, "sample_bias")])

    @given(case=cases(), schedule=st.sampled_from(SCHEDULES), multiprocessors=st.integers(1, 9), wanted=wanted)
    @examples(3)
    def check(case: ConvCase, schedule: int, multiprocessors: int, wanted: tuple[str, ...]) -> None:
        with hopper(multiprocessors, schedule):
            assert_accurate(case, torch.bfloat16, wanted, backend="hopper")

    check()


@plain_only
def test_results_do_not_depend_on_timing() -> None:
    case = case_of(routing=uneven(2, 3))
    found = []
    for schedule in (0, 3):
        with hopper(4, schedule):
            found.append(results(case, torch.bfloat16, (*GRADIENTS, "sample_bias"), backend="hopper"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("dweight", "dbias", "dsample_bias"))


@plain_only
@pytest.mark.parametrize("plant", ["HOPPER_SAMPLE_CUT_IN_PLACE", "HOPPER_SAMPLE_GOES_ON"])
def test_a_bug_planted_in_the_sums_of_samples_spoils_them(plant: str) -> None:
    """What a block begins within a sample, stored over what another has of it; sums that go on with the next sample."""
    case = case_of(routing=uneven(7), size=(16, 8))
    with hopper(6) as launcher:
        t, problem, dy = arguments(case)
        right = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, True))
        with launcher.planted(plant):
            wrong = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, True))
    close = [torch.allclose(a, b, rtol=0.1, atol=0.1) for a, b in zip(right, wrong, strict=True)]
    assert close == [True, False, False]


@plain_only
def test_what_is_not_live_is_not_multiplied() -> None:
    """Of the first group nothing, of the second one of two units of input channels and both of output channels, of
    whose second one 64 channels."""
    changes, multiprocessors = EDGES["units and parts of units that no width reaches"]
    t, problem, dy = arguments(case_of(**changes))
    with hopper(multiprocessors) as launcher:
        before = launcher.multiply_adds()
        hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))
        done = launcher.multiply_adds() - before
    patches, rows = 2, 3
    assert done == patches * rows * 64 * (128 + 64) * 3 * 128


@plain_only
@pytest.mark.parametrize("live, columns", [(96, 96), (97, 128), (64, 64), (65, 96)])
def test_columns_of_a_unit_are_those_that_its_live_channels_need(live: int, columns: int) -> None:
    case = case_of(routing=uneven(1), in_channels=128, in_widths=(live,))
    t, problem, dy = arguments(case)
    with hopper() as launcher:
        before = launcher.multiply_adds()
        right, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
        done = launcher.multiply_adds() - before
        with launcher.planted("HOPPER_NARROW_COLUMNS"):
            wrong, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
    assert done == 64 * 9 * 64 * columns
    differs = (wrong != right).any(dim=(0, 1, 3, 4)).nonzero().flatten()
    assert differs.tolist() == ([live - 1] if live in (65, 97) else [])


PLANTS = {
    "HOPPER_NO_MESSAGE_WAIT": r"race on byte \d+ of the dynamic shared memory: thread 0 writes|deadlock",
    **RING_PLANTS,
}


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    case, multiprocessors = case_of(routing=uneven(9)), 3
    if plant == "HOPPER_NO_MESSAGE_WAIT":  # one block has more units than there are messages, of one patch each
        case, multiprocessors = case_of(routing=uneven(1, 1)), 1
    with hopper(multiprocessors, 3) as launcher:
        t, problem, dy = arguments(case)
        with launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
            hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))


@plain_only
@pytest.mark.parametrize("plant", ["HOPPER_WRONG_TAP", "HOPPER_WRONG_ROW", "HOPPER_BIAS_OF_EVERY_ROW"])
def test_a_planted_bug_spoils_the_result(plant: str) -> None:
    case = case_of(routing=uneven(1))
    with hopper() as launcher:
        t, problem, dy = arguments(case)
        right = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))
        with launcher.planted(plant):
            wrong = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))
    close = [torch.allclose(a, b, rtol=0.1, atol=0.1) for a, b in zip(right[:2], wrong[:2], strict=True)]
    assert close == ([True, False] if "BIAS" in plant else [False, True])


@plain_only
def test_patches_of_narrow_units_take_less_of_the_line_and_each_has_one_block() -> None:
    """72 and 64 output channels, so that patches differ and cuts fall into them."""
    case = case_of(routing=uneven(3, 4), out_channels=72, out_widths=(72, 64))
    t, problem, dy = arguments(case)
    with hopper(5) as launcher:
        right, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
        with launcher.planted("HOPPER_EQUAL_PATCHES"):
            equal, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
        with launcher.planted("HOPPER_PATCH_TWICE"):
            wrong, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
    assert torch.allclose(right, equal, rtol=0.1, atol=0.1) and not torch.allclose(right, wrong, rtol=0.1, atol=0.1)


def arguments(case: ConvCase) -> tuple[ConvTensors, Any, torch.Tensor]:
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    plan = case.routing.plan()
    settings = case.settings()
    routing = (plan.offsets, plan.tiles, plan.weight_index, settings["in_widths"], settings["out_widths"])
    t = ConvTensors(tensors["x"], tensors["weight"], *routing)
    dy = torch.randn(case.routing.batch, case.out_channels, *case.size, generator=torch.Generator().manual_seed(1))
    dy = dy.bfloat16().to(memory_format=torch.channels_last)
    return t, conv_problem("routed_conv2d_wgrad", t, case.stride, case.padding, dy=dy), dy


@pytest.mark.parametrize("garbage", [-(2**31), -7, 5, 2**31 - 1])
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    t, problem, dy = arguments(case_of(routing=uneven(1, 0, 1)))
    groups = problem.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    for sound in range(4):
        routing = list(wrong)
        routing[sound] = torch.zeros_like(routing[sound])
        bad = t._replace(offsets=routing[0], weight_index=routing[1], in_widths=routing[2], out_widths=routing[3])
        with hopper() as launcher:
            hopper_backend.conv2d_wgrad(problem, dy, bad, (True, True, True))
        assert launcher.launched == [kernel.format("bf16") for kernel in KERNELS]
