"""The Hopper form of rows (1x1 filters, linear layers, small images), run in the emulator, equals one per group."""

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
    MASK_PLANTS,
    RING_PLANTS,
    STORE_PLANTS,
    TILES_THAT_ARE_OVER_AT_ONCE,
    assert_a_mask_is_missed,
    assert_accurate,
    assert_messages_are_waited_for,
    conv_case,
    emulator,
    hopper_settings,
    results,
    uneven,
)
from tests.emulator.harness import AT_RUNTIME, SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.generated import examples

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
FAMILY = "conv_hopper_rows"
INPUTS = ("x", "x2")


@contextmanager
def hopper(multiprocessors: int = 3, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with few SMs, so that a block computes several tiles."""
    with emulator((90, multiprocessors, 232448), (FAMILY,), **{FAMILY: AT_RUNTIME}) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    settings = {"in_channels": 64, "out_channels": 64, "size": (8, 8), "filter": (1, 1), "padding": (0, 0)}
    return conv_case(**settings | changes)


THREE_BY_THREE: dict[str, Any] = {"filter": (3, 3), "padding": (1, 1)}
# Changes to a case, and the tiles that forward and dgrad must take.
EDGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "groups of several tiles, several blocks of channels": (
        {"routing": uneven(3, 0, 2), "size": (15, 17), "in_channels": 136, "out_channels": 200},
        "256x128",
        "256x128",
    ),
    "few rows": ({"routing": uneven(1, 2), "size": (8, 8), "in_channels": 72}, "128x64", "128x128"),
    "one pixel": ({"routing": uneven(5, 0, 1, 18), "size": (1, 1), "out_channels": 136}, "128x64", "128x64"),
    "groups that end in the middle of a warp's rows": (
        {"routing": uneven(3, 7, 1), "size": (5, 1)},
        "128x64",
        "128x64",
    ),
    "widths of no multiple": (
        {
            "routing": uneven(1, 1, 1, 1, 0, weight_index=(0, 0, 1, 1, 1)),
            "size": (9, 15),
            "in_channels": 152,
            "out_channels": 144,
            "in_widths": (37, 152, 0, 100, 8),
            "out_widths": (144, 3, 64, 129, 0),
        },
        "256x128",
        "256x128",
    ),
    "two inputs whose seam is no multiple of 64": (
        {
            "routing": uneven(1, 0, 2),
            "size": (9, 9),
            "in_channels": 200,
            "x2_channels": 112,
            "in_widths": (200, 0, 90),
            "out_channels": 136,
        },
        "128x64",
        "128x128",
    ),
    "two inputs with widths on both sides of the seam": (
        {
            "routing": uneven(2, 1, 1, 1),
            "in_channels": 152,
            "x2_channels": 80,
            "in_widths": (37, 72, 77, 152),
            "out_widths": (64, 17, 64, 0),
        },
        "128x64",
        "128x128",
    ),
    "images of 4x4": (
        {"routing": uneven(5, 0, 9, 1), "size": (4, 4), "in_channels": 72, "out_channels": 136, **THREE_BY_THREE},
        "128x64",
        "128x64",
    ),
    "images of 2x8 and two inputs with widths": (
        {
            "routing": uneven(3, 2),
            "size": (2, 8),
            "in_channels": 136,
            "x2_channels": 56,
            "in_widths": (136, 90),
            "out_widths": (64, 30),
            **THREE_BY_THREE,
        },
        "128x64",
        "128x64",
    ),
    "nothing is added": ({"routing": uneven(2), "extras": ()}, "128x64", "128x64"),
}
# fp16 differs from bf16 in products and rounding, not in layout; sanitizers look at addresses.
RAGGED = ("images of 2x8 and two inputs with widths", "groups that end in the middle of a warp's rows")
EDGE_CASES = [(edge, "bf16") for edge in (RAGGED if SANITIZED else EDGES)]
EDGE_CASES += [] if SANITIZED else [(RAGGED[0], "fp16")]


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, *tiles = EDGES[edge]
    with hopper() as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], INPUTS, backend="hopper")
    names = [f"tdc_conv_hopper_rows_{direction}_{dtype}_" for direction in ("forward", "dgrad")]
    assert launcher.launched == [name + tile for name, tile in zip(names, tiles, strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> ConvCase:
    """One input or two; 1x1 filters or 3x3."""
    settings = draw(hopper_settings(of_group=2, of_batch=4, eights=(8, 24)))
    if draw(st.booleans()):
        size = draw(st.sampled_from([(4, 4), (2, 8), (1, 4), (8, 4), (16, 4), (2, 1)]))
        return case_of(size=size, **THREE_BY_THREE, **settings)
    return case_of(size=(draw(st.integers(1, 18)), draw(st.integers(1, 9))), **settings)


def test_any_case_is_as_accurate_as_torch() -> None:
    @given(case=cases(), schedule=st.sampled_from(SCHEDULES))
    @examples(1 if SANITIZED else 5)
    def check(case: ConvCase, schedule: int) -> None:
        with hopper(1, schedule) as launcher:  # with one SM no depth is split
            assert_accurate(case, torch.bfloat16, INPUTS, backend="hopper")
        assert len(launcher.launched) == 2

    check()


# More steps than stages, several tiles for one block, a ragged depth, a ragged end of a group, a residual.
ALL_PARTS = case_of(routing=uneven(2, 1), size=(9, 9), in_channels=456, out_channels=136, x2_channels=232)


@plain_only
def test_results_do_not_depend_on_which_thread_goes_first() -> None:
    found = []
    for schedule in (1, 3):
        with hopper(1, schedule):
            found.append(results(ALL_PARTS, torch.bfloat16, INPUTS, backend="hopper"))
    first, other = found
    assert set(first) == {"y", "dx", "dx2"}
    for name, value in first.items():
        assert torch.equal(other[name], value), name


@plain_only
def test_what_is_not_live_is_not_multiplied() -> None:
    """Depth counts in steps of 16 of each input, columns in quarters of a tile, rows in halves of a tile."""
    case = case_of(
        routing=uneven(1, 1, 2),
        in_channels=152,
        x2_channels=80,
        out_channels=256,
        in_widths=(152, 33, 77),
        out_widths=(256, 96, 129),
        extras=(),
    )
    depths, columns = (80 + 80, 48, 80 + 16), (256, 96, 128 + 64)
    with hopper() as launcher, torch.no_grad():
        before = launcher.multiply_adds()
        results(case, torch.bfloat16, (), backend="hopper")
        done = launcher.multiply_adds() - before
    assert done == sum(64 * samples * depths[g] * columns[g] for g, samples in enumerate((1, 1, 2)))


@plain_only
def test_a_block_gets_more_tiles_than_there_are_messages() -> None:
    case = case_of(size=(8, 8), **TILES_THAT_ARE_OVER_AT_ONCE)
    with hopper(1, 3) as launcher:
        assert_messages_are_waited_for(launcher, case)


PLANTS = {
    **RING_PLANTS,
    **MASK_PLANTS,
    **STORE_PLANTS,
    "HOPPER_WHOLE_ROWS": "global memory",
}


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    changes = {"extras": ("bias",)} if plant == "HOPPER_NO_STORE_WAIT" else {}
    wanted = ("x",) if plant in MASK_PLANTS else ()  # only dgrad masks
    case = case_of(routing=uneven(2, 2), size=(9, 9), in_channels=392, out_channels=136, **changes)
    with hopper(4, 3) as launcher, launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
        results(case, torch.bfloat16, wanted, backend="hopper")


@plain_only
def test_three_quarters_of_the_columns_for_one_channel_more_spoil_the_result() -> None:
    widths = {"in_widths": (97,), "out_widths": (97,)}
    case = case_of(routing=uneven(2), size=(16, 16), in_channels=128, out_channels=128, extras=(), **widths)
    with hopper(1) as launcher:
        right = results(case, torch.bfloat16, ("x",), backend="hopper")
        with launcher.planted("HOPPER_NARROW_COLUMNS"):
            wrong = results(case, torch.bfloat16, ("x",), backend="hopper")
    assert [kernel.rsplit("_", 1)[1] for kernel in launcher.launched] == ["256x128"] * 4
    for name, value in right.items():
        differs = (wrong[name] != value).any(dim=(0, 2, 3))
        assert differs[96] and not differs[:96].any() and not differs[97:].any(), name


@plain_only
@pytest.mark.parametrize("plant", ["HOPPER_WRONG_INPUT", "HOPPER_WRONG_TAP", "HOPPER_WRONG_OFFSET"])
def test_a_planted_bug_spoils_the_result(plant: str) -> None:
    """A block of the wrong input; the weights of another tap; channels of x against the weights of others."""
    case = case_of(routing=uneven(1), size=(4, 4), in_channels=128, x2_channels=64, **THREE_BY_THREE)
    with hopper(1) as launcher, launcher.planted(plant), pytest.raises(AssertionError):
        assert_accurate(case, torch.bfloat16, (), backend="hopper")


@plain_only
def test_values_of_a_gradient_past_its_width_spoil_the_result_without_the_mask() -> None:
    with hopper(1) as launcher:
        assert_a_mask_is_missed(launcher, case_of(routing=uneven(1), size=(8, 8), out_widths=(37,), extras=()))


@plain_only
@pytest.mark.parametrize("plant, error", [("HOPPER_ONE_PATCH", AssertionError), ("HOPPER_SHARED_TWICE", EmulatorError)])
def test_a_planted_bug_in_what_is_left_of_groups_is_found(plant: str, error: type[Exception]) -> None:
    """Four whole tiles of 256 rows and six with 64 or 128, for three blocks."""
    case = case_of(routing=uneven(17, 1, 1, 1, 2, 1), out_channels=128)
    with hopper() as launcher, launcher.planted(plant), pytest.raises(error):
        assert_accurate(case, torch.bfloat16, (), backend="hopper")


@pytest.mark.parametrize("garbage", [-7, 2**31 - 1])
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    case = case_of(routing=uneven(1, 0, 1), size=(5, 3), in_channels=128, x2_channels=56)
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    groups = case.routing.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    for sound in range(4):
        routing = list(wrong)
        routing[sound] = torch.zeros_like(routing[sound])
        extras = {name: tensors[name] for name in ("bias", "sample_bias", "x2")}
        t = ConvTensors(tensors["x"], tensors["weight"], routing[0], case.routing.plan().tiles, *routing[1:], **extras)
        problem = conv_problem("routed_conv2d", t, case.stride, case.padding)
        with hopper() as launcher:
            y = hopper_backend.conv2d(problem, t)
            hopper_backend.conv2d_dgrad(problem, torch.ones_like(y), t)
        assert [kernel.split("_")[4] for kernel in launcher.launched] == ["forward", "dgrad"]
