"""The one generator of routed problems for all tests, and the plain torch computation each is compared with.

A case holds shapes and a seed; `tensors(dtype)` makes the same values in any dtype (drawn in bf16, so that no dtype
sees rounded inputs), with NaN wherever the widths say that nothing may be read, and zeros in the input of a convolution
past its widths, as the contract has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast.routing import RoutingPlan

LAYOUTS = ("channels_last", "contiguous", "strided")


@dataclass(frozen=True)
class Routing:
    """Sorted group ids of a batch, experts per group."""

    groups: tuple[int, ...]
    num_groups: int
    num_experts: int
    weight_index: tuple[int, ...] | None

    @property
    def batch(self) -> int:
        return len(self.groups)

    def plan(self) -> RoutingPlan:
        index = None if self.weight_index is None else torch.tensor(self.weight_index, dtype=torch.int32)
        return RoutingPlan.from_groups(torch.tensor(self.groups, dtype=torch.int64), self.num_groups, index)

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(group, expert, first sample, past last sample) for every group, also those without samples."""
        ordered = sorted(self.groups)
        index = self.weight_index or tuple(range(self.num_groups))
        bounds = [sum(g < group for g in ordered) for group in range(self.num_groups + 1)]
        return [(g, index[g], bounds[g], bounds[g + 1]) for g in range(self.num_groups)]


@dataclass(frozen=True)
class ConvCase:
    routing: Routing
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    filter: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    in_widths: tuple[int, ...] | None
    out_widths: tuple[int, ...] | None
    extras: tuple[str, ...]  # which of bias, sample_bias, residual are given
    layout: str
    seed: int
    x2_channels: int = 0  # of the input channels, the last ones, in a tensor of their own
    upsample: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = (
            (self.upsample * n + 2 * p - f) // s + 1
            for n, p, f, s in zip(self.size, self.padding, self.filter, self.stride, strict=True)
        )
        return height, width

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, weight, the extras and x2, all requiring gradients; dead channels are zeros in x and x2, else NaN."""
        draw = _Draw(self.seed, dtype)
        batch, experts, out = self.routing.batch, self.routing.num_experts, self.out_channels
        fan_in = self.in_channels * self.filter[0] * self.filter[1]
        made = {
            "x": draw(batch, self.in_channels, *self.size),
            "weight": draw(experts, out, self.in_channels, *self.filter, scale=fan_in**-0.5),
            "bias": draw(experts, out),
            "sample_bias": draw(batch, out),
            "residual": draw(batch, out, *self.out_size),
        }
        for group, _, start, stop in self.routing.segments():
            if self.in_widths is not None:
                made["x"][start:stop, self.in_widths[group] :] = 0
            if self.out_widths is not None:
                made["sample_bias"][start:stop, self.out_widths[group] :] = float("nan")
                made["residual"][start:stop, self.out_widths[group] :] = float("nan")
        made["x"], made["x2"] = _parts(made["x"], self.x2_channels)
        for name in ("x", "x2", "residual"):
            made[name] = laid_out(made[name], self.layout)
        second = ("x2",) if self.x2_channels else ()
        return _leaves({k: v for k, v in made.items() if k in ("x", "weight", *self.extras, *second)})

    def settings(self) -> dict[str, Any]:
        widths = {"in_widths": as_widths(self.in_widths), "out_widths": as_widths(self.out_widths)}
        return {"stride": self.stride, "padding": self.padding, "upsample": self.upsample, **widths}

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        """The same computation with one F.conv2d per group, in the dtype of the tensors; differentiable."""
        x, weight = _joined(tensors), tensors["weight"]
        if self.upsample > 1:
            x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        pieces = [x.new_zeros(0, self.out_channels, *self.out_size)]
        for group, expert, start, stop in self.routing.segments():
            live_in = self.in_channels if self.in_widths is None else self.in_widths[group]
            live_out = self.out_channels if self.out_widths is None else self.out_widths[group]
            y = x.new_zeros(stop - start, live_out, *self.out_size)
            if live_in and live_out and stop > start:
                filters = weight[expert, :live_out, :live_in]
                y = y + F.conv2d(x[start:stop, :live_in], filters, None, self.stride, self.padding)
            if "bias" in tensors:
                y = y + tensors["bias"][expert, :live_out, None, None]
            if "sample_bias" in tensors:
                y = y + tensors["sample_bias"][start:stop, :live_out, None, None]
            if "residual" in tensors:
                y = y + tensors["residual"][start:stop, :live_out]
            pieces.append(F.pad(y, (0, 0, 0, 0, 0, self.out_channels - live_out)))
        return torch.cat(pieces)


@dataclass(frozen=True)
class NormCase:
    routing: Routing
    channels: int
    num_groups: int  # norm groups
    size: tuple[int, int]
    widths: tuple[int, ...] | None
    extras: tuple[str, ...]  # which of scale, shift are given
    activation: str | None
    layout: str
    seed: int
    x2_channels: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, weight, bias, the extras and x2, dead channels NaN, all requiring gradients."""
        draw = _Draw(self.seed, dtype)
        batch, experts, channels = self.routing.batch, self.routing.num_experts, self.channels
        made = {
            "x": draw(batch, channels, *self.size),
            "weight": draw(experts, channels),
            "bias": draw(experts, channels),
            "scale": draw(batch, channels),
            "shift": draw(batch, channels),
        }
        if self.widths is not None:
            for group, _, start, stop in self.routing.segments():
                for name in ("x", "scale", "shift"):
                    made[name][start:stop, self.widths[group] :] = float("nan")
        made["x"], made["x2"] = (laid_out(part, self.layout) for part in _parts(made["x"], self.x2_channels))
        second = ("x2",) if self.x2_channels else ()
        return _leaves({k: v for k, v in made.items() if k in ("x", "weight", "bias", *self.extras, *second)})

    def settings(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "widths": as_widths(self.widths), "activation": self.activation}

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        """The same computation with one F.group_norm per group, in the dtype of the tensors; differentiable."""
        x = _joined(tensors)
        per_group = self.channels // self.num_groups
        pieces = [x.new_zeros(0, *x.shape[1:])]
        for group, expert, start, stop in self.routing.segments():
            live = self.channels if self.widths is None else self.widths[group]
            y = x[start:stop, :live]
            if live and stop > start:
                affine = tensors["weight"][expert, :live], tensors["bias"][expert, :live]

                y = F.group_norm(y.contiguous(), live // per_group, *affine)
            if "scale" in tensors:
                y = y * (1 + tensors["scale"][start:stop, :live, None, None])
            if "shift" in tensors:
                y = y + tensors["shift"][start:stop, :live, None, None]
            if self.activation == "silu":
                y = F.silu(y)
            pieces.append(F.pad(y, (0, 0, 0, 0, 0, self.channels - live)))
        return torch.cat(pieces)


def _parts(x: Tensor, x2_channels: int) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W) as two tensors, the second of the last channels."""
    return x[:, : x.shape[1] - x2_channels], x[:, x.shape[1] - x2_channels :]


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors["x"], tensors["x2"]], dim=1) if "x2" in tensors else tensors["x"]


class _Draw:
    """Normal values that every dtype represents, from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(torch.bfloat16).to(self._dtype)


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout: "strided" is a view into a larger, NaN-filled tensor."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "contiguous":
        return tensor.contiguous()
    batch, channels, height, width = tensor.shape
    larger = tensor.new_full((batch, width + 1, channels + 2, height), float("nan"))
    view = larger[:, 1:, 1:-1].permute(0, 2, 3, 1)
    view.copy_(tensor)
    return view


