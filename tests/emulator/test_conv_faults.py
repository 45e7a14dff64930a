"""Faults in the convolution kernels that must be noticed, and bad device data that must do no harm."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.kernels.problems import ConvTensors
from tdc_fast.ops import cuda
from tdc_fast.ops.checks import conv_problem
from tests.cases import ConvCase
from tests.emulator.conv import assert_accurate, assert_nothing_dead_is_used, conv_case, emulator, uneven
from tests.emulator.harness import SCHEDULES, EmulatorError, plain_only

# More steps than stages, several warps, several taps.
CASE = conv_case(in_channels=40, out_channels=40, size=(9, 8), filter=(3, 1), padding=(1, 0))
FUSED = conv_case(in_channels=40, out_channels=40, x2_channels=24, size=(4, 4), upsample=2)
FEW = {"size": (8, 9), "extras": ("bias",)}
FIRST, LAST = conv_case(in_channels=3, **FEW), conv_case(out_channels=6, **FEW)
MERGED = conv_case(in_channels=40, out_channels=40, size=(4, 4), upsample=2)


def caught(family: str, plant: str, schedule: int) -> bool:
    """Whether the emulator or the comparison with fp64 notices a bug planted in a family of kernels."""
    case, wanted = (CASE, ("weight",) if family == "conv_wgrad" else ())
    if family == "conv_dgrad":
        case, wanted = (MERGED if "MERGES" in plant else FUSED), ("x",)
    with emulator(families=(family,)) as launcher, launcher.planted(plant):
        launcher.schedule = schedule
        try:
            assert_accurate(case, torch.bfloat16, wanted)
        except (AssertionError, EmulatorError):
            return True
    return False


@plain_only
@pytest.mark.parametrize(
    "family, plant",
    [
        ("conv_forward", "CONV_NO_WAIT"),
        ("conv_forward", "CONV_WRONG_STAGE"),
        ("conv_forward", "CONV_WRONG_TAP"),
        ("conv_wgrad", "CONV_WRONG_TAP"),
        ("conv_dgrad", "CONV_ONE_PIXEL_OF_FOUR"),
        ("conv_dgrad", "CONV_MERGES_HALF"),
    ],
)
def test_a_planted_bug_is_caught_under_every_schedule(family: str, plant: str) -> None:
    assert all(caught(family, plant, schedule) for schedule in SCHEDULES)


@plain_only
def test_a_missing_barrier_is_caught_under_some_schedule() -> None:
    assert any(caught("conv_forward", "CONV_NO_BARRIER", schedule) for schedule in SCHEDULES)


@plain_only
@pytest.mark.parametrize("plant", ["CONV_KEEPS_DEAD", "CONV_KEEPS_DEAD_WEIGHTS", "CONV_STORES_DEAD"])
def test_dead_channels_that_are_used_or_stored_are_noticed(plant: str) -> None:
    """Those of dy and of the weights in the last 16 bytes that have live ones; results past the width."""
    case = conv_case(routing=uneven(1, 1), in_channels=40, out_channels=40, in_widths=(33, 8), out_widths=(3, 37))
    with emulator() as launcher, launcher.planted(plant), pytest.raises(AssertionError):
        assert_nothing_dead_is_used(case, torch.bfloat16)


GARBAGE = (-(2**31), -7, 5, 2**31 - 1)


@pytest.mark.parametrize("case", [CASE, FUSED, FIRST, LAST], ids=["plain", "fused", "first", "last"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int, case: ConvCase) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    x, weight, batch, groups = tensors["x"], tensors["weight"], case.routing.batch, case.routing.num_groups

    def filled(*shape: int) -> torch.Tensor:
        return torch.full(shape, garbage, dtype=torch.int32)

    offsets, index, widths, tiles = filled(groups + 1), filled(groups), filled(groups), filled(100, 3)
    tiles[:, 0] = torch.arange(100) % groups
    for sound in range(4):
        routing = [offsets, index, widths, widths]
        routing[sound] = torch.zeros_like(routing[sound])
        t = ConvTensors(x, weight, routing[0], case.routing.plan().tiles, *routing[1:], x2=tensors.get("x2"))
        problem = conv_problem("conv2d", t, case.stride, case.padding, case.upsample)
        t = t._replace(tiles=tiles)
        dy = torch.ones((batch, case.out_channels, *case.out_size), dtype=x.dtype)
        with emulator():
            y = cuda.conv2d(problem, t)
            dx, _ = cuda.conv2d_dgrad(problem, dy, t)
            grads = cuda.conv2d_wgrad(problem, dy, t, (True, True, True))
        assert y.shape == dy.shape and dx.shape == x.shape and grads[0].shape == weight.shape
