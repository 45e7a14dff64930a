"""Memory layouts that kernels need: values stay, and copies are made only where the layout differs."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.ops.layout import aligned, channel_innermost, empty_channel_innermost, nhwc


@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 3), (2, 3, 1, 3, 3), (2, 3, 4, 1, 1), (1, 1, 5, 1, 3)])
def test_channel_innermost_keeps_values_and_copies_only_what_is_not_so(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    ordered = channel_innermost(weight)
    assert torch.equal(ordered, weight)
    assert ordered.permute(0, 1, 3, 4, 2).is_contiguous()
    assert channel_innermost(ordered) is ordered
    made = empty_channel_innermost(shape, weight.dtype)
    assert made.shape == shape and channel_innermost(made) is made


def test_nhwc_and_alignment_copy_only_where_they_must() -> None:
    x = torch.randn(2, 3, 4, 5)
    ordered = nhwc(x)
    assert ordered.stride() == (60, 1, 15, 3) and torch.equal(ordered, x)
    assert nhwc(ordered).data_ptr() == ordered.data_ptr()
    memory = torch.randn(64)
    assert aligned(memory) is memory
    moved = aligned(memory[1:])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, memory[1:])
