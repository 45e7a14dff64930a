"""The Hopper form of wgrad of 1x1 filters, linear layers and small images equals that of one per group."""

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
from tests.emulator.conv import DTYPES, MASK_PLANTS, RING_PLANTS, assert_accurate, conv_case, emulator, results, uneven
from tests.emulator.harness import SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.emulator.test_conv_hopper_rows import THREE_BY_THREE, cases
from tests.generated import examples

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
GRADIENTS = ("weight", "bias")


@contextmanager
def hopper(multiprocessors: int = 4, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with few SMs, so that cuts divide units."""
    # A forward of few tiles may be split. The last one has the sums of biases of images of few pixels.
    families = ("conv_hopper_rows", "conv_hopper_rows_split", "conv_hopper_rows_wgrad", "conv_wgrad")
    with emulator((90, multiprocessors, 232448), families) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    settings = {"in_channels": 64, "out_channels": 64, "size": (8, 8), "filter": (1, 1), "padding": (0, 0)}
    return conv_case(**settings | {"extras": ("bias", "sample_bias")} | changes)


# Changes to a case, the input channels of a unit, and the SMs.
EDGES: dict[str, tuple[dict[str, Any], int, int]] = {
    "several units each way": (
        {"routing": uneven(2), "size": (8, 9), "in_channels": 264, "out_channels": 200},
        384,
        3,
    ),
    "more SMs than units": ({"routing": uneven(3, 0, 2), "size": (16, 9), "in_channels": 200}, 256, 20),
    "one pixel": ({"routing": uneven(5, 0, 1, 18), "size": (1, 1), "in_channels": 72, "out_channels": 136}, 128, 3),
    "two inputs": (
        {"routing": uneven(1, 2), "size": (5, 9), "in_channels": 536, "x2_channels": 152, "out_channels": 72},
        384,
        5,
    ),
    "experts that several groups share, and one that none has, with two inputs": (
        {
            "routing": uneven(1, 2, 0, 1, 1, weight_index=(2, 0, 2, 2, 0)),
            "in_channels": 136,
            "x2_channels": 48,
            "size": (7, 10),
            "out_channels": 72,
            "in_widths": (136, 100, 8, 37, 128),
            "out_widths": (72, 64, 72, 3, 9),
        },
        128,
        7,
    ),
    "images of 4x4": ({"routing": uneven(5, 0, 9), "size": (4, 4), "out_channels": 136, **THREE_BY_THREE}, 128, 4),
    "images of 8x4, two inputs, experts that groups share": (
        {
            "routing": uneven(1, 3, 1, weight_index=(1, 0, 1)),
            "size": (8, 4),
            "in_channels": 264,
            "x2_channels": 64,
            "in_widths": (264, 230, 70),
            "out_widths": (64, 37, 9),
            **THREE_BY_THREE,
        },
        256,
        5,
    ),
    "widths of single groups": (
        {
            "routing": uneven(1, 2, 1),
            "in_channels": 200,
            "out_channels": 136,
            "in_widths": (37, 0, 200),
            "out_widths": (130, 136, 64),
        },
        256,
        4,
    ),
}
# fp16 differs from bf16 in products and rounding, not in layout; sanitizers look at addresses.
SHARED = "experts that several groups share, and one that none has, with two inputs"
EDGE_CASES = [(edge, "bf16") for edge in ([SHARED, "several units each way"] if SANITIZED else EDGES)]
EDGE_CASES += [] if SANITIZED else [("two inputs", "fp16")]
# Where the biases of samples have gradients, too.
WITH_SAMPLES = (SHARED, "several units each way", "one pixel", "two inputs", "images of 4x4")


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, channels, multiprocessors = EDGES[edge]
    wanted = (*GRADIENTS, "sample_bias") if edge in WITH_SAMPLES else GRADIENTS
    with hopper(multiprocessors) as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], wanted, backend="hopper")
    unit = f"rows{channels}_{dtype}"
    expected = [f"tdc_conv_hopper_wgrad_{unit}", f"tdc_conv_hopper_wgrad_reduce_{unit}"]
    if edge == "one pixel":
        expected += ["tdc_conv_sample_sums_bf16", "tdc_conv_expert_sums_bf16"]
    assert launcher.launched[1:] == expected


@plain_only
def test_any_case_is_as_accurate_as_torch() -> None:
    @given(case=cases(), schedule=st.sampled_from(SCHEDULES), multiprocessors=st.integers(1, 9))
    @examples(3)
    def check(case: ConvCase, schedule: int, multiprocessors: int) -> None:
        with hopper(multiprocessors, schedule):
            assert_accurate(case, torch.bfloat16, GRADIENTS, backend="hopper")

    check()


@plain_only
@pytest.mark.parametrize(
    "channels, live, columns",
    [
        (384, 64, 64),
        (384, 128, 128),
        (384, 129, 192),
        (384, 192, 192),
        (384, 257, 320),
        (384, 321, 384),
        (256, 100, 128),
    ],
)
def test_blocks_of_a_unit_are_those_that_its_live_channels_need(channels: int, live: int, columns: int) -> None:
    """The unit after it finds what its sums hold from this one, in blocks that it does not multiply."""
    case = case_of(routing=uneven(1, 1), in_channels=channels, in_widths=(channels, live), extras=())
    t, problem, dy = arguments(case)
    with hopper(1) as launcher:
        before = launcher.multiply_adds()
        right, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
        done = launcher.multiply_adds() - before
        with launcher.planted("HOPPER_NARROW_COLUMNS"):
            wrong, *_ = hopper_backend.conv2d_wgrad(problem, dy, t, (True, False, False))
    assert launcher.launched[0] == f"tdc_conv_hopper_wgrad_rows{channels}_bf16"
    assert done == 64 * 64 * (channels + columns)
    differs = (wrong != right).any(dim=(1, 3, 4)).nonzero().tolist()
    assert differs == ([[1, live - 1]] if live % 64 == 1 else [])


@plain_only
def test_results_do_not_depend_on_timing() -> None:
    case = case_of(routing=uneven(2, 3), size=(9, 9))
    found = []
    for schedule in (0, 3):
        with hopper(4, schedule):
            found.append(results(case, torch.bfloat16, GRADIENTS, backend="hopper"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("dweight", "dbias"))


def arguments(case: ConvCase) -> tuple[ConvTensors, Any, torch.Tensor]:
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    plan, settings = case.routing.plan(), case.settings()
    routing = (plan.offsets, plan.tiles, plan.weight_index, settings["in_widths"], settings["out_widths"])
    t = ConvTensors(tensors["x"], tensors["weight"], *routing, x2=tensors.get("x2"))
    dy = torch.randn(case.routing.batch, case.out_channels, *case.size, generator=torch.Generator().manual_seed(1))
    dy = dy.bfloat16().to(memory_format=torch.channels_last)
    return t, conv_problem("routed_conv2d_wgrad", t, case.stride, case.padding, dy=dy), dy


PLANTS = {
    **RING_PLANTS,
    "HOPPER_BIAS_BEFORE_MASK": r"race on byte \d+ of the dynamic shared memory",
}


# Two groups of one expert, of which the first has fewer channels: its dy is masked, and so are the pixels of its end.
TWO_WIDTHS: dict[str, Any] = {
    "routing": uneven(1, 1, weight_index=(0, 0)), "size": (5, 9), "out_widths": (37, 64), "extras": ()
}  # fmt: skip


@plain_only
def test_values_of_a_gradient_past_its_width_spoil_the_result_without_the_mask() -> None:
    case = case_of(**TWO_WIDTHS)
    with hopper(1) as launcher:
        assert_accurate(case, torch.bfloat16, ("weight",), backend="hopper")
        with launcher.planted("HOPPER_NO_MASK"), pytest.raises(AssertionError):
            assert_accurate(case, torch.bfloat16, ("weight",), backend="hopper")


@plain_only
@pytest.mark.parametrize("plant", MASK_PLANTS)
def test_a_bug_planted_in_the_mask_is_reported(plant: str) -> None:
    with hopper(1, 3) as launcher, launcher.planted(plant), pytest.raises(EmulatorError, match=MASK_PLANTS[plant]):
        results(case_of(**TWO_WIDTHS), torch.bfloat16, ("weight",), backend="hopper")


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    with hopper(1, 3) as launcher:
        t, problem, dy = arguments(case_of(routing=uneven(9), size=(8, 9)))
        with launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
            hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))


@plain_only
@pytest.mark.parametrize(
    "plant, changes, spoiled",
    [
        ("HOPPER_WRONG_TAP", {"in_channels": 256}, [True, False]),  # the wrong block of input channels
        ("HOPPER_NO_LAST_PIXEL", {}, [True, True]),  # the pixels of the next group
        ("HOPPER_WRONG_ROW", THREE_BY_THREE, [True, False]),  # the wrong tap
        ("HOPPER_BIAS_OF_EVERY_ROW", THREE_BY_THREE, [False, True]),
    ],
)
def test_a_planted_bug_spoils_the_result(plant: str, changes: dict[str, Any], spoiled: list[bool]) -> None:
    with hopper() as launcher:
        t, problem, dy = arguments(case_of(routing=uneven(1, 1), size=(4, 4), **changes))
        right = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))
        with launcher.planted(plant):
            wrong = hopper_backend.conv2d_wgrad(problem, dy, t, (True, True, False))
    close = [torch.allclose(a, b, rtol=0.1, atol=0.1) for a, b in zip(right[:2], wrong[:2], strict=True)]
    assert close == [not spoils for spoils in spoiled]


@pytest.mark.parametrize("garbage", [-7, 2**31 - 1])
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    t, problem, dy = arguments(case_of(routing=uneven(1, 0, 1), size=(5, 4), in_channels=128, x2_channels=56))
    groups = problem.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    for sound in range(4):
        routing = list(wrong)
        routing[sound] = torch.zeros_like(routing[sound])
        bad = t._replace(offsets=routing[0], weight_index=routing[1], in_widths=routing[2], out_widths=routing[3])
        with hopper() as launcher:
            hopper_backend.conv2d_wgrad(problem, dy, bad, (True, True, True))
        assert len(launcher.launched) == 2
