"""Which layers the GPU bench times: five design shapes, and every distinct layer of two public UNets.

The UNets' layers come from the models themselves: a forward on the meta device records the input of every leaf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn import layers

# improved-diffusion's flags for its CIFAR-10 and ImageNet 64x64 models.
UNETS: dict[str, dict[str, Any]] = {
    "CIFAR-10": {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True},
    "ImageNet64": {"image_size": 64, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True},
}
TINY_UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 8, "num_channels": 16, "num_res_blocks": 1, "num_heads": 2,
        "attention_resolutions": "", "channel_mult": "1,2",
    },
}  # fmt: skip
UNET_BATCH = 64
Layer = TypeVar("Layer")


@dataclass(frozen=True)
class ConvLayer:
    """A convolution with "same" padding.

    Attributes:
        source: the model that it is from, or "design".
        batch: images.
        in_channels: C_in.
        out_channels: C_out.
        height: of the input.
        width: of the input.
        filter: R = S.
        stride: the same in both directions.
        uses: how many such layers the model has.
    """

    source: str
    batch: int
    in_channels: int
    out_channels: int
    height: int
    width: int
    filter: int = 3
    stride: int = 1
    uses: int = 1

    def __str__(self) -> str:
        return f"{self.source}: {self.shape}"

    @property
    def shape(self) -> str:
        """All that its time depends on."""
        step = "" if self.stride == 1 else f" /{self.stride}"
        channels = f"{self.in_channels}-{self.out_channels}"
        return f"B{self.batch} {channels} {self.height}x{self.width} {self.filter}x{self.filter}{step}"

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        pad = self.filter // 2
        height, width = ((n + 2 * pad - self.filter) // self.stride + 1 for n in (self.height, self.width))
        return height, width

    def flops(self, live_in: int | None = None, live_out: int | None = None) -> int:
        """FLOPs of a forward, dgrad or wgrad with these live channels, two per multiply-accumulate."""
        pairs = (live_in or self.in_channels) * (live_out or self.out_channels)
        return 2 * self.batch * self.out_size[0] * self.out_size[1] * self.filter**2 * pairs


@dataclass(frozen=True)
class NormLayer:
    """A group norm.

    Attributes:
        source: the model that it is from.
        batch: images.
        channels: C.
        height: of the images.
        width: of the images.
        num_groups: normalisation groups.
        silu: whether SiLU follows.
        modulated: whether it has a scale and a shift per sample.
        uses: how many such layers the model has.
    """

    source: str
    batch: int
    channels: int
    height: int
    width: int
    num_groups: int
    silu: bool
    modulated: bool
    uses: int = 1

    def __str__(self) -> str:
        fused = "".join((" scale-shift" * self.modulated, " SiLU" * self.silu))
        return f"{self.source}: B{self.batch} C{self.channels} {self.height}x{self.width}{fused}"

    @property
    def elements(self) -> int:
        """Elements of the input."""
        return self.batch * self.channels * self.height * self.width


# (B, H = W, C), with C input and output channels and 3x3 filters: large and small images, few and many channels.
DESIGN_SHAPES = ((128, 32, 128), (128, 16, 256), (256, 8, 256), (64, 64, 192), (64, 8, 512))
TINY_SHAPES = ((4, 6, 8),)


def design_layers(*, tiny: bool = False) -> list[ConvLayer]:
    """The shapes that the kernels were designed for."""
    return [ConvLayer("design", b, c, c, size, size) for b, size, c in (TINY_SHAPES if tiny else DESIGN_SHAPES)]


def unet_layers(name: str, flags: dict[str, Any], batch: int) -> tuple[list[ConvLayer], list[NormLayer]]:
    """The distinct convolutions (1x1 ones over tokens included) and group norms of a UNet, the costliest first.

    Two inputs count as one with all channels, and an image that is upsampled as the larger one.
    """
    convs: Counter[ConvLayer] = Counter()
    norms: Counter[NormLayer] = Counter()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0]
        if isinstance(module, layers.Conv2d):
            height, width = (size * kwargs.get("upsample", 1) for size in x.shape[2:])
            taps, stride = module.kernel_size[0], module.stride[0]
            convs[ConvLayer(name, batch, module.in_channels, module.out_channels, height, width, taps, stride)] += 1
        elif isinstance(module, layers.TokenConv1d):
            convs[ConvLayer(name, batch, module.in_channels, module.out_channels, x.shape[1], 1, 1, 1)] += 1
        elif isinstance(module, layers.GroupNorm):
            height, width = x.shape[2:]
            channels = sum(t.shape[1] for t in (x, kwargs.get("x2")) if t is not None)
            silu, modulated = kwargs.get("activation") == "silu", kwargs.get("scale") is not None
            norms[NormLayer(name, batch, channels, height, width, module.num_groups, silu, modulated)] += 1

    with torch.device("meta"), torch.no_grad():
        model = create_unet(**flags)
        for module in model.modules():
            module.register_forward_pre_hook(record, with_kwargs=True)
        size = flags["image_size"]
        model(torch.empty(batch, model.in_channels, size, size), torch.zeros(batch, dtype=torch.int64))
    conv_layers = [replace(layer, uses=uses) for layer, uses in convs.items()]
    norm_layers = [replace(layer, uses=uses) for layer, uses in norms.items()]
    conv_layers.sort(key=lambda layer: -layer.uses * layer.flops())
    norm_layers.sort(key=lambda layer: -layer.uses * layer.elements)
    return conv_layers, norm_layers


@dataclass(frozen=True)
class Workload:
    """What the bench times.

    Attributes:
        unets: keyword arguments of `create_unet` by name.
        batch: samples of a batch of the UNets.
        design: the convolutions that the kernels were designed for.
        convs: the distinct convolutions of all UNets.
        norms: the distinct group norms of all UNets.
        convs_of: the distinct convolutions of each UNet, by its name.
    """

    unets: dict[str, dict[str, Any]]
    batch: int
    design: list[ConvLayer]
    convs: list[ConvLayer]
    norms: list[NormLayer]
    convs_of: dict[str, list[ConvLayer]]


def workload(*, tiny: bool) -> Workload:
    """The UNets and their layers; tiny ones, and one layer of each kind, for a dry run."""
    unets, batch = (TINY_UNETS, 8) if tiny else (UNETS, UNET_BATCH)
    found = {name: unet_layers(name, flags, batch) for name, flags in unets.items()}
    convs_of = {name: convs for name, (convs, _) in found.items()}
    convs, norms = all_layers(found)
    if tiny:
        convs = _one_of_each(convs, lambda conv: (conv.filter, conv.stride))
        convs_of = dict.fromkeys(unets, convs)
        norms = _one_of_each(norms, lambda norm: (norm.silu, norm.modulated))
    return Workload(unets, batch, design_layers(tiny=tiny), convs, norms, convs_of)


def all_layers(
    found: dict[str, tuple[list[ConvLayer], list[NormLayer]]],
) -> tuple[list[ConvLayer], list[NormLayer]]:
    """The distinct layers of all UNets; a layer that several have is listed with the first."""
    convs: dict[str, ConvLayer] = {}
    norms: dict[tuple[Any, ...], NormLayer] = {}
    for its_convs, its_norms in found.values():
        for conv in its_convs:
            convs.setdefault(conv.shape, conv)
        for norm in its_norms:
            norms.setdefault((norm.channels, norm.height, norm.width, norm.silu, norm.modulated), norm)
    return list(convs.values()), list(norms.values())


def _one_of_each(layers: list[Layer], kind: Callable[[Layer], object]) -> list[Layer]:
    return list({kind(layer): layer for layer in reversed(layers)}.values())
