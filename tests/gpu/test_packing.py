"""Packing on a GPU moves the same bits as on the CPU: channels by every expert's order, cut to its widths."""

from __future__ import annotations

import pytest
import torch

from tdc_fast import WidthPlan, pack_experts
from tdc_fast.models.iddpm import create_unet
from tdc_fast.ops.pack import pack_channels
from tests.gpu.networks import GROUPS, WIDTHS, no_synchronisation
from tests.gpu.problems import on_device

EXPERTS, SHAPES = 3, {"bias": (40,), "linear": (40, 24), "conv": (40, 24, 3, 3)}


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("experts", [1, EXPERTS], ids=["one base", "experts"])
def test_channels_are_permuted_and_cut(kind: str, experts: int, dtype: torch.dtype, device: str) -> None:
    generator, shape = torch.Generator().manual_seed(0), SHAPES[kind]
    source = torch.randn(experts, *shape, generator=generator).to(dtype)
    arguments = {}
    for name, channels, live in (
        ("out", shape[0], (40, 16, 0)),
        ("in", shape[-1 if len(shape) < 4 else 1], (24, 8, 3)),
    ):
        if name == "in" and len(shape) == 1:
            continue
        orders = [torch.randperm(channels, generator=generator)[: channels - 8] for _ in range(EXPERTS)]
        arguments[f"{name}_order"] = torch.stack(orders).to(torch.int32)
        arguments[f"{name}_widths"] = torch.tensor(live, dtype=torch.int32).clamp(max=channels - 8)
    expected = pack_channels(source, **arguments)
    there = {name: value.to(device) for name, value in arguments.items()}
    on_there = source.to(device)
    pack_channels(on_there, **there)  # loads the kernel
    with no_synchronisation(device):
        packed = pack_channels(on_there, **there)
    assert torch.equal(packed.cpu(), expected)


@on_device
def test_a_model_packed_on_the_device_is_the_one_packed_on_the_cpu(device: str) -> None:
    torch.manual_seed(0)
    base = create_unet(image_size=8, num_channels=16, num_res_blocks=1, attention_resolutions="4", channel_mult="1,2")
    expected = pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, WIDTHS)).state_dict()
    base = base.to(device)
    packed = pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, WIDTHS)).state_dict()
    assert packed.keys() == expected.keys()
    for name, value in packed.items():
        assert value.device.type == device and torch.equal(value.cpu(), expected[name]), name
