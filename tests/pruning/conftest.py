"""A small UNet, its process and its images, shared by the tests of pruning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.diffusion import Diffusion, create_diffusion
from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.pruning.costs import UnitCosts, unit_costs


@pytest.fixture(scope="session")
def unet() -> UNet:
    torch.manual_seed(0)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, num_heads=2, channel_mult="1,2", in_channels=1,
        attention_resolutions="4",
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="session")
def diffusion() -> Diffusion:
    return create_diffusion(noise_schedule="cosine")


@pytest.fixture(scope="session")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="session")
def unet_costs(unet: UNet, images: list[Tensor]) -> UnitCosts:
    return unit_costs(unet, images[0])
