"""What users can run today instead of a routed operator, in its fastest forms, on one device.

Every peer gets its samples sorted and the segments' bounds on the host, for which it would have to wait for the device
in practice. None gathers, scatters or concatenates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.timing import Candidate, Machine

Segment = tuple[int, slice]  # expert, samples


def segments_of(sizes: Sequence[int]) -> list[Segment]:
    """Expert and samples of every group that has samples."""
    result, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            result.append((expert, slice(start, start + size)))
        start += size
    return result


def group_sizes(batch: int, num_groups: int, *, uneven: bool) -> list[int]:
    """Samples per group: equal shares, or half of the batch in group 0 and equal shares of the rest."""
    if num_groups == 1 or not uneven:
        return [batch // num_groups + (g < batch % num_groups) for g in range(num_groups)]
    first = batch // 2
    return [first, *group_sizes(batch - first, num_groups - 1, uneven=False)]


def sequence(calls: Sequence[Callable[[], Any]]) -> Candidate:
    """One call after the other on one stream."""
    return lambda: [call() for call in calls]


def on_streams(machine: Machine, calls: Sequence[Callable[[], Any]]) -> Candidate:
    """Each call on its own stream; all streams are joined at the end."""

    def run() -> list[Any]:
        results = []
        with machine.forked(len(calls)) as streams:
            for stream, call in zip(streams, calls, strict=True):
                with stream:
                    results.append(call())
        return results

    return run


def loop_peers(machine: Machine, calls: Sequence[Callable[[], Any]]) -> dict[str, Callable[[], Candidate]]:
    """The forms of the loop over segments, as functions that make the candidate (a capture can fail)."""
    return {
        "loop": lambda: sequence(calls),
        "streams": lambda: on_streams(machine, calls),
        "loop, graph": lambda: machine.captured(sequence(calls)),
        "streams, graph": lambda: machine.captured(on_streams(machine, calls)),
    }


def compiled(machine: Machine, function: Callable[..., Any], *args: Any) -> Candidate:
    """The compiled `function(*args)`; a first call here compiles it."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="inductor" if machine.is_cuda else "eager")
    fast(*args)
    return lambda: fast(*args)


def grouped_matmul(x: Tensor, weight: Tensor, sizes: Sequence[int], stride: int) -> Candidate:
    """The convolution as im2col, then one `torch._grouped_mm` over all segments; it cannot add a bias.

    Args:
        x: images (B, C, H, W), sorted, channels_last, bf16.
        weight: (E, C_out, C_in, R, R).
        sizes: samples per group.
        stride: the same in both directions.

    Raises:
        RuntimeError: when this torch does not have it, or rows are not a multiple of 16 bytes.
    """
    if not hasattr(torch, "_grouped_mm"):
        raise RuntimeError("this version of torch has no _grouped_mm")
    batch, channels, height, width = x.shape
    experts, out_channels, _, taps, _ = weight.shape
    pad = taps // 2
    out_height, out_width = ((n + 2 * pad - taps) // stride + 1 for n in (height, width))
    depth = taps * taps * channels
    if depth % 8 or out_channels % 8:
        raise RuntimeError("rows must be a multiple of 16 bytes")
    matrices = weight.permute(0, 3, 4, 2, 1).reshape(experts, depth, out_channels).contiguous()
    matrices = matrices.transpose(1, 2).contiguous().transpose(1, 2)  # each column-major, as the kernel requires
    ends = torch.tensor(sizes, device=x.device).cumsum(0).mul(out_height * out_width).to(torch.int32)

    def run() -> Tensor:
        nhwc = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1) if pad else x.permute(0, 2, 3, 1)
        patches = nhwc.unfold(1, taps, stride).unfold(2, taps, stride)  # B, OH, OW, C, R, S: a view
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(batch * out_height * out_width, depth)
        return torch._grouped_mm(rows, matrices, offs=ends)

    return run
