"""An argument of another type than it should have is named, with its value and the remedy, wherever users call in."""

from __future__ import annotations

import pytest
import torch

from tdc_fast import RoutingPlan, TimestepGroups, routed_conv2d
from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.diffusion import Diffusion, StratifiedSampler, UniformSampler, create_diffusion
from tdc_fast.diffusion.sampling_loop import sample
from tdc_fast.models.iddpm import create_unet
from tdc_fast.train import train

PROCESS = create_diffusion(diffusion_steps=20, noise_schedule="cosine")
SHAPE = (2, 1, 4, 4)


def nothing(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("device", lambda: sample(PROCESS, nothing, SHAPE, device="foo")),
        ("generator", lambda: sample(PROCESS, nothing, SHAPE, generator=3)),
        ("shape", lambda: sample(PROCESS, nothing, "abc")),
        ("betas", lambda: Diffusion(["a"])),
        ("attention_resolutions", lambda: create_unet(attention_resolutions=[0])),
        ("attention_resolutions", lambda: create_unet(attention_resolutions=4)),
        ("channel_mult", lambda: create_unet(channel_mult=None)),
        ("data_dir", lambda: load_dataset(None)),
        ("fraction", lambda: load_dataset("digits").split("a")),
        ("images", lambda: ImageDataset.from_array([1])),
        ("config", lambda: train(None)),
        ("batch_size", lambda: UniformSampler(10).sample(-1)),
        ("batch_size", lambda: StratifiedSampler(TimestepGroups.uniform(10, 2)).sample(-1)),
        ("padding", lambda: convolve(padding=2**40)),
    ],
)
def test_the_argument_is_named(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: got .*; expected "):
        call()


def convolve(**settings):
    plan = RoutingPlan.from_groups(torch.zeros(1, dtype=torch.int64), 1)
    return routed_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 2, 3, 3), None, plan, **settings)


def test_attention_resolutions_may_be_a_sequence():
    settings = {"image_size": 8, "num_channels": 8, "num_res_blocks": 1, "num_heads": 1, "channel_mult": (1, 2)}
    one = create_unet(attention_resolutions=[4], **settings)
    assert one.state_dict().keys() == create_unet(attention_resolutions="4", **settings).state_dict().keys()
