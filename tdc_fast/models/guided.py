"""Weights of guided-diffusion's UNet as those of ours, where the two are the same network.

Its parameters have improved-diffusion's names and shapes. What differs is the order of the rows of qkv under
`use_new_attention_order`, heads of one size in all levels (`num_head_channels`), and residual blocks that resample
(`resblock_updown`), which our UNet does not have. Source: Dhariwal and Nichol, arXiv 2105.05233, and its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from tdc_fast.errors import invalid


def num_heads_of(state: Mapping[str, Tensor], num_head_channels: int) -> int:
    """The number of heads that all attention layers have at heads of `num_head_channels` channels.

    Args:
        state: guided-diffusion's state dict.
        num_head_channels: channels of a head.

    Raises:
        ValueError: the number differs from level to level, or the size does not divide the channels.
    """
    channels = sorted({value.shape[0] // 3 for name, value in state.items() if name.endswith(".qkv.weight")})
    if num_head_channels < 1 or any(count % num_head_channels for count in channels):
        raise invalid("num_head_channels", num_head_channels, f"a divisor of {channels}, the channels of the attention")
    heads = {count // num_head_channels for count in channels}
    if len(heads) != 1:
        remedy = (
            f"one number of heads in all levels, as our UNet has; with {channels} channels they are {sorted(heads)}"
        )
        raise invalid("num_head_channels", num_head_channels, remedy)
    return heads.pop()


def from_guided_diffusion(
    state: Mapping[str, Tensor], *, num_heads: int, use_new_attention_order: bool = False
) -> dict[str, Tensor]:
    """The state dict of our UNet, in fp32.

    Args:
        state: guided-diffusion's state dict.
        num_heads: attention heads of every layer.
        use_new_attention_order: guided-diffusion's flag: the rows of qkv are all q, then all k, then all v. Without it
            they are q, k and v of one head after the other, as ours are.

    Raises:
        ValueError: for blocks that our UNet does not have, and heads that do not divide the channels.
    """
    for name in state:
        if re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name):  # a second residual block, which samples up
            raise invalid("resblock_updown", True, f"False: our UNet has no residual blocks that resample ({name})")
    converted = {}
    for name, value in state.items():
        value = value.float()
        if use_new_attention_order and re.search(r"\.qkv\.(weight|bias)$", name):
            if num_heads < 1 or value.shape[0] % (3 * num_heads):
                raise invalid("num_heads", num_heads, f"a divisor of the {value.shape[0] // 3} channels of {name}")
            value = value.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
        converted[name] = value.contiguous()
    return converted
