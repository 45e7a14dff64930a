"""What the CPU suites time: shapes, groups and tensors, the same for every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from tdc_fast import RoutingPlan

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ConvCase:
    """A convolution of stride 1 with "same" padding, over a batch that spans all groups.

    Attributes:
        batch: B.
        channels: input and output channels.
        size: H = W.
        num_groups: N.
        filter_size: R = S.
        uneven: half of the batch is in group 0.
    """

    batch: int
    channels: int
    size: int
    num_groups: int
    filter_size: int = 3
    uneven: bool = False

    def __str__(self) -> str:
        spread = "-uneven" if self.uneven else ""
        tap = "" if self.filter_size == 3 else f"-{self.filter_size}x{self.filter_size}"
        return f"B{self.batch}-C{self.channels}-{self.size}x{self.size}-N{self.num_groups}{tap}{spread}"


CONV_CASES = [
    ConvCase(64, 32, 8, 8),
    ConvCase(128, 32, 16, 8),
    ConvCase(64, 128, 8, 8),
    ConvCase(32, 128, 16, 4),
    ConvCase(64, 64, 8, 8, uneven=True),
    ConvCase(64, 64, 16, 8, filter_size=1),
]


def group_ids(batch: int, num_groups: int, *, uneven: bool = False) -> torch.Tensor:
    """Group of each sample (batch,), shuffled: equal shares, or half of the batch in group 0 and the rest anywhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(batch) % num_groups
    if uneven:
        ids[: batch // 2] = 0
    return ids[torch.randperm(batch, generator=generator)]


def channels_last(model: Model) -> Model:
    """The model itself, its convolution weights in channels_last memory."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's annotations


class ConvInputs:
    """The tensors of a case, fp32.

    Attributes:
        x: images (B, C, H, W), channels_last.
        weight: (N, C, C, R, R).
        bias: (N, C).
        dy: gradient of the output, like x.
        groups: group of each sample (B,).
        plan: the plan of these groups.
        sorted_x: x sorted by the plan.
        padding: pixels on each side.
    """

    def __init__(self, case: ConvCase) -> None:
        torch.manual_seed(0)
        self.case = case
        b, c, s, r = case.batch, case.channels, case.size, case.filter_size
        self.padding = r // 2
        self.x = torch.randn(b, c, s, s).contiguous(memory_format=torch.channels_last)
        self.weight = torch.randn(case.num_groups, c, c, r, r) / (c * r * r) ** 0.5
        self.bias = torch.randn(case.num_groups, c)
        self.dy = torch.randn(b, c, s, s).contiguous(memory_format=torch.channels_last)
        self.groups = group_ids(b, case.num_groups, uneven=case.uneven)
        self.plan = RoutingPlan.from_groups(self.groups, case.num_groups)
        self.sorted_x = self.plan.sort(self.x)

    def half_widths(self) -> torch.Tensor:
        """Half of the channels for every group, int32 (N,)."""
        return torch.full((self.case.num_groups,), self.case.channels // 2, dtype=torch.int32)
