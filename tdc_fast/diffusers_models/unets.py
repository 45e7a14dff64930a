"""Our UNet as `UNet2DModel` of diffusers and back, where the two architectures are the same network.

They are where every attention block has heads of one size on diffusers' side and one number of heads on ours, all norms
have equally many groups, and the timestep embedding, the resampling and the blocks are those of improved-diffusion.
Whatever differs is refused by name; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid, require
from tdc_fast.models.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from tdc_fast.models.iddpm import UNet

diffusers = require("diffusers", "diffusers")

_RESBLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_SAME = {
    "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "downsample_padding": 1,
    "downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu", "norm_eps": 1e-5,
    "add_attention": True, "class_embed_type": None,
}  # fmt: skip
"""What `UNet2DModel` must be set to for the network to be that of improved-diffusion."""


def to_diffusers(unet: UNet) -> Any:
    """The network as a `diffusers.UNet2DModel` with a copy of its weights.

    Args:
        unet: a whole UNet, dense.

    Raises:
        ValueError: naming what `UNet2DModel` does not have.
    """
    if not isinstance(unet, UNet):
        raise invalid("unet", type(unet).__name__, "a tdc_fast.models.iddpm.UNet")
    own = unet.architecture
    if unet.widths:
        raise invalid("unet.widths", unet.widths, "a whole UNet; narrower blocks have no twin here")
    if unet.timestep_scale != 1:
        remedy = "1 (1000 timesteps, or --rescale_timesteps False): schedulers of diffusers pass whole timesteps"
        raise invalid("unet.timestep_scale", unet.timestep_scale, remedy)
    if not own["conv_resample"]:
        raise invalid("conv_resample", False, "True: UNet2DModel averages no pixels")
    sizes = {module.head_dim for module in unet.modules() if isinstance(module, AttentionBlock)}
    heads = {module.width // module.head_dim for module in unet.modules() if isinstance(module, AttentionBlock)}
    if len(sizes) > 1 and heads != {1}:
        raise invalid("num_heads", own["num_heads"], f"heads of one size in all levels; here they have {sorted(sizes)}")
    groups = {module.num_groups for module in unet.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:
        raise invalid("model_channels", own["model_channels"], f"norms of one number of groups; these have {groups}")
    count = groups.pop()
    levels = len(own["channel_mult"])
    attends = [2**level in own["attention_resolutions"] for level in range(levels)]
    model = diffusers.UNet2DModel(
        sample_size=own["image_size"],
        in_channels=own["in_channels"],
        out_channels=own["out_channels"],
        down_block_types=tuple("AttnDownBlock2D" if level else "DownBlock2D" for level in attends),
        up_block_types=tuple("AttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)),
        block_out_channels=tuple(mult * own["model_channels"] for mult in own["channel_mult"]),
        layers_per_block=own["num_res_blocks"],
        dropout=own["dropout"],
        attention_head_dim=None if heads == {1} else sizes.pop(),
        norm_num_groups=count,
        attn_norm_num_groups=count,  # without it the middle block's attention has no norm beside scale and shift
        resnet_time_scale_shift="scale_shift" if own["use_scale_shift_norm"] else "default",
        num_class_embeds=own["num_classes"],
        **{name: value for name, value in _SAME.items() if name != "mid_block_type"},
    )
    model.load_state_dict(dict(_theirs(unet, unet.state_dict())))
    return model.to(next(unet.parameters()).dtype).train(unet.training)


def from_diffusers(model: Any) -> UNet:
    """The network of a `diffusers.UNet2DModel` as our UNet, with a copy of its weights.

    Raises:
        ValueError: naming the setting of the configuration that our UNet does not have.
    """
    if not isinstance(model, diffusers.UNet2DModel):
        raise invalid("model", type(model).__name__, "a diffusers.UNet2DModel")
    config = dict(model.config)
    for name, value in _SAME.items():
        found = config.get(name, value)
        if found != value and (name, found) not in (("act_fn", "swish"),):
            raise invalid(f"config.{name}", found, f"{value!r}, as improved-diffusion's UNet has")
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    kinds = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
    for name, types, known in (("down_block_types", down, kinds), ("up_block_types", up, kinds.values())):
        if not set(types) <= set(known):
            raise invalid(f"config.{name}", types, f"blocks out of {sorted(known)}")
    if [kinds[name] for name in down] != up[::-1]:
        raise invalid("config.up_block_types", up, "the mirror image of down_block_types")
    widths = list(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise invalid("config.block_out_channels", widths, "multiples of the first one")
    size = config["attention_head_dim"]
    attended = [width for width, name in zip(widths, down, strict=True) if name == "AttnDownBlock2D"] + [widths[-1]]
    heads = {1} if size is None else {width // size for width in attended}
    if len(heads) > 1:
        raise invalid("config.attention_head_dim", size, f"as many heads in all levels; here they are {sorted(heads)}")
    unet = UNet(
        image_size=config["sample_size"],
        in_channels=config["in_channels"],
        model_channels=widths[0],
        out_channels=config["out_channels"],
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=[2**level for level, name in enumerate(down) if name == "AttnDownBlock2D"],
        dropout=config["dropout"],
        channel_mult=[width // widths[0] for width in widths],
        num_classes=config["num_class_embeds"],
        num_heads=heads.pop(),
        use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
    )
    groups, scales = config["norm_num_groups"], config["resnet_time_scale_shift"] == "scale_shift"
    inner = config.get("attn_norm_num_groups") or (None if scales else groups)
    if inner != groups:
        raise invalid("config.attn_norm_num_groups", config.get("attn_norm_num_groups"), f"norm_num_groups, {groups}")
    if any(module.num_groups != groups for module in unet.modules() if isinstance(module, nn.GroupNorm)):
        raise invalid("config.norm_num_groups", groups, "32, or the largest divisor of the channels below it")
    theirs = model.state_dict()
    mapped = dict(_theirs(unet, unet.state_dict()))
    for name in sorted(mapped.keys() ^ theirs.keys()):
        raise invalid(f"model.{name}", "a parameter", "exactly the layers of improved-diffusion's UNet")
    unet.load_state_dict(_ours(unet, theirs))
    return unet.to(next(model.parameters()).dtype).train(model.training)


def _modules(unet: UNet) -> Iterator[tuple[str, str]]:
    """Every layer of ours that is one of theirs, and every attention block, by path: (ours, theirs)."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    if unet.num_classes is not None:
        yield "label_emb", "class_embedding"
    yield "input_blocks.0.0", "conv_in"
    level = index = 0
    blocks: Any = unet.input_blocks
    for number, block in enumerate(blocks[1:], 1):
        yield from _layers(f"input_blocks.{number}", block, f"down_blocks.{level}", index)
        level, index = (level + 1, 0) if isinstance(block[0], Downsample) else (level, index + 1)
    for number, theirs in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        part = unet.middle_block[number]
        yield from _parts(f"middle_block.{number}", part, f"mid_block.{theirs}")
    each = unet.architecture["num_res_blocks"] + 1
    for number, block in enumerate(unet.output_blocks):
        yield from _layers(f"output_blocks.{number}", block, f"up_blocks.{number // each}", number % each)
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def _layers(name: str, block: Any, theirs: str, index: int) -> Iterator[tuple[str, str]]:
    for position, part in enumerate(block):
        path = f"{name}.{position}"
        if isinstance(part, Downsample):
            yield f"{path}.op", f"{theirs}.downsamplers.0.conv"
        elif isinstance(part, Upsample):
            yield f"{path}.conv", f"{theirs}.upsamplers.0.conv"
        else:
            kind = "resnets" if isinstance(part, ResBlock) else "attentions"
            yield from _parts(path, part, f"{theirs}.{kind}.{index}")


