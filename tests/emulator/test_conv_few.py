"""The kernels for layers with few channels on one side, run in the emulator, equal one convolution per group."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from tests.cases import ConvCase
from tests.emulator.conv import (
    DTYPES,
    HALVES,
    assert_accurate,
    assert_nothing_dead_is_used,
    conv_case,
    emulator,
    results,
    uneven,
)
from tests.emulator.harness import SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# (compute capability * 10, SMs, bytes of shared memory of a block).
FACTS = (90, 3, 232448)
# What a first or last layer may be: channels, images that no tile divides, groups of any size, shared experts, widths.
LAYERS: dict[str, dict[str, Any]] = {
    "first": {"in_channels": 3, "out_channels": 40, "size": (9, 11)},
    "last": {"in_channels": 40, "out_channels": 6, "size": (9, 11)},
    "first, several channel tiles": {"in_channels": 4, "out_channels": 200, "size": (8, 8), "routing": uneven(1, 1)},
    "last, several channel tiles": {"in_channels": 136, "out_channels": 3, "size": (8, 8), "routing": uneven(1, 1)},
    "first, shared experts and widths": {
        "routing": uneven(1, 0, 2, 1, weight_index=(1, 0, 0, 1)),
        "in_channels": 3,
        "out_channels": 72,
        "size": (8, 9),
        "in_widths": (3, 3, 2, 0),
        "out_widths": (72, 8, 37, 64),
    },
    "last, shared experts and widths": {
        "routing": uneven(1, 0, 2, 1, weight_index=(1, 0, 0, 1)),
        "in_channels": 72,
        "out_channels": 6,
        "size": (8, 9),
        "in_widths": (0, 8, 37, 64),
        "out_widths": (6, 1, 4, 5),
    },
    "seven channels, every entry": {"in_channels": 7, "out_channels": 8, "size": (8, 8), "routing": uneven(1)},
    "one channel": {"in_channels": 8, "out_channels": 1, "size": (13, 5), "routing": uneven(1, 2)},
    "first, several runs": {"in_channels": 3, "out_channels": 16, "size": (24, 24), "routing": uneven(1, 2)},
    "last, several runs and steps": {"in_channels": 16, "out_channels": 3, "size": (24, 24), "routing": uneven(2, 1)},
    "first, a large group and small ones": {
        "in_channels": 3,
        "out_channels": 16,
        "size": (16, 16),
        "routing": uneven(0, 4, 1, 0, 1, 1, 1, weight_index=(0, 3, 1, 1, 0, 2, 3)),
        "out_widths": (16, 16, 9, 4, 16, 0, 8),
    },
    "a filter of one": {"in_channels": 24, "out_channels": 4, "filter": (1, 1), "padding": (0, 0), "size": (8, 9)},
    "a flat filter": {"in_channels": 2, "out_channels": 24, "filter": (5, 3), "padding": (2, 1), "size": (7, 10)},
}
EXTRAS = ((), ("bias",), ("bias", "sample_bias", "residual"))


def few_emulator() -> AbstractContextManager[EmulatorLauncher]:
    """The launcher of these kernels and of those that make sums for biases."""
    return emulator(FACTS, ("conv_few_images", "conv_few_wgrad", "conv_wgrad"))


def layer(name: str, extras: tuple[str, ...] = ("bias",)) -> ConvCase:
    return conv_case(extras=extras, **LAYERS[name])


# Under sanitizers one of each side, with all that can be given, and one of every entry.
@pytest.mark.parametrize("name", [name for name in LAYERS if not SANITIZED or "widths" in name or "seven" in name])
def test_results_and_gradients_are_as_accurate_as_torchs(name: str) -> None:
    number = list(LAYERS).index(name)
    extras = EXTRAS[number % len(EXTRAS)]
    with few_emulator() as launcher:
        assert_accurate(layer(name, extras), DTYPES[HALVES[number % len(HALVES)]])
    widens = LAYERS[name]["in_channels"] < LAYERS[name]["out_channels"]
    images = [kernel for kernel in launcher.launched if "_to_" in kernel]
    assert len(images) == 2 and images[0].startswith("tdc_conv_few_to_many" if widens else "tdc_conv_many_to_few")
    assert len({kernel[: len("tdc_conv_few_to_many")] for kernel in images}) == 2
    wgrads = [kernel for kernel in launcher.launched if "wgrad" in kernel]
    assert len(wgrads) == 2 and all("few_wgrad" in kernel for kernel in wgrads)
    # The bias comes out of the same launches, but where there are biases per sample.
    assert any("sums" in kernel for kernel in launcher.launched) == ("sample_bias" in extras)


@plain_only
def test_blocks_of_wgrad_have_equal_work_whatever_the_groups() -> None:
    """Even groups, half of the batch in one, and all of it; the first launch multiplies, the second one adds."""
    found = []
    for samples in ((2,) * 8, (8, 2, 1, 1, 1, 1, 1, 1), (0, 16, 0)):
        case = conv_case(in_channels=3, out_channels=16, size=(16, 16), routing=uneven(*samples), extras=())
        with few_emulator() as launcher:
            found.append(busiest_of_each(launcher, case)["tdc_conv_few_wgrad_bf16_32"])
    assert found[0] > 0 and len(set(found)) == 1


def busiest_of_each(launcher: EmulatorLauncher, case: ConvCase) -> dict[str, int]:
    """The most multiply-adds that a block of each launch has run."""
    found, run = {}, launcher.run

    def one_by_one(launches: Iterable[Any], device: torch.device | None = None) -> None:
        for launch in launches:
            run([launch], device)
            found[launch.kernel] = launcher.busiest_block()

    launcher.run = one_by_one  # type: ignore[method-assign]
    results(case, torch.bfloat16, ("weight",))
    return found


DEAD = {
    "first": {"in_channels": 6, "out_channels": 72, "in_widths": (5, 3), "out_widths": (37, 70)},
    "last": {"in_channels": 72, "out_channels": 6, "in_widths": (37, 70), "out_widths": (5, 3)},
}


def dead(name: str) -> ConvCase:
    return conv_case(routing=uneven(1, 2), size=(8, 9), **DEAD[name])


@pytest.mark.parametrize("name", DEAD)
def test_nothing_dead_is_used(name: str) -> None:
    with few_emulator() as launcher:
        assert_nothing_dead_is_used(dead(name), torch.bfloat16)
    assert {kernel.partition("_bf16")[0] for kernel in launcher.launched} >= {
        "tdc_conv_few_to_many", "tdc_conv_many_to_few", "tdc_conv_few_wgrad",
    }  # fmt: skip


@plain_only
def test_dead_channels_of_a_foreign_gradient_that_are_used_are_noticed() -> None:
    with few_emulator() as launcher, launcher.planted("FEW_KEEPS_DEAD"), pytest.raises(AssertionError):
        assert_nothing_dead_is_used(dead("first"), torch.bfloat16)


@plain_only
def test_sums_do_not_depend_on_which_thread_goes_first() -> None:
    with few_emulator() as launcher:
        found = []
        for launcher.schedule in SCHEDULES:
            found.append(results(layer("last, shared experts and widths"), torch.bfloat16))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@plain_only
@pytest.mark.parametrize(
    "bug, name, wanted",
    [
        ("FEW_NO_WAIT", "first", "weight"),
        ("FEW_NO_BARRIER", "first", "weight"),
        ("FEW_WRONG_TAP", "first", "weight"),
        ("FEW_NOT_FLIPPED", "last", "weight"),
        ("FEW_ONE_SLOT", "first", "weight"),
        ("FEW_NO_BARRIER", "first", ""),
        ("FEW_WRONG_TAP", "first", ""),
        ("FEW_COLUMNS_IN_PLACE", "first", ""),
        ("FEW_NO_BARRIER", "last, several runs and steps", ""),
        ("FEW_TOO_EARLY", "last, several runs and steps", ""),
        ("FEW_NOT_FLIPPED", "last", "x"),
        ("FEW_NOT_FLIPPED", "first", "x"),
    ],
)
def test_a_planted_bug_is_caught(bug: str, name: str, wanted: str) -> None:
    with few_emulator() as launcher, launcher.planted(bug), pytest.raises((AssertionError, EmulatorError)):
        assert_accurate(layer(name), torch.bfloat16, (wanted,))
