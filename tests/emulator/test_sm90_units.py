"""Hopper's units in the emulator do what was seen on the hardware: boxes of TMA, operands of wgmma, mbarriers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.emulator import sm90
from tests.emulator.encodings import (
    BOXES,
    COLUMNS_128,
    ENCODINGS,
    PATCH,
    ROWS,
    WEIGHTS_OUTER,
    WIDTHS,
    loaded,
    numbers,
    product,
    stored,
    stored_by_rows,
)
from tests.emulator.harness import SCHEDULES, EmulatorError, emulated

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.mark.parametrize("schedule", [0, 3])
@pytest.mark.parametrize("case", BOXES)
def test_a_box_lands_swizzled_with_zeros_outside_of_the_tensor(case: str, schedule: int) -> None:
    assert torch.equal(*loaded(case, sm90.Emulated(schedule)))


@pytest.mark.parametrize("case", BOXES)
def test_a_stored_box_changes_what_lies_inside_and_nothing_else(case: str) -> None:
    ours, expected = stored(case)
    assert torch.equal(ours, expected) and (expected != 99).any()


def test_a_row_is_stored_from_any_multiple_of_128_bytes() -> None:
    assert torch.equal(*stored_by_rows())


def test_a_tensor_map_that_the_driver_would_refuse_is_refused() -> None:
    tensor = numbers(2, 8, 8, 64)
    for wrong, message in (
        (sm90.tensor_map(tensor.flatten()[4:4100].view(1, 8, 8, 64), (64, 8, 8, 1)), "address"),
        (sm90.tensor_map(tensor, (32, 8, 8, 1)), "innermost box is 32"),
        (sm90.tensor_map(tensor, (64, 300, 8, 1)), "box is 300"),
        (sm90.tensor_map(numbers(2, 8, 8, 68)[..., :64], (64, 8, 8, 1)), "stride is 136"),
    ):
        with pytest.raises(EmulatorError, match=f"the tensor map's {message}"):
            sm90.run("box", wrong, sm90.NO_MAP, torch.empty(4), at=(0, 0, 0, 0), count=8)


class NamesNoMaps(sm90.Emulated):
    """Leaves tensor maps as they are described, which means nothing to a GPU's copy engine."""

    def launch(self, *launch: Any) -> None:
        super().launch(*launch[:5])


def test_a_tensor_map_that_the_launch_does_not_name_is_none() -> None:
    with pytest.raises(EmulatorError, match="no encoded tensor map: its place is not among those"):
        loaded("inside", NamesNoMaps())
    for place in (32, 320):
        with pytest.raises(EmulatorError, match=f"no tensor map can be at byte {place} of 384"):
            emulated("self_test_sm90").encoded(bytes(384), [place])


@pytest.mark.parametrize("case", ENCODINGS)
def test_an_encoding_verified_on_the_hardware_gives_the_product(case: str) -> None:
    ours, exact = product(*ENCODINGS[case])
    assert torch.equal(ours, exact)


@pytest.mark.parametrize("case", WIDTHS)
def test_every_width_of_the_product_is_right(case: str) -> None:
    columns, a, b, mode = WIDTHS[case]
    assert torch.equal(*product(a, b, mode, columns))


WRONG = {
    "leading and stride offset swapped": (ROWS, WEIGHTS_OUTER, {"leading_b": 1024, "stride_b": 8192}, 1),
    "the step of k inside": (ROWS, WEIGHTS_OUTER, {"step_b": 32}, 1),
    "the next tap": (PATCH, COLUMNS_128, {"start_a": PATCH.start + 128}, 0),
    "rows in order in a wider box": (PATCH, COLUMNS_128, {"stride_a": 1024}, 0),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_wrong_on_the_hardware_is_wrong_here(case: str) -> None:
    a, b, changes, mode = WRONG[case]
    ours, exact = product(a, b, mode)
    assert torch.equal(ours, exact)
    ours, exact = product(a, b, mode, **changes)
    assert (ours != exact).float().mean() > 0.4  # the hardware differed in about half of the elements


@schedules
def test_a_pipeline_of_copies_and_products_gives_the_product(schedule: int) -> None:
    a, b = numbers(64, 5 * 64, seed=1), numbers(64, 5 * 64, seed=2)
    exact = a.double() @ b.double().T
    expected = torch.stack([exact, 2 * exact]).to(torch.bfloat16)
    assert torch.equal(sm90.pipeline(a, b, machine=sm90.Emulated(schedule)), expected)
