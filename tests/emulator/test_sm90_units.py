"""Hopper's units in the emulator do what was seen on the hardware: boxes of TMA, operands of wgmma, mbarriers."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.emulator import sm90
from tests.emulator.harness import SCHEDULES, EmulatorError

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Small integers, whose products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


BOXES = {
    "inside": ((2, 9, 10, 128), (64, 4, 3, 2), (64, 5, 6, 0)),
    "past the first pixel": ((2, 8, 8, 64), (64, 10, 10, 1), (0, -1, -1, 1)),
    "past the last pixel, sample and channel": ((3, 8, 8, 72), (64, 4, 4, 2), (64, 6, 6, 2)),
    "three dimensions": ((3, 20, 64), (64, 16, 2), (0, 8, 2)),
    "five dimensions": ((2, 3, 4, 5, 64), (64, 2, 3, 2, 2), (0, 4, -1, 1, 1)),
}


@pytest.mark.parametrize("schedule", [0, 3])
@pytest.mark.parametrize("case", BOXES)
def test_a_box_lands_swizzled_with_zeros_outside_of_the_tensor(case: str, schedule: int) -> None:
    shape, box, at = BOXES[case]
    tensor = numbers(*shape)
    expected = sm90.box_of(tensor, box, at)
    out = torch.empty_like(expected)
    sm90.run(
        "box", sm90.tensor_map(tensor, box), bytes(128), out, at=at, count=expected.numel() // 8, schedule=schedule
    )
    assert torch.equal(out, sm90.swizzled(expected, window=1024))


@pytest.mark.parametrize("case", BOXES)
def test_a_stored_box_changes_what_lies_inside_and_nothing_else(case: str) -> None:
    shape, box, at = BOXES[case]
    source, target = numbers(*shape), torch.full(shape, 99, dtype=torch.bfloat16)
    maps = [sm90.tensor_map(tensor, box) for tensor in (source, target)]
    sm90.run("box", *maps, at=at, count=sm90.box_of(source, box, at).numel() // 8, mode=1)
    covered = sm90.box_of(source, box, at).count_nonzero()
    assert covered and torch.equal(target[target != 99], source[target != 99])
    inside = sm90.box_of(torch.ones(shape), box, at).sum()
    assert (target != 99).sum() == inside


def test_a_tensor_map_that_the_driver_would_refuse_is_refused() -> None:
    tensor = numbers(2, 8, 8, 64)
    for wrong, message in (
        (sm90.tensor_map(tensor.flatten()[4:4100].view(1, 8, 8, 64), (64, 8, 8, 1)), "address"),
        (sm90.tensor_map(tensor, (32, 8, 8, 1)), "innermost box is 32"),
        (sm90.tensor_map(tensor, (64, 300, 8, 1)), "box is 300"),
        (sm90.tensor_map(numbers(2, 8, 8, 68)[..., :64], (64, 8, 8, 1)), "stride is 136"),
    ):
        with pytest.raises(EmulatorError, match=f"the tensor map's {message}"):
            sm90.run("box", wrong, bytes(128), torch.empty(4), at=(0, 0, 0, 0), count=8)


class Encoding(NamedTuple):
    """One operand: its box, and the fields of its descriptor, as they gave exact results on an H200."""

    outer: bool
    tensor: tuple[int, ...]  # (samples, height, width, channels)
    box: tuple[int, ...]  # 64 channels, width, height, samples
    leading: int
    stride: int
    step: int  # bytes, to 16 further along k
    start: int = 0
    boxes: int = 1

    def matrix(self, tensor: Tensor) -> Tensor:
        """The matrix (rows, k) that the operand stands for."""
        _, height, width, channels = self.tensor
        pixels = tensor.view(height * width, channels)
        if self.stride != 1024:  # a patch of 8 x 8 pixels
            first = self.start // 128
            row, column = first // width, first % width
            pixels = pixels.view(height, width, channels)[row : row + 8, column : column + 8].reshape(64, channels)
        return pixels.T if self.outer else pixels


def patch(width: int, height: int, pixel: int, outer: bool, boxes: int = 1) -> Encoding:
    """A patch of 8 x 8 pixels, from some pixel on, in a wider box."""
    box_bytes = -(-width * height * 128 // 1024) * 1024
    tensor = (1, height, width, 64 * boxes)
    step = 2 * width * 128 if outer else 32
    return Encoding(outer, tensor, (64, width, height, 1), box_bytes, width * 128, step, pixel * 128, boxes)


ROWS = Encoding(False, (1, 1, 64, 64), (64, 64, 1, 1), 16, 1024, 32)
COLUMNS_128 = Encoding(False, (1, 1, 128, 64), (64, 64, 1, 1), 16, 1024, 32, boxes=2)
WEIGHTS_OUTER = Encoding(True, (1, 1, 64, 128), (64, 64, 1, 1), 8192, 1024, 2048, boxes=2)
ROWS_OUTER = Encoding(True, (1, 1, 64, 64), (64, 64, 1, 1), 16, 1024, 2048)
# a, b, mode of the kernel: the five rows of the table that was verified on the hardware, all taps of the wider boxes.
ENCODINGS = {
    "rows in order": (ROWS, COLUMNS_128, 0),
    "weights with k outside": (ROWS, WEIGHTS_OUTER, 1),
    "both with k outside": (ROWS_OUTER, WEIGHTS_OUTER, 2),
    **{f"a patch in a box 18 wide, tap {tap}": (patch(18, 18, tap // 3 * 18 + tap % 3, False), COLUMNS_128, 0)
       for tap in range(9)},
    **{f"a patch in boxes 10 wide with k outside, tap {tap}": (ROWS_OUTER, patch(10, 8, tap, True, boxes=2), 2)
       for tap in range(3)},
}  # fmt: skip
PATCH = patch(18, 18, 19, False)


def product(a: Encoding, b: Encoding, mode: int, **changes: int) -> Tensor:
    """a b^T by wgmma, with changes to the descriptors, and what it should be."""
    tensors = numbers(*a.tensor, seed=1), numbers(*b.tensor, seed=2)
    maps = [sm90.tensor_map(tensor, of.box) for tensor, of in zip(tensors, (a, b), strict=True)]
    out = torch.full((64, 128), torch.nan)
    one_box = 128 * b.box[1] * b.box[2]
    fields = {"start_a": a.start, "leading_a": a.leading, "stride_a": a.stride, "step_a": a.step}
    fields |= {"start_b": b.start, "leading_b": b.leading, "stride_b": b.stride, "step_b": b.step}
    count = 128 * a.box[1] * a.box[2] + b.boxes * one_box
    fields |= {"boxes_b": b.boxes, "distance_b": one_box, "count": count, "mode": mode}
    sm90.run("wgmma", *maps, out, threads=128, **(fields | changes))
    expected = a.matrix(tensors[0]).float() @ b.matrix(tensors[1]).float().T
    return torch.stack([out, expected])


@pytest.mark.parametrize("case", ENCODINGS)
def test_an_encoding_verified_on_the_hardware_gives_the_product(case: str) -> None:
    ours, exact = product(*ENCODINGS[case])
    assert torch.equal(ours, exact)


@pytest.mark.parametrize("mode, columns, boxes", [(3, 64, 1), (4, 96, 2), (5, 192, 3), (6, 144, 3)])
def test_every_width_of_the_product_is_right(mode: int, columns: int, boxes: int) -> None:
    b = Encoding(False, (1, 1, 64 * boxes, 64), (64, 64, 1, 1), 16, 1024, 32, boxes=boxes)
    a, w = numbers(1, 1, 64, 64, dtype=torch.float16), numbers(*b.tensor, dtype=torch.float16, seed=5)
    tensors = [sm90.tensor_map(tensor, (64, 64, 1, 1)) for tensor in (a, w)]
    out = torch.full((64, columns), torch.nan)
    sm90.run(
        "wgmma", *tensors, out, threads=128, boxes_b=boxes, distance_b=8192, leading_a=16, leading_b=16, stride_a=1024,
        stride_b=1024, step_a=32, step_b=32, count=8192 * (1 + boxes), mode=mode,
    )  # fmt: skip
    assert torch.equal(out, a.view(64, 64).float() @ w.view(-1, 64)[:columns].float().T)


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
    assert torch.equal(sm90.pipeline(a, b, schedule), expected)
