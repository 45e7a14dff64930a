"""The layers whose time a latency model knows, and those of a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from tdc_fast.nn.layers import TokenConv1d
from tdc_fast.pruning.costs import one_sample_on_meta

Kind = Literal["conv2d", "linear", "group_norm", "attention"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_NANOSECONDS = 10**15
"""Nanoseconds that a layer may take, 11 days: sums over a network's layers stay far below 2^63."""


@dataclass(frozen=True)
class Layer:
    """A layer of a routed model: its full shape, and how many of its channels are live.

    Attributes:
        kind: "conv2d"; "linear", which 1x1 convolutions of tokens are too; "group_norm"; or "attention", the products
            of queries, keys and values.
        in_channels: all input channels; those of two inputs together.
        out_channels: all output channels.
        height: of the input in pixels; of linear layers and attention the tokens of a sample.
        width: of the input in pixels; 1 for tokens.
        live_in: live input channels.
        live_out: live output channels.
        filter: height and width of the filter.
        stride: of the convolution.
        padding: of the convolution.
        upsample: 2 where the convolution doubles height and width first.
        num_groups: normalisation groups, or heads of the attention.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    height: int
    width: int
    live_in: int
    live_out: int
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    upsample: int = 1
    num_groups: int = 1

    def __str__(self) -> str:
        """Kind, channels, image and filter, such as "conv2d 128-256 (96 live) 32x32 3x3"."""
        sides = ((self.in_channels, self.live_in), (self.out_channels, self.live_out))
        channels = "-".join(f"{full} ({live} live)" if live < full else str(full) for full, live in sides)
        taps = f" {self.filter[0]}x{self.filter[1]}" if self.kind == "conv2d" else ""
        step = f" /{self.stride[0]}" if max(self.stride) > 1 else ""
        return f"{self.kind} {channels} {self.height}x{self.width}{taps}{step}{' upsampled' * (self.upsample > 1)}"

    @property
    def full(self) -> Layer:
        """The layer with all channels live."""
        return dataclasses.replace(self, live_in=self.in_channels, live_out=self.out_channels)

    def narrowed(self, dim: str, live: int) -> Layer:
        """The layer with other live channels on one axis; a norm has one axis.

        Args:
            dim: "in" or "out".
            live: channels.
        """
        if self.kind == "group_norm":
            return dataclasses.replace(self, live_in=live, live_out=live)
        if dim == "in":
            return dataclasses.replace(self, live_in=live)
        return dataclasses.replace(self, live_out=live)

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = (self.height * self.upsample, self.width * self.upsample)
        axes = zip(sizes, self.filter, self.stride, self.padding, strict=True)
        height, width = ((size + 2 * pad - taps) // step + 1 for size, taps, step, pad in axes)
        return height, width


class LatencyModel(Protocol):
    """Knows how long layers take on one device, in one dtype, at one batch size and number of groups."""

    def nanoseconds(self, layer: Layer) -> int:
        """The time of one forward of the layer over the batch, its live channels the same in every group.

        Raises:
            ValueError: the model knows nothing about the layer.
        """


def layers_of(model: nn.Module, x: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> dict[str, list[Layer]]:
    """The convolutions, linear layers and group norms of a denoiser: {path: one for every time it runs}.

    Args:
        model: the denoiser, on the device "meta".
        x: images (B, ...), of which only shape and dtype matter.
        model_kwargs: keyword arguments of the model.
    """
    found: dict[str, list[Layer]] = {}
    paths = {id(module): path for path, module in model.named_modules()}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = _described(module, args[0], kwargs)
        if layer is not None:
            found.setdefault(paths[id(module)], []).append(layer)

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        image, t, kwargs = one_sample_on_meta(x, model_kwargs or {})
        with torch.no_grad():
            model(image, t, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _described(module: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Layer | None:
    """The layer that a module is for an input; None for modules of other kinds."""
    if isinstance(module, nn.Conv2d):
        (rows, columns), (step_h, step_w) = module.kernel_size, module.stride
        same = (rows // 2, columns // 2) if module.padding == "same" else (0, 0)
        pad_h, pad_w = same if isinstance(module.padding, str) else module.padding
        height, width = x.shape[2:]
        channels = module.in_channels, module.out_channels
        return Layer(
            "conv2d", *channels, height, width, *channels, (rows, columns), (step_h, step_w), (pad_h, pad_w),
            kwargs.get("upsample", 1),
        )  # fmt: skip
    if isinstance(module, nn.GroupNorm):
        channels = module.num_channels, module.num_channels
        height, width = (*x.shape[2:], 1, 1)[:2]
        return Layer("group_norm", *channels, height, width, *channels, num_groups=module.num_groups)
    if isinstance(module, nn.Linear):
        channels = module.in_features, module.out_features
        return Layer("linear", *channels, x.shape[1:-1].numel(), 1, *channels)
    if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
        channels = module.in_channels, module.out_channels
        return Layer("linear", *channels, x.shape[1] if isinstance(module, TokenConv1d) else x.shape[2], 1, *channels)
    return None