def as_widths(widths: tuple[int, ...] | None) -> Tensor | None:
    return None if widths is None else torch.tensor(widths, dtype=torch.int32)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """Empty batches, one sample, groups without samples, N > B, and groups that share an expert.

    Sizes are sampled, not drawn as lists of any length: those come out nearly empty most of the time.
    """
    num_groups = draw(st.sampled_from([1, 2, 3, 5]))
    batch = draw(st.sampled_from([4, 7, 2, 1, 0]))
    groups = draw(st.lists(st.integers(0, num_groups - 1), min_size=batch, max_size=batch))
    num_experts = draw(st.sampled_from([num_groups, 1, 2, 3]))
    if num_experts == num_groups and draw(st.booleans()):
        return Routing(tuple(groups), num_groups, num_experts, None)
    index = draw(st.lists(st.integers(0, num_experts - 1), min_size=num_groups, max_size=num_groups))
    return Routing(tuple(groups), num_groups, num_experts, tuple(index))


def upstream(case: ConvCase | NormCase, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A fixed gradient of the result, the same values for every dtype, with NaN in dead channels.

    Autograd may hand over what a layer of another library left there.
    """
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(dtype)
    widths = case.out_widths if isinstance(case, ConvCase) else case.widths
    if widths is not None:
        for group, _, start, stop in case.routing.segments():
            dy[start:stop, widths[group] :] = float("nan")
    return dy


def widths_of(channels: int, step: int, num_groups: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """No widths, or one per group from 0 to all, multiples of `step`."""
    width = st.integers(0, channels // step).map(lambda n: n * step)
    return st.none() | st.lists(width, min_size=num_groups, max_size=num_groups).map(tuple)


def _subset(draw: st.DrawFn, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if draw(st.booleans()))


@st.composite
def conv_cases(draw: st.DrawFn, fused: bool = False) -> ConvCase:
    """Any odd filter, stride 1 and 2, any padding, images from 1x1, channels of no particular multiple.

    fused: with a second input, upsampling, or both.
    """
    routing = draw(routings())
    filter_ = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (5, 5)]))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    size = tuple(draw(st.integers(max(1, f - 2 * p), 9)) for f, p in zip(filter_, padding, strict=True))
    in_channels, out_channels = draw(st.integers(1 + fused, 20)), draw(st.integers(1, 20))
    upsample = draw(st.integers(1, 2)) if fused else 1
    return ConvCase(
        routing=routing,
        in_channels=in_channels,
        out_channels=out_channels,
        size=(size[0], size[1]),
        filter=filter_,
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=padding,
        in_widths=draw(widths_of(in_channels, 1, routing.num_groups)),
        out_widths=draw(widths_of(out_channels, 1, routing.num_groups)),
        extras=_subset(draw, "bias", "sample_bias", "residual"),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
        x2_channels=draw(st.integers(2 - upsample, in_channels - 1)) if fused else 0,
        upsample=upsample,
    )


@st.composite
def norm_cases(draw: st.DrawFn, fused: bool = False) -> NormCase:
    """At least two values per norm group: the normal of a single value is zero whatever it is.

    fused: with a second input.
    """
    routing = draw(routings())
    norm_groups, per_group = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    channels = norm_groups * per_group
    if fused and channels == 1:
        norm_groups = channels = 2
    size = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    if per_group * size[0] * size[1] == 1:
        size = (2, 1)
    return NormCase(
        routing=routing,
        channels=channels,
        num_groups=norm_groups,
        size=size,
        widths=draw(widths_of(channels, per_group, routing.num_groups)),
        extras=_subset(draw, "scale", "shift"),
        activation=draw(st.sampled_from([None, "silu"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
        x2_channels=draw(st.integers(1, channels - 1)) if fused else 0,
    )
