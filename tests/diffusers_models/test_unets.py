"""Our UNet and `UNet2DModel` of diffusers are one network where they can be, and what differs is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

from diffusers import UNet2DModel  # noqa: E402

from tdc_fast.diffusers_models import from_diffusers, to_diffusers  # noqa: E402
from tdc_fast.models.iddpm import UNet  # noqa: E402
from tests.models.test_iddpm import randomise  # noqa: E402

OURS: dict[str, dict[str, Any]] = {
    "one head": {"num_res_blocks": 1, "attention_resolutions": [2]},
    "scale and shift, heads, classes": {
        "num_res_blocks": 2, "attention_resolutions": [2, 4], "channel_mult": (1, 2, 2), "num_heads": 4,
        "use_scale_shift_norm": True, "num_classes": 3, "out_channels": 6,
    },
}  # fmt: skip


def ours(**settings: Any) -> UNet:
    arguments = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 3, "channel_mult": (1, 2)}
    arguments |= {"num_res_blocks": 1, "attention_resolutions": [2]}
    return randomise(UNet(**{**arguments, **settings}), 0)


@pytest.mark.parametrize("name", OURS)
def test_both_compute_the_same_there_and_back(name: str) -> None:
    unet = ours(**OURS[name])
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    y = torch.tensor([0, 2, 1]) if unet.num_classes else None
    theirs = to_diffusers(unet)
    expected = unet(x, t, y)
    torch.testing.assert_close(theirs(x, t, class_labels=y).sample, expected, rtol=1e-4, atol=1e-5)
    back = from_diffusers(theirs)
    assert back.architecture == {**unet.architecture, "dropout": 0.0}
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_resample": False}, "conv_resample: got False"),
        ({"num_heads": 2, "attention_resolutions": [1, 2]}, r"num_heads: got 2; .* \[16, 32\]"),
        ({"model_channels": 24, "channel_mult": (1, 2, 4)}, "model_channels: got 24"),
        ({"widths": {"middle_block.0": 32}}, "unet.widths"),
    ],
)
def test_what_diffusers_does_not_have_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_diffusers(ours(**settings))


def test_rescaled_timesteps_are_named() -> None:
    unet = ours()
    unet.timestep_scale = 10.0
    with pytest.raises(ValueError, match="unet.timestep_scale: got 10.0"):
        to_diffusers(unet)
    with pytest.raises(ValueError, match="unet: got 'Linear'"):
        to_diffusers(torch.nn.Linear(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"downsample_padding": 0}, "config.downsample_padding: got 0"),
        ({"flip_sin_to_cos": False}, "config.flip_sin_to_cos: got False"),
        ({"down_block_types": ("DownBlock2D", "DownBlock2D")}, "config.up_block_types"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "config.down_block_types"),
        ({"block_out_channels": (32, 48), "norm_num_groups": 16}, r"config.block_out_channels: got \[32, 48\]"),
        ({"norm_num_groups": 16}, "config.norm_num_groups: got 16"),
        ({"resnet_time_scale_shift": "scale_shift"}, "config.attn_norm_num_groups: got None; expected norm_num_groups"),
        ({"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
         "config.attention_head_dim"),
    ],
)  # fmt: skip
def test_what_our_unet_does_not_have_is_named(settings: dict[str, Any], message: str) -> None:
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    levels = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        from_diffusers(UNet2DModel(**{**types, **levels, **settings}))
