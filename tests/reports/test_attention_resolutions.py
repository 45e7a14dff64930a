"""The plan of a run says where its model has attention, and which requested resolutions no level has."""

from __future__ import annotations

import pytest

from tdc_fast.models.blocks import AttentionBlock
from tdc_fast.runs.build import build_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.unet_flags import attention_sizes, differing_flags
from tdc_fast.training.messages import describe_plan


def config_of(size: int, **flags) -> TrainConfig:
    return TrainConfig(image_size=size, num_channels=8, num_heads=2, num_res_blocks=1, **flags)


@pytest.mark.parametrize(
    ("size", "flags", "found"),
    [
        (32, {}, [16, 8]),
        (64, {}, [16, 8]),
        (96, {}, []),  # levels of 96, 48, 24 and 12 pixels
        (48, {}, []),
        (28, {}, [28]),  # 28 // 16 is 1: full resolution, as in improved-diffusion
        (20, {}, [20, 10]),
        (96, {"attention_resolutions": "24,12"}, [24, 12]),
        (32, {"attention_resolutions": ""}, []),
        (32, {"channel_mult": "1,2"}, [16]),
    ],
)
def test_the_sizes_with_attention_are_those_of_the_model(size, flags, found):
    config = config_of(size, **flags)
    levels, sizes = attention_sizes(config)
    assert sizes == found
    model = build_unet(config, 3)
    blocks = [isinstance(layer, AttentionBlock) for block in model.input_blocks for layer in block]
    assert sum(blocks) == len(found) * config.num_res_blocks
    assert len(levels) == len(config.channel_mult.split(",")) if config.channel_mult else levels[0] == size
    assert not [flag for flag in differing_flags(model.state_dict(), config) if "attention" in flag]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (32, "attention at 16, 8 pixels and in the middle block (4 pixels)\n"),
        (96, "attention only in the middle block (12 pixels); no level has 16, 8 of --attention_resolutions, levels"),
        (28, "attention at 28 pixels and in the middle block (7 pixels); no level has 16, 8 of"),
    ],
)
def test_the_plan_says_which_requested_resolutions_the_model_lacks(tmp_path, size, said):
    run = RunDirectory(tmp_path, config_of(size, data_dir="digits"), {"in_channels": 1, "identity": ""})
    assert said in describe_plan(run, [None] * 5) + "\n"