def _parts(name: str, part: nn.Module, theirs: str) -> Iterator[tuple[str, str]]:
    if isinstance(part, AttentionBlock):
        yield name, theirs
        return
    for own, other in _RESBLOCK.items():
        if own != "skip_connection" or not isinstance(part.get_submodule(own), nn.Identity):
            yield f"{name}.{own}", f"{theirs}.{other}"


def _theirs(unet: UNet, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A state dict of ours under diffusers' names."""
    for own, other in _modules(unet):
        block = unet.get_submodule(own)
        for key in ("weight", "bias"):
            if not isinstance(block, AttentionBlock):
                if f"{own}.{key}" in state:  # a table has no bias
                    yield f"{other}.{key}", state[f"{own}.{key}"]
                continue
            yield f"{other}.group_norm.{key}", state[f"{own}.norm.{key}"]
            yield f"{other}.to_out.0.{key}", state[f"{own}.proj_out.{key}"].squeeze(-1)
            rows = state[f"{own}.qkv.{key}"].flatten(1) if key == "weight" else state[f"{own}.qkv.{key}"]
            by_head = rows.unflatten(0, (-1, 3, block.head_dim))
            for part, name in enumerate(("to_q", "to_k", "to_v")):
                yield f"{other}.{name}.{key}", by_head[:, part].flatten(0, 1)


def _ours(unet: UNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' under our names."""
    found: dict[str, Tensor] = {}
    for own, other in _modules(unet):
        block = unet.get_submodule(own)
        for key in ("weight", "bias"):
            if not isinstance(block, AttentionBlock):
                if f"{other}.{key}" in state:
                    found[f"{own}.{key}"] = state[f"{other}.{key}"]
                continue
            filters = (..., None) if key == "weight" else (...,)  # the axis of a 1x1 convolution
            found[f"{own}.norm.{key}"] = state[f"{other}.group_norm.{key}"]
            found[f"{own}.proj_out.{key}"] = state[f"{other}.to_out.0.{key}"][filters]
            parts = [
                state[f"{other}.{name}.{key}"].unflatten(0, (-1, block.head_dim)) for name in ("to_q", "to_k", "to_v")
            ]
            found[f"{own}.qkv.{key}"] = torch.stack(parts, dim=1).flatten(0, 2)[filters]
    return found
