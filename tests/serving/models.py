"""Small denoisers for engines: experts, pruned and whole, a single UNet, and one that tests hold up or make fail."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.diffusion import Diffusion, create_diffusion
from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.nn.packing import RoutedModel

SHAPE, CLASSES, NULL_CLASS, NUM_TIMESTEPS = (1, 8, 8), tuple(range(5)), 5, 40


def unet(seed: int = 0, *, learn_sigma: bool = False, class_cond: bool = True) -> UNet:
    """An 8x8 UNet with attention and random weights in all layers."""
    torch.manual_seed(seed)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, num_heads=2, attention_resolutions="4", channel_mult="1,2",
        in_channels=1, class_cond=class_cond, num_classes=len(CLASSES) + 1, learn_sigma=learn_sigma,
    )  # fmt: skip
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def experts(*, pruned: bool = False, learn_sigma: bool = False, class_cond: bool = True) -> RoutedModel:
    """Four experts of different weights, or of one base at different widths."""
    groups = TimestepGroups([0, 5, 12, 30, NUM_TIMESTEPS])
    options = {"learn_sigma": learn_sigma, "class_cond": class_cond}
    if pruned:
        base = unet(**options)
        return pack_experts(base, groups, WidthPlan.uniform(base, groups.boundaries, (1.0, 0.5, 0.75, 0.5))).eval()
    return pack_experts([unet(seed, **options) for seed in range(4)], groups).eval()


def process(**options) -> Diffusion:
    """A cosine process of 40 steps."""
    return create_diffusion(NUM_TIMESTEPS, noise_schedule="cosine", **options)


class Scripted(nn.Module):
    """Shrinks its input; before every call it waits for `gate` and runs `before(number of the call, batch size)`."""

    def __init__(self, before: Callable[[int, int], object] = lambda call, rows: None) -> None:
        super().__init__()
        self.before, self.gate = before, threading.Event()
        self.gate.set()
        self.calls: list[int] = []
        self.reached = threading.Event()  # a call is in the model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.reached.set()
        assert self.gate.wait(60)
        self.calls.append(len(x))
        self.before(len(self.calls), len(x))
        return 0.1 * x + t.view(-1, 1, 1, 1) / 1000
