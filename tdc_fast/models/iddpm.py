"""The UNet of improved-diffusion, with the same state-dict keys, shapes and numerics, from leaves that can be routed.

Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), and the public
checkpoints of its reference implementation. Activations are channels_last throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import integer, invalid, is_integer
from tdc_fast.models.blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepBlocks,
    Upsample,
    embedded_in_one_launch,
    group_norm,
    head_dim,
    silu,
    timestep_embedding,
    zeroed,
)
from tdc_fast.nn.layers import Conv2d, GroupNorm, Linear, TokenConv1d, group_count
from tdc_fast.nn.units import PruningUnit
from tdc_fast.ops.checks import can_read

DEFAULT_HEADS = 4
"""Attention heads by default, as in improved-diffusion's flags."""


class UNet(nn.Module):
    """Denoiser with the constructor arguments, keys, shapes and numerics of improved-diffusion's UNetModel.

    GroupNorm has 32 groups where 32 divides the channels, else the largest number below 32 that does.

    Attributes:
        timestep_scale: the embedding gets `timesteps * timestep_scale`, so that callers always pass original integer
            timesteps; 1.0 by default. improved-diffusion's rescaled timesteps have the scale 1000 / T.
        architecture: the constructor's arguments except `widths`.
        widths: channels by unit name of a pruned denoiser.
        stride: a number that must divide the height and width of images.
        levels: by name of an input or output block, the number of halvings of the images at which it computes. A block
            that changes the resolution belongs to the level that it leaves.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """Build the network with random weights.

        Args:
            image_size: H = W of the images. Every level but the last halves it, so 2 ** (levels - 1) must divide it.
            in_channels: channels of the images.
            model_channels: channels of the first level.
            out_channels: channels of the output; twice `in_channels` when the variance is learned.
            num_res_blocks: ResBlocks per level on the way down.
            attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels that have attention.
            dropout: dropout probability in the ResBlocks.
            channel_mult: multiple of `model_channels` per level.
            conv_resample: whether down- and upsampling have a convolution.
            dims: 2, for images.
            num_classes: size of the label table; None for an unconditional model.
            use_checkpoint: recompute the blocks' activations in the backward.
            num_heads: attention heads.
            num_heads_upsample: attention heads on the way up; -1 takes `num_heads`.
            use_scale_shift_norm: apply the timestep embedding as scale and shift, not as a bias.
            widths: channels by unit name of a pruned denoiser (see `pruning_units`); units not named are whole.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        super().__init__()
        if dims != 2:
            raise invalid("dims", dims, "2 (images)")
        image_size, in_channels = integer("image_size", image_size), integer("in_channels", in_channels)
        model_channels, out_channels = integer("model_channels", model_channels), integer("out_channels", out_channels)
        num_heads, num_res_blocks = integer("num_heads", num_heads), integer("num_res_blocks", num_res_blocks)
        num_classes = None if num_classes is None else integer("num_classes", num_classes)
        if not 0 <= dropout < 1:
            raise invalid("dropout", dropout, "a probability from 0 to below 1")
        if not channel_mult or not all(is_integer(mult) and mult >= 1 for mult in channel_mult):
            raise invalid("channel_mult", channel_mult, "one multiplier of at least 1 per level")
        channel_mult = tuple(map(int, channel_mult))
        self.stride = 2 ** (len(channel_mult) - 1)
        if image_size % self.stride:
            raise invalid("image_size", image_size, f"a multiple of {self.stride} for {len(channel_mult)} levels")
        own_upsample = num_heads_upsample != -1
        if not own_upsample:
            num_heads_upsample = num_heads
        self.architecture: dict[str, Any] = {
            "image_size": image_size, "in_channels": in_channels, "model_channels": model_channels,
            "out_channels": out_channels, "num_res_blocks": num_res_blocks,
            "attention_resolutions": sorted(attention_resolutions), "dropout": dropout,
            "channel_mult": list(channel_mult), "conv_resample": conv_resample, "num_classes": num_classes,
            "use_checkpoint": use_checkpoint, "num_heads": num_heads, "num_heads_upsample":
            num_heads_upsample,
            "use_scale_shift_norm": use_scale_shift_norm,
        }  # fmt: skip
        self.image_size, self.in_channels, self.model_channels = image_size, in_channels, model_channels
        self.out_channels, self.num_classes, self.timestep_scale = out_channels, num_classes, 1.0
        self.widths = dict(widths or {})

        unnamed = dict(self.widths)
        emb_channels = model_channels * 4

        def res_block(name: str, channels: int, out: int) -> ResBlock:
            atom = out // group_count(out)
            width = _checked_width(name, unnamed, out, atom)
            return ResBlock(channels, emb_channels, out, dropout, use_checkpoint, use_scale_shift_norm, width)

        def attention(name: str, channels: int, heads: int) -> AttentionBlock:
            argument = "num_heads_upsample" if own_upsample and name.startswith("output_blocks") else "num_heads"
            width = _checked_width(name, unnamed, channels, head_dim(channels, heads, argument))
            return AttentionBlock(channels, heads, use_checkpoint, width)

        self.time_embed = nn.Sequential(
            Linear(model_channels, emb_channels), nn.SiLU(), Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        ch, factor = model_channels, 1
        self.input_blocks = nn.ModuleList([TimestepBlocks(Conv2d(in_channels, ch, 3, padding=1))])
        skips, self.levels = [ch], {"input_blocks.0": 0}
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                name = f"input_blocks.{len(self.input_blocks)}"
                layers: list[nn.Module] = [res_block(f"{name}.0", ch, mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(f"{name}.1", ch, num_heads))
                self.levels[name] = level
                self.input_blocks.append(TimestepBlocks(*layers))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                self.levels[f"input_blocks.{len(self.input_blocks)}"] = level
                self.input_blocks.append(TimestepBlocks(Downsample(ch, conv_resample)))
                skips.append(ch)
                factor *= 2

        self.middle_block = TimestepBlocks(
            res_block("middle_block.0", ch, ch),
            attention("middle_block.1", ch, num_heads),
            res_block("middle_block.2", ch, ch),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                name = f"output_blocks.{len(self.output_blocks)}"
                layers = [res_block(f"{name}.0", ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(f"{name}.1", ch, num_heads_upsample))
                if level and index == num_res_blocks:
                    layers.append(Upsample(ch, conv_resample))
                    factor //= 2
                self.levels[name] = level
                self.output_blocks.append(TimestepBlocks(*layers))

        self.out = nn.Sequential(group_norm(ch), nn.SiLU(), zeroed(Conv2d(ch, out_channels, 3, padding=1)))
        if unnamed:
            raise invalid("widths", sorted(unnamed), "names of units of this architecture (see pruning_units)")

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the denoiser's output.

        Args:
            x: noisy images (B, C_in, H, W).
            timesteps: (B,).
            y: class ids (B,), if and only if the model has classes.

        Returns:
            (B, C_out, H, W).

        Raises:
            ValueError: naming an input of a wrong shape or type.
        """
        self._check_inputs(x, timesteps, y)
        steps = timesteps if self.timestep_scale == 1 else timesteps.float() * self.timestep_scale
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed[0](timestep_embedding(steps, self.model_channels).to(dtype))
        emb = computed = self.time_embed[2](silu(emb))
        if y is not None:
            emb = emb + self.label_emb(y)
        # Every ResBlock's emb_layers begin with the SiLU. Under autocast the label's embedding is in fp32.
        emb = silu(emb).to(computed.dtype)
        embedded = embedded_in_one_launch([*self.input_blocks, self.middle_block, *self.output_blocks], emb)

        h = x.to(dtype)
        if not torch._C._are_functorch_transforms_active():  # torch.vmap has no channels_last
            h = h.contiguous(memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, embedded)
            skips.append(h)
        h = self.middle_block(h, emb, embedded)
        for block in self.output_blocks:
            h = block(h, emb, embedded, skips.pop())
        return self.out[2](self.out[0](h, activation="silu"))

    def _check_inputs(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> None:
        """Raises ValueError naming a wrong input; label values are checked on the CPU only, so that no GPU waits."""
        for name, value in (("x", x), ("timesteps", timesteps)):
            if not isinstance(value, Tensor):
                raise invalid(name, value, "a torch tensor")
        if not x.is_floating_point():
            raise invalid("x", x.dtype, "images in a floating-point dtype, such as float32 in [-1, 1]")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise invalid("x", tuple(x.shape), f"shape (B, {self.in_channels}, H, W)")
        if not (x.shape[2] and x.shape[3]) or x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise invalid("x", tuple(x.shape), f"a height and width that are multiples of {self.stride}")
        if tuple(timesteps.shape) != (x.shape[0],):
            raise invalid("timesteps", tuple(timesteps.shape), f"one for each of the {x.shape[0]} samples")
        if (y is None) != (self.num_classes is None):
            raise invalid("y", y, "labels if, and only if, the model has num_classes")
        if y is None or self.num_classes is None:
            return
        if tuple(y.shape) != (x.shape[0],) or y.dtype not in (torch.int64, torch.int32):
            raise invalid("y", f"{y.dtype} of shape {tuple(y.shape)}", f"integer labels of shape ({x.shape[0]},)")
        if can_read(y) and y.numel():
            low, high = (int(value) for value in torch.aminmax(y))
            if low < 0 or high >= self.num_classes:
                raise invalid("y", low if low < 0 else high, f"labels from 0 to {self.num_classes - 1}")

    def pruning_units(self) -> list[PruningUnit]:
        """The units that can be pruned, in the order of `named_modules`; a block of width 0 has none."""
        return [
            module.pruning_unit(name)
            for name, module in self.named_modules()
            if isinstance(module, ResBlock | AttentionBlock) and module.width
        ]

    def layer_sets(self) -> dict[str, list[str]]:
        """Names for sets of layers, each a list of their paths.

        Returns:
            By kind "convolutions", "attention" (its qkv and proj_out), "norms" and "embeddings" (of timestep and class,
            with the ResBlocks' own linear layers), which together are all layers; "level0" for the layers of the blocks
            at the images' resolution, "level1" at half of it, and so on, and "middle" for those of the middle block.
        """
        kinds = {"convolutions": Conv2d, "attention": TokenConv1d, "norms": GroupNorm, "embeddings": object}
        sets: dict[str, list[str]] = {name: [] for name in kinds}
        sets |= {f"level{level}": [] for level in sorted(set(self.levels.values()))} | {"middle": []}
        for name, module in self.named_modules():
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            sets[next(kind for kind, types in kinds.items() if isinstance(module, types))].append(name)
            block = ".".join(name.split(".")[:2])
            if block in self.levels:
                sets[f"level{self.levels[block]}"].append(name)
            elif name.startswith("middle_block."):
                sets["middle"].append(name)
        return sets

    def recipe(self) -> dict[str, Any]:
        """A description in plain JSON values, from which `from_recipe` rebuilds this module without its weights."""
        return {
            "architecture": dict(self.architecture),
            "timestep_scale": self.timestep_scale,
            "widths": dict(self.widths),
        }

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> UNet:
        """The module that a `recipe()` describes, with random weights; ValueError names what is wrong in it."""
        expected = {"architecture", "timestep_scale", "widths"}
        if set(recipe) != expected:
            raise invalid("recipe", sorted(recipe), f"the keys {sorted(expected)}")
        try:
            model = cls(**recipe["architecture"], widths=recipe["widths"])
        except TypeError as error:
            raise invalid("recipe['architecture']", recipe["architecture"], f"UNet's arguments ({error})") from error
        model.timestep_scale = float(recipe["timestep_scale"])
        return model

    def with_widths(self, widths: Mapping[str, int]) -> UNet:
        """A new UNet of this architecture with the widths `widths` by unit name, uninitialised, on the same device."""
        first = next(self.parameters())
        with torch.device("meta"):
            model = UNet.from_recipe({**self.recipe(), "widths": {**self.widths, **widths}})
        model = model.to(first.dtype).train(self.training)
        return model if first.is_meta else model.to_empty(device=first.device)


def _checked_width(name: str, unnamed: dict[str, int], channels: int, atom: int) -> int:
    width = unnamed.pop(name, channels)
    if not 0 <= width <= channels or width % atom:
        raise invalid(f"widths[{name!r}]", width, f"a multiple of {atom} from 0 to {channels}")
    return width


def default_channel_mult(image_size: int) -> tuple[int, ...]:
    """Channel multipliers of improved-diffusion for images of 32, 64 and 256 pixels, and like them for other sizes.

    For another size, levels end where the lowest would have fewer than 4 x 4 pixels (8 x 8 above 32 pixels), or where
    the size is odd.
    """
    mult: tuple[int, ...]
    if image_size <= 32:
        mult, smallest = (1, 2, 2, 2), 4
    elif image_size < 128:
        mult, smallest = (1, 2, 3, 4), 8
    elif image_size < 256:
        mult, smallest = (1, 1, 2, 3, 4), 8
    else:
        mult, smallest = (1, 1, 2, 2, 4, 4), 8
    levels = 1
    while levels < len(mult) and image_size % 2**levels == 0 and image_size >> levels >= smallest:
        levels += 1
    return mult[:levels]


def create_unet(
    *,
    image_size: int = 64,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    num_heads: int = DEFAULT_HEADS,
    num_heads_upsample: int = -1,
    attention_resolutions: str | Sequence[int] = "16,8",
    dropout: float = 0.0,
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    use_scale_shift_norm: bool = True,
    channel_mult: str | Sequence[int] = "",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> UNet:
    """A UNet from improved-diffusion's flags, with the same names and defaults.

    Args:
        image_size: H = W of the images.
        num_channels: channels of the first level.
        num_res_blocks: ResBlocks per level on the way down.
        num_heads: attention heads.
        num_heads_upsample: attention heads on the way up; -1 takes `num_heads`.
        attention_resolutions: image sizes with attention, "16,8" or a sequence; "" leaves the middle block's only.
        dropout: dropout probability in the ResBlocks.
        learn_sigma: double the output channels, for a learned variance.
        class_cond: condition on class labels.
        use_checkpoint: recompute the blocks' activations in the backward.
        use_scale_shift_norm: apply the timestep embedding as scale and shift, not as a bias.
        channel_mult: "1,2,2,2" or a sequence; "" takes `default_channel_mult(image_size)`.
        num_classes: number of classes when `class_cond`.
        in_channels: channels of the images.

    Raises:
        ValueError: naming a flag that cannot be read.
    """
    mult = _integers("channel_mult", channel_mult) or default_channel_mult(image_size)
    resolutions = _integers("attention_resolutions", attention_resolutions)
    factors = {image_size // size for size in resolutions if size <= image_size}
    if num_heads == DEFAULT_HEADS and isinstance(num_channels, int):  # heads that nobody chose are not to blame
        attended = [m for level, m in enumerate(mult) if 2**level in factors or level == len(mult) - 1]
        odd = next((m * num_channels for m in attended if m * num_channels % num_heads), None)
        if odd is not None:
            remedy = f"a multiple of {num_heads}, as {num_heads} attention heads share {odd} channels; or num_heads 1"
            raise invalid("num_channels", num_channels, remedy)
    return UNet(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=num_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(sorted(factors)),
        dropout=dropout,
        channel_mult=mult,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
    )


def _integers(argument: str, value: str | Sequence[int]) -> tuple[int, ...]:
    try:
        parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        numbers = tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise invalid(argument, value, "integers separated by commas, or a sequence of them") from error
    if any(number < 1 for number in numbers):
        raise invalid(argument, value, "integers of at least 1")
    return numbers
