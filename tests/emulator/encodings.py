"""Boxes of TMA and operands of wgmma as Hopper's kernels use them, for the emulator and for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.emulator import sm90
from tests.emulator.sm90 import EMULATED, NO_MAP, Machine


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Small integers, whose products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


class Box(NamedTuple):
    """A box of a tensor, the innermost dimension first, and where it begins."""

    shape: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    # The tensor is every other line and column of images of odd height, so that the stride of samples is no multiple of
    # that of lines.
    plane: bool = False

    def stored(self, tensor: Tensor, device: str) -> Tensor:
        """The tensor in the memory of a device."""
        if not self.plane:
            return tensor.to(device)
        samples, height, width, channels = tensor.shape
        images = torch.zeros(samples, 2 * height - 1, 2 * width - 1, channels, dtype=tensor.dtype, device=device)
        images[:, ::2, ::2] = tensor.to(device)
        return images[:, ::2, ::2]


BOXES = {
    "inside": Box((2, 9, 10, 128), (64, 4, 3, 2), (64, 5, 6, 0)),
    "past the first pixel": Box((2, 8, 8, 64), (64, 10, 10, 1), (0, -1, -1, 1)),
    "past the last pixel, sample and channel": Box((3, 8, 8, 72), (64, 4, 4, 2), (64, 6, 6, 2)),
    "three dimensions": Box((3, 20, 64), (64, 16, 2), (0, 8, 2)),
    "five dimensions": Box((2, 3, 4, 5, 64), (64, 2, 3, 2, 2), (0, 4, -1, 1, 1)),
    "a plane of images of odd height": Box((3, 5, 6, 128), (64, 4, 4, 2), (64, 3, 2, 1), plane=True),
}


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


def inner(boxes: int) -> Encoding:
    """64 columns per box, in rows of 64 k."""
    return Encoding(False, (1, 1, 64 * boxes, 64), (64, 64, 1, 1), 16, 1024, 32, boxes=boxes)


def outer(boxes: int) -> Encoding:
    """The same with k outside."""
    return Encoding(True, (1, 1, 64, 64 * boxes), (64, 64, 1, 1), 8192, 1024, 2048, boxes=boxes)


ROWS = Encoding(False, (1, 1, 64, 64), (64, 64, 1, 1), 16, 1024, 32)
COLUMNS_128, WEIGHTS_OUTER = inner(2), outer(2)
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


# Columns, a, b, mode of the kernel: every width that a kernel multiplies, also those that end inside a box of 64.
WIDTHS = {
    **{f"k inside, {columns} columns": (columns, ROWS, inner(boxes), mode)
       for mode, columns, boxes in ((3, 64, 1), (4, 96, 2), (5, 192, 3), (6, 144, 3), (13, 32, 1), (14, 48, 1))},
    **{f"k of b outside, {columns} columns": (columns, ROWS, outer(boxes), mode)
       for mode, columns, boxes in ((7, 64, 1), (8, 96, 2), (9, 144, 3), (10, 192, 3), (15, 32, 1), (16, 48, 1))},
    **{f"k outside, {columns} columns of a patch": (columns, ROWS_OUTER, patch(10, 8, 1, True, boxes=2), mode)
       for mode, columns in ((11, 64), (12, 96))},
}  # fmt: skip
HALVES = (3, 4, 5, 6, 8, 10, 11, 13, 16)  # modes in fp16


def product(
    a: Encoding, b: Encoding, mode: int, columns: int = 128, machine: Machine = EMULATED, **changes: int
) -> Tensor:
    """a b^T by wgmma, with changes to the descriptors, and what it should be."""
    dtype = torch.float16 if mode in HALVES else torch.bfloat16
    tensors = [numbers(*of.tensor, dtype=dtype, seed=seed) for seed, of in enumerate((a, b), 1)]
    there = [tensor.to(machine.device) for tensor in tensors]
    maps = [sm90.tensor_map(tensor, of.box) for tensor, of in zip(there, (a, b), strict=True)]
    out = torch.full((64, columns), torch.nan, device=machine.device)
    one_box = 128 * b.box[1] * b.box[2]
    fields = {"start_a": a.start, "leading_a": a.leading, "stride_a": a.stride, "step_a": a.step}
    fields |= {"start_b": b.start, "leading_b": b.leading, "stride_b": b.stride, "step_b": b.step}
    count = 128 * a.box[1] * a.box[2] + b.boxes * one_box
    fields |= {"boxes_b": b.boxes, "distance_b": one_box, "count": count, "mode": mode}
    sm90.run("wgmma", *maps, out, threads=128, machine=machine, **(fields | changes))
    expected = a.matrix(tensors[0]).float() @ b.matrix(tensors[1])[:columns].float().T
    return torch.stack([out.cpu(), expected])


def loaded(case: str, machine: Machine = EMULATED) -> Tensor:
    """A box as it lies in shared memory, and how it should."""
    shape, box, at, _ = BOXES[case]
    tensor = numbers(*shape)
    expected = sm90.box_of(tensor, box, at)
    there, out = BOXES[case].stored(tensor, machine.device), torch.empty_like(expected, device=machine.device)
    sm90.run("box", sm90.tensor_map(there, box), NO_MAP, out, at=at, count=expected.numel() // 8, machine=machine)
    return torch.stack([out.cpu(), sm90.swizzled(expected, window=1024)])


def stored(case: str, machine: Machine = EMULATED) -> Tensor:
    """A tensor into which a box of another was stored, and what it should be."""
    shape, box, at, _ = BOXES[case]
    source, target = numbers(*shape), torch.full(shape, 99, dtype=torch.bfloat16)
    there = [BOXES[case].stored(tensor, machine.device) for tensor in (source, target)]
    maps = [sm90.tensor_map(tensor, box) for tensor in there]
    sm90.run("box", *maps, at=at, count=sm90.box_of(source, box, at).numel() // 8, mode=1, machine=machine)
    inner = zip(reversed(shape), box, at, strict=True)
    covered = [slice(max(first, 0), min(first + extent, size)) for size, extent, first in inner]
    expected = target.clone()
    expected[tuple(reversed(covered))] = source[tuple(reversed(covered))]
    return torch.stack([there[1].cpu(), expected])


def stored_by_rows(machine: Machine = EMULATED) -> Tensor:
    """The same of a box of 16 rows that is stored row by row, from multiples of 128 bytes in shared memory."""
    source, target = numbers(3, 40, 72), torch.full((3, 40, 72), 99, dtype=torch.bfloat16)
    there = [tensor.to(machine.device) for tensor in (source, target)]
    maps = [sm90.tensor_map(tensor, (64, rows, 1)) for tensor, rows in zip(there, (16, 1), strict=True)]
    sm90.run("box", *maps, at=(0, 7, 1), count=16 * 8, mode=2, machine=machine)
    expected = target.clone()
    expected[1, 7:23, :64] = source[1, 7:23, :64]
    return torch.stack([there[1].cpu(), expected])
