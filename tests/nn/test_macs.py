"""MACs counted in less time are those that torch's FlopCounterMode counts."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.macs import MacCounter


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_macs_are_half_of_torchs_flops(mode: Any, device: str) -> None:
    """In inference mode torch itself has not yet taken operators such as linear apart."""
    model = create_unet(image_size=8, num_channels=8, in_channels=1, channel_mult=(1, 2)).to(device)
    x, t = torch.zeros(2, 1, 8, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)

    def run() -> None:
        with mode():
            y = model(x, t)
        if y.requires_grad:
            y.sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    with MacCounter() as ours:
        run()
    assert 2 * ours.macs == counter.get_total_flops() > 0
