"""The improved-diffusion UNet routed over 8 experts, against one dense model over the same batch and a loop.

Both are in fp32 and channels_last; a mixed batch of 64. A training step is forward, loss and backward (gradients);
with a fused AdamW step on top the routed model updates all eight experts' parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bench.cases import channels_last
from bench.compare import compare
from tdc_fast import RoutedModel, TimestepGroups, WidthPlan, pack_experts
from tdc_fast.models.iddpm import UNet

BATCH, NUM_GROUPS, NUM_TIMESTEPS = 64, 8, 1000


@dataclass(frozen=True)
class UNetCase:
    """Image size and ResBlocks per level."""

    size: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}-{self.blocks}-block"


by_case = pytest.mark.parametrize("case", [UNetCase(8, 1), UNetCase(16, 2)], ids=str)


class Problem:
    """A dense base, its routed model of N identical experts, and a batch that spans all groups."""

    def __init__(self, case: UNetCase) -> None:
        torch.manual_seed(0)
        self.groups = TimestepGroups.uniform(NUM_TIMESTEPS, NUM_GROUPS)
        base = UNet(
            image_size=case.size,
            in_channels=3,
            model_channels=32,
            out_channels=3,
            num_res_blocks=case.blocks,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_heads=4,
            use_scale_shift_norm=True,
        )
        self.base = channels_last(base)
        for parameter in self.base.parameters():  # zero-initialised layers would make some products trivial
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        self.x = torch.randn(BATCH, 3, case.size, case.size).contiguous(memory_format=torch.channels_last)
        self.target = torch.randn_like(self.x)
        self.t = torch.randint(0, NUM_TIMESTEPS, (BATCH,))

    def routed(self, *, half: bool = False) -> RoutedModel:
        """The routed model, every pruning unit at half width if `half`."""
        widths = WidthPlan.uniform(self.base, self.groups.boundaries, 0.5) if half else None
        return pack_experts(self.base, self.groups, widths)


def loop_over(experts: nn.ModuleList, groups: TimestepGroups):
    """The usual way to run experts: gather each one's samples, run it, put the results back in order."""

    def forward(x: Tensor, t: Tensor) -> Tensor:
        ids = groups.group_of(t)
        indices = [(ids == g).nonzero().squeeze(1) for g in range(len(experts))]
        parts = [e(x[i], t[i]) for e, i in zip(experts, indices, strict=True) if i.numel()]
        return torch.cat(parts).index_select(0, torch.cat(indices).argsort())

    return forward


def training_step(forward, parameters, p: Problem, *, optimizer: bool):
    """A call that runs forward, loss and backward, and an AdamW update if `optimizer`."""
    parameters = list(parameters)
    adam = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if optimizer else None

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        nn.functional.mse_loss(forward(p.x, p.t), p.target).backward()
        if adam is not None:
            adam.step()

    return step


@by_case
def test_forward(benchmark, case: UNetCase):
    p = Problem(case)
    routed = p.routed()
    looped = loop_over(nn.ModuleList(routed.expert(i) for i in range(NUM_GROUPS)), p.groups)
    with torch.no_grad():
        compare(
            benchmark,
            lambda: routed(p.x, p.t),
            {"dense": lambda: p.base(p.x, p.t), "loop": lambda: looped(p.x, p.t)},
        )


@by_case
@pytest.mark.parametrize("optimizer", [False, True], ids=["gradients", "gradients + AdamW"])
def test_training_step(benchmark, case: UNetCase, optimizer: bool):
    p = Problem(case)
    routed = p.routed()
    experts = nn.ModuleList(routed.expert(i) for i in range(NUM_GROUPS))
    compare(
        benchmark,
        training_step(routed, routed.parameters(), p, optimizer=optimizer),
        {
            "dense": training_step(p.base, p.base.parameters(), p, optimizer=optimizer),
            "loop": training_step(loop_over(experts, p.groups), experts.parameters(), p, optimizer=optimizer),
        },
    )


@by_case
def test_half_width_forward(benchmark, case: UNetCase):
    """Every pruning unit at half width, against full width; the dense model and its narrowed twin do the same."""
    p = Problem(case)
    full, half = p.routed(), p.routed(half=True)
    narrow = channels_last(half.expert(0))
    with torch.no_grad():
        compare(
            benchmark,
            lambda: half(p.x, p.t),
            {
                "full width": lambda: full(p.x, p.t),
                "dense": lambda: p.base(p.x, p.t),
                "dense at half width": lambda: narrow(p.x, p.t),
            },
        )


@by_case
def test_half_width_training_step(benchmark, case: UNetCase):
    p = Problem(case)
    full, half = p.routed(), p.routed(half=True)
    narrow = channels_last(half.expert(0))
    compare(
        benchmark,
        training_step(half, half.parameters(), p, optimizer=False),
        {
            "full width": training_step(full, full.parameters(), p, optimizer=False),
            "dense": training_step(p.base, p.base.parameters(), p, optimizer=False),
            "dense at half width": training_step(narrow, narrow.parameters(), p, optimizer=False),
        },
    )
