"""The model flags that can be read off a UNet's state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tdc_fast.models.iddpm import default_channel_mult
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.limits import comma_numbers


def differing_flags(state: Mapping[str, Tensor], config: TrainConfig) -> list[str]:
    """The flags, with values, that a UNet's state dict shows and that differ from the configuration."""
    try:
        found = flags_of(state, config.image_size)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return []
    return [f"--{name} {value}" for name, value in found.items() if not _agrees(name, value, config)]


def other_project(state: Mapping[str, Tensor]) -> str:
    """Which other project's network a state dict is of, in words; "" if it is none that is known here."""
    names = set(state)
    if any(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name) for name in names):
        return "a UNet of guided-diffusion, which samples up and down in residual blocks (resblock_updown)"
    if "input_blocks.0.0.weight" in names and not any(name.startswith("output_blocks.") for name in names):
        return "a classifier of guided-diffusion"
    if "conv_in.weight" in names and any(name.startswith("down_blocks.") for name in names):
        return "a UNet of diffusers"
    return ""


def flags_of(state: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
    """The flags that improved-diffusion's UNet was built with, from the names and shapes of its parameters.

    num_heads, dropout and the flags of the diffusion process cannot be seen in them.

    Args:
        state: the state dict.
        image_size: H = W of the images.

    Raises:
        KeyError: it is no such UNet.
    """
    first = state["input_blocks.0.0.weight"]
    channels, in_channels = first.shape[:2]
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))
    levels: list[list[int]] = [[]]
    attention: set[int] = set()
    for index in range(1, count):
        if f"input_blocks.{index}.0.in_layers.2.weight" in state:
            levels[-1].append(state[f"input_blocks.{index}.0.in_layers.2.weight"].shape[0])
            if f"input_blocks.{index}.1.qkv.weight" in state:
                attention.add(image_size >> (len(levels) - 1))
        else:
            levels.append([])
    embedding = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    flags: dict[str, Any] = {
        "in_channels": in_channels,
        "num_channels": channels,
        "channel_mult": ",".join(str(widths[0] // channels) for widths in levels),
        "num_res_blocks": len(levels[0]),
        "attention_resolutions": ",".join(map(str, sorted(attention, reverse=True))),
        "learn_sigma": state["out.2.weight"].shape[0] == 2 * in_channels,
        "class_cond": "label_emb.weight" in state,
        "use_scale_shift_norm": embedding == 2 * levels[0][0],
    }
    if flags["class_cond"]:
        flags["num_classes"] = state["label_emb.weight"].shape[0]
    return flags


def attention_sizes(config: TrainConfig) -> tuple[list[int], list[int]]:
    """(sizes of the UNet's levels, sizes of those that have attention beside the middle block), in pixels."""
    size = config.image_size
    mult = config.channel_mult.split(",") if config.channel_mult else default_channel_mult(size)
    asked = comma_numbers("attention_resolutions", config.attention_resolutions, int)
    factors = {size // resolution for resolution in asked if resolution <= size}  # as create_unet rounds them
    levels = range(len(mult))
    return [size >> level for level in levels], [size >> level for level in levels if 1 << level in factors]


def _agrees(name: str, value: Any, config: TrainConfig) -> bool:
    mine = getattr(config, name)
    if name == "in_channels":
        return mine in (0, value)
    if name == "attention_resolutions":
        # Resolutions that no level has change nothing.
        return attention_sizes(config)[1] == attention_sizes(config.replace(attention_resolutions=value))[1]
    if name == "channel_mult" and not mine:
        mine = ",".join(map(str, default_channel_mult(config.image_size)))
    return bool(mine == value)
