"""Small routed UNets on a device, batches for them, and what forbids or records what they launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.packing import RoutedModel

NUM_TIMESTEPS, NUM_GROUPS = 100, 4
GROUPS = TimestepGroups([0, 10, 30, 70, NUM_TIMESTEPS])
WIDTHS = (1.0, 0.5, 0.75, 0.25)  # of each expert's units


SHARED = "convolutions:2,attention,level1:3"


def routed_unet(
    device: str, dtype: torch.dtype, *, pruned: bool, seed: int = 0, shared_layers: str = ""
) -> RoutedModel:
    """Four experts that differ, attention in the lower level; zero-initialised layers are made random."""
    torch.manual_seed(seed)
    size, channels = (16, 64) if device == "cuda" else (8, 16)
    experts = []
    for _ in range(NUM_GROUPS):
        expert = create_unet(
            image_size=size, num_channels=channels, num_res_blocks=1, num_heads=2, attention_resolutions=str(size // 2),
            channel_mult="1,2",
        )  # fmt: skip
        for parameter in expert.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        experts.append(expert)
    if pruned:
        widths = WidthPlan.uniform(experts[0], GROUPS.boundaries, WIDTHS)
        return pack_experts(experts[0], GROUPS, widths, shared_layers=shared_layers).to(device, dtype)
    if shared_layers:
        model = pack_experts(experts[0], GROUPS, shared_layers=shared_layers)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        return model.to(device, dtype)
    return pack_experts(experts, GROUPS).to(device, dtype)


def batch_for(model: RoutedModel, seed: int, batch: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, 3, S, S) channels_last, t (B,) in another mix for every seed (some groups may be empty), a target."""
    generator = torch.Generator().manual_seed(seed)
    first = next(model.parameters())
    size = model.model.image_size
    x, target = (torch.randn(batch, 3, size, size, generator=generator) for _ in range(2))
    limit = NUM_TIMESTEPS if seed % 2 else GROUPS.boundaries[2]  # every other batch leaves groups empty
    t = torch.randint(0, int(limit), (batch,), generator=generator)
    x, target = (v.to(first.device, first.dtype, memory_format=torch.channels_last) for v in (x, target))
    return x, t.to(first.device), target


@contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Anything that makes the host wait for the GPU is an error in the block. (The CPU has nothing to wait for.)"""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(device: str, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """(replay, the tensor that every replay writes) of a CUDA graph of `function`; warmed up on a side stream first.

    On the CPU the replay calls the function again.
    """
    if device != "cuda":
        out = function().detach()

        def again() -> None:
            out.copy_(function().detach())

        return again, out
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out.detach()
