"""The Hopper form of rows with a split depth: a cluster of blocks computes a tile, and sums are added in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from tests.emulator.harness import SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.generated import examples
from tests.ops.test_conv2d import routed

# Under sanitizers the form of rows runs: this one differs in where sums lie, which the race check sees.
pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), plain_only]
FAMILIES = ("conv_hopper_rows_split", "conv_hopper_rows")


@contextmanager
def hopper(multiprocessors: int, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with more SMs than tiles. Clusters of 4 blocks need 16."""
    with emulator((90, multiprocessors, 232448), FAMILIES) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    settings = {"in_channels": 264, "out_channels": 64, "size": (4, 4), "filter": (3, 3), "padding": (1, 1)}
    return conv_case(**settings | changes)


POINTWISE: dict[str, Any] = {"filter": (1, 1), "padding": (0, 0)}
# Three tiles for two clusters of two blocks.
SEVERAL: dict[str, Any] = {"routing": uneven(9, 1), "in_channels": 128}
# Changes to a case, which input has a gradient, SMs, and what the kernels must be.
EDGES: dict[str, tuple[dict[str, Any], tuple[str, ...], int, tuple[str, ...]]] = {
    "groups that end in the middle of a tile, an empty one": (
        {"routing": uneven(3, 0, 1)},
        (),
        16,
        ("split4_forward_{}_128x64",),
    ),
    "several tiles for a cluster": (SEVERAL, (), 4, ("split2_forward_{}_128x64",)),
    "widths that leave blocks without channels, dead channels": (
        {"routing": uneven(5, 2, 1), "in_channels": 1024, "in_widths": (40, 300, 0), "out_widths": (64, 17, 30)}
        | POINTWISE,
        (),
        16,
        ("split4_forward_{}_128x64",),
    ),
    "two inputs, their gradients": (
        {"routing": uneven(1, 1), "size": (8, 8), "in_channels": 192, "x2_channels": 72, "out_channels": 192},
        ("x", "x2"),
        16,
        ("split2_forward_{}_128x64", "split2_dgrad_{}_128x64"),
    ),
    "a gradient that masks, with nothing added": (
        {"routing": uneven(1), "in_channels": 72, "out_channels": 264, "out_widths": (250,), "extras": ()},
        ("x",),
        32,
        ("split4_forward_{}_128x64", "split4_dgrad_{}_128x64"),
    ),
}
RAGGED = "widths that leave blocks without channels, dead channels"
EDGE_CASES = [*((edge, "bf16") for edge in EDGES), (RAGGED, "fp16")]


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, inputs, multiprocessors, kernels = EDGES[edge]
    with hopper(multiprocessors) as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], inputs, backend="hopper")
    assert launcher.launched == [f"tdc_conv_hopper_rows_{kernel.format(dtype)}" for kernel in kernels]


@st.composite
def cases(draw: st.DrawFn) -> ConvCase:
    """Few samples, deep enough for clusters; one input or two; 1x1 filters or 3x3."""
    if draw(st.booleans()):
        size, filter_, least = (draw(st.integers(1, 9)), draw(st.integers(1, 5))), POINTWISE, 65
    else:
        size, filter_, least = draw(st.sampled_from([(4, 4), (2, 8), (1, 4), (8, 4)])), {}, 8
    settings = draw(hopper_settings(of_group=3, of_batch=5, eights=(least, least + 9)))
    return case_of(size=size, **filter_, **settings)


def test_any_case_is_as_accurate_as_torch() -> None:
    """With 264 SMs clusters have four blocks; with 48 two, four, or there are none."""

    @given(case=cases(), schedule=st.sampled_from(SCHEDULES), multiprocessors=st.sampled_from([264, 48]))
    @examples(3)
    def check(case: ConvCase, schedule: int, multiprocessors: int) -> None:
        with hopper(multiprocessors, schedule) as launcher:
            assert_accurate(case, torch.bfloat16, ("x", "x2"), backend="hopper")
        assert len(launcher.launched) == 2
        assert multiprocessors == 48 or all("split4" in kernel for kernel in launcher.launched)

    check()


def test_results_do_not_depend_on_which_thread_goes_first() -> None:
    found = []
    for schedule in (1, 3):
        with hopper(4, schedule):
            found.append(results(case_of(**SEVERAL), torch.bfloat16, (), backend="hopper")["y"])
    assert torch.equal(*found)


def same_rows(plant: str = "") -> torch.Tensor:
    """y of equal samples, whose four parts of the depth are large, small, small, and the first one's opposite."""
    case = case_of(routing=uneven(128), size=(1, 1), in_channels=1024, extras=(), **POINTWISE)
    tensors = {name: t.detach() for name, t in case.tensors(torch.float16).items()}
    x, weight = tensors["x"][:1].clone(), tensors["weight"].clone()
    weight[:, :, :256] *= 64
    weight[:, :, 768:] = -weight[:, :, :256]
    x[:, 768:] = x[:, :256]
    tensors |= {"x": x.repeat(128, 1, 1, 1).contiguous(memory_format=torch.channels_last), "weight": weight}
    with hopper(16) as launcher, launcher.planted(plant), torch.no_grad():
        y = routed(case, tensors, backend="hopper")
    assert launcher.launched == ["tdc_conv_hopper_rows_split4_forward_fp16_128x64"]
    return y


def test_equal_samples_have_equal_results_wherever_they_are_in_a_tile() -> None:
    y = same_rows()
    assert torch.equal(y, y[:1].expand_as(y))
    wrong = same_rows("HOPPER_OWN_PART_FIRST")
    assert not torch.equal(wrong, wrong[:1].expand_as(wrong))


PLANTS = {
    **RING_PLANTS,
    "HOPPER_NO_PART_WAIT": "arrivals in a phase|race on byte",
    "HOPPER_NO_PART_FULL_WAIT": "race on byte|deadlock",
    "HOPPER_RANK_IN_OPERAND": "its leading offset is 272, .* more than 18 bits",
    "HOPPER_NO_CLUSTER_BEGIN": "whose block need not have begun",
    "HOPPER_NO_CLUSTER_END": "whose block may have ended",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    with hopper(4) as launcher, launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
        results(case_of(**SEVERAL), torch.bfloat16, (), backend="hopper")


@pytest.mark.parametrize("plant", ["HOPPER_WRONG_TAP", "HOPPER_WRONG_OFFSET"])
def test_a_planted_bug_spoils_the_result(plant: str) -> None:
    """The weights of another tap; channels of x against the weights of others."""
    with hopper(4) as launcher, launcher.planted(plant), pytest.raises(AssertionError):
        assert_accurate(case_of(**SEVERAL), torch.bfloat16, (), backend="hopper")
