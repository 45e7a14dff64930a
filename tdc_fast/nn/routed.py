"""The routed leaves: E experts' weights in one layer, each sample computed with its own group's expert.

A routed leaf has the call signature of its dense twin in ``tdc_fast.nn.layers`` and reads the plan of the running
forward from the ``Routing`` its model shares, unless a plan is passed. Samples must be sorted by that plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.plan_scope import Routing
from tdc_fast.ops import routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops.layout import empty_channel_innermost
from tdc_fast.routing import RoutingPlan


@dataclass(frozen=True)
class LiveAxis:
    """Which entries of a channel axis each expert uses.

    A dense axis is ``copies`` consecutive blocks; the stacked one interleaves them (entry i of copy c at i * copies
    + c), so that what is live is a prefix whatever the number of copies. ``counts`` (E) are live entries per copy.
    """

    counts: tuple[int, ...]
    copies: int = 1

    @property
    def size(self) -> int:
        """Physical length of the stacked axis: what the widest expert needs."""
        return max(self.counts) * self.copies

    def widths(self, device: torch.device | None = None) -> Tensor | None:
        """Live prefix per expert, int32 (E,); None when every expert uses the whole stacked axis."""
        if min(self.counts) == max(self.counts):
            return None
        return torch.tensor([count * self.copies for count in self.counts], dtype=torch.int32, device=device)

    def positions(self, expert: int) -> Tensor:
        """Stacked position of every entry of the expert's dense axis, int64."""
        entries = torch.arange(self.counts[expert])
        return torch.cat([entries * self.copies + copy for copy in range(self.copies)])


class RoutedLeaf(nn.Module):
    """What all routed leaves share: the plan, the live axes, and moving one expert's weights in and out.

    ``out_widths`` and ``in_widths`` are int32 buffers (N,) in units of channels, or None where all experts are alike.
    """

    out_widths: Tensor | None
    in_widths: Tensor | None

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise invalid("num_experts", num_experts, "at least 1")
        self.num_experts = num_experts
        self.routing: Routing | None = None
        self.live_out: LiveAxis | None = None
        self.live_in: LiveAxis | None = None
        self.template: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule: the dense twin, on meta
        self.register_buffer("out_widths", None, persistent=False)
        self.register_buffer("in_widths", None, persistent=False)

    def set_live(self, out: LiveAxis | None, in_: LiveAxis | None) -> None:
        """Give the leaf the widths of pruned experts. The parameters already have the stacked sizes."""
        self.live_out, self.live_in = out, in_
        device = next(self.parameters()).device
        self.out_widths = None if out is None else out.widths(device)
        self.in_widths = None if in_ is None else in_.widths(device)

    def current_plan(self, plan: RoutingPlan | None) -> RoutingPlan:
        """The plan passed, else the one of the model's running forward."""
        if plan is not None:
            return plan
        if self.routing is None or self.routing.plan is None:
            raise invalid("plan", None, "a RoutingPlan, or a call from within RoutedModel's forward")
        return self.routing.plan

    @torch.no_grad()
    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """{'weight', 'bias'} of one expert in the dense layer's layout and its own live size (copies)."""
        state = {}
        for name, parameter in self.named_parameters():
            value = parameter[expert][self._live_index(parameter, expert)]
            state[name] = value.reshape(self._dense_shape(name, value.shape)).contiguous()
        return state

    @torch.no_grad()
    def load_expert(self, expert: int, state: Mapping[str, Tensor]) -> None:
        """The opposite of ``expert_state``; what is past the expert's widths becomes zero."""
        for name, parameter in self.named_parameters():
            target, index = parameter[expert], self._live_index(parameter, expert)
            shape = (*index[0].shape, *target.shape[index[0].dim() :])
            if state[name].shape != self._dense_shape(name, shape):
                raise invalid(name, tuple(state[name].shape), f"the shape {shape} that expert {expert} has")
            value = state[name].to(parameter.device, parameter.dtype).reshape(shape)
            target.zero_()
            target[index] = value

    def dense(self, expert: int) -> nn.Module:
        """The layer of one expert as the ordinary layer this leaf was packed from (never pruned)."""
        like = next(self.parameters())  # the leaf may have moved since it was packed
        layer = copy.deepcopy(self.template[0]).to(like.dtype).to_empty(device=like.device)
        layer.load_state_dict(self.expert_state(expert))
        return layer.train(self.training)

    def _live_index(self, parameter: Tensor, expert: int) -> tuple[Tensor, ...]:
        """Indices of the expert's live entries on the channel axes of its slice of a parameter."""
        axes = (self.live_out, self.live_in)[: parameter.dim() - 1]
        positions = [
            torch.arange(size) if axis is None else axis.positions(expert)
            for size, axis in zip(parameter.shape[1:3], axes, strict=True)
        ]
        return tuple(index.to(parameter.device) for index in torch.meshgrid(*positions, indexing="ij"))

    def _dense_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


class RoutedConv2d(RoutedLeaf):
    """``routed_conv2d`` with parameters weight (E, C_out, C_in, R, S) and bias (E, C_out).

    The weight lies in memory as [E, C_out, R, S, C_in], which GPU kernels read in place. Its gradient and what an
    optimizer keeps of it follow; a state dict of any memory order loads.
    """

    closing_gate: Tensor | None

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(num_experts)
        filter_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, filter_size
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(empty_channel_innermost((num_experts, out_channels, in_channels, *filter_size)))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        self.register_buffer("closing_gate", None, persistent=False)
        _initialise(self.weight, self.bias)

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan | None = None,
        *,
        sample_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x (B, C_in, H, W) sorted, sample_bias (B, C_out), residual (B, C_out, OH, OW) -> (B, C_out, OH, OW)."""
        bias = self.bias if self.closing_gate is None else _gated(self.bias, self.closing_gate)
        return routed_conv2d(
            x,
            self.weight,
            bias,
            self.current_plan(plan),
            stride=self.stride,
            padding=self.padding,
            in_widths=self.in_widths,
            out_widths=self.out_widths,
            sample_bias=sample_bias,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, {self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


class RoutedLinear(RoutedLeaf):
    """``routed_linear`` with parameters weight (E, C_out, C_in) and bias (E, C_out)."""

    closing_gate: Tensor | None

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(num_experts)
        self.in_features, self.out_features = in_features, out_features
        self.filter_axis = False  # True where the dense twin is a 1x1 Conv1d, whose weight is (C_out, C_in, 1)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.register_buffer("closing_gate", None, persistent=False)
        _initialise(self.weight, self.bias)

    def forward(self, x: Tensor, plan: RoutingPlan | None = None, *, residual: Tensor | None = None) -> Tensor:
        """x (B, C_in) or (B, ..., C_in) sorted, residual (B, ..., C_out) -> (B, ..., C_out)."""
        bias = self.bias if self.closing_gate is None else _gated(self.bias, self.closing_gate)
        if x.dim() > 3:
            tokens = x.flatten(1, -2)
            added = None if residual is None else residual.flatten(1, -2)
            return self.forward(tokens, plan, residual=added).unflatten(1, x.shape[1:-1])
        return routed_linear(
            x,
            self.weight,
            bias,
            self.current_plan(plan),
            in_widths=self.in_widths,
            out_widths=self.out_widths,
            residual=residual,
        )

    def chunks(self, x: Tensor, count: int, plan: RoutingPlan | None = None) -> tuple[Tensor, ...]:
        """The output's channels in ``count`` blocks of the dense layout, each (..., C_out / count)."""
        y = self(x, plan)
        if self.live_out is not None and self.live_out.copies == count:
            return y.unflatten(-1, (-1, count)).unbind(-1)
        return y.chunk(count, dim=-1)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.in_features}, {self.out_features}"

    def _dense_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape, 1) if self.filter_axis and name == "weight" else tuple(shape)


class RoutedConv1d(RoutedLinear):
    """A routed 1x1 Conv1d on (B, C, T)."""

    def forward(self, x: Tensor, plan: RoutingPlan | None = None, **fused: Tensor | None) -> Tensor:
        """x (B, C_in, T) sorted -> (B, C_out, T)."""
        return super().forward(x.transpose(1, 2).contiguous(), plan, **fused).transpose(1, 2)


class RoutedGroupNorm(RoutedLeaf):
    """``routed_group_norm`` with parameters weight and bias (E, C).

    A pruned expert keeps whole normalisation groups: ``num_groups`` counts those of the widest expert, and every group
    has the channels it had before pruning.
    """

    def __init__(self, num_experts: int, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_experts)
        if num_groups < 1 or num_channels % num_groups:
            raise invalid("num_groups", num_groups, f"a divisor of the {num_channels} channels")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_experts, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_channels))

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """x (B, C), (B, C, T) or (B, C, H, W) sorted: ``act(norm(x) * (1 + scale) + shift)``, same shape and dtype."""
        image = x if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], -1, 1)
        y = routed_group_norm(
            image,
            self.weight,
            self.bias,
            self.current_plan(plan),
            num_groups=self.num_groups,
            eps=self.eps,
            widths=self.out_widths,
            scale=scale,
            shift=shift,
            activation=activation,
        )
        return y if x.dim() == 4 else y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.num_groups}, {self.num_channels}, eps={self.eps}"


class RoutedEmbedding(RoutedLeaf):
    """A table per expert: weight (E, num_embeddings, D)."""

    def __init__(self, num_experts: int, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_experts)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.randn(num_experts, num_embeddings, embedding_dim))

    def forward(self, index: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """index (B, ...) integer, sorted -> (B, ..., D)."""
        plan = self.current_plan(plan)
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
            low, high = (int(bound) for bound in torch.aminmax(index))
            if low < 0 or high >= self.num_embeddings:  # would read another expert's table
                raise invalid("index", low if low < 0 else high, f"ids in [0, {self.num_embeddings})")
        expert = plan.weight_index[plan.groups].to(index.dtype)
        rows = index + expert.view(-1, *[1] * (index.dim() - 1)) * self.num_embeddings
        return F.embedding(rows, self.weight.flatten(0, 1))

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.num_embeddings}, {self.embedding_dim}"


def _initialise(weight: Tensor, bias: Tensor | None) -> None:
    """torch's initialisation of the dense layer, for every expert."""
    bound = 1 / math.sqrt(max(math.prod(weight.shape[2:]), 1))  # the product is the fan-in
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def _gated(bias: Tensor | None, gate: Tensor) -> Tensor | None:
    """Bias (E, C) with the experts whose unit has width 0 silenced: such a block is only its skip path."""
    return None if bias is None else bias * gate


def routed_twin(
    name: str, layer: nn.Module, num_experts: int, out: LiveAxis | None, in_: LiveAxis | None
) -> RoutedLeaf:
    """The routed leaf that holds ``num_experts`` experts of a dense layer, uninitialised.

    ``out`` and ``in_`` say which channels are live when experts are pruned. ValueError names a layer with a setting
    that routed operators do not have.
    """
    with torch.device("meta"):
        leaf = _twin(name, layer, num_experts, out, in_)
    leaf.template = (copy.deepcopy(layer).to("meta"),)
    original = next(layer.parameters())
    leaf.to(original.dtype).to_empty(device=original.device)
    leaf.set_live(out, in_)
    leaf.train(layer.training)
    for key, parameter in leaf.named_parameters():
        parameter.requires_grad_(layer.get_parameter(key).requires_grad)
    return leaf


def _twin(name: str, layer: nn.Module, experts: int, out: LiveAxis | None, in_: LiveAxis | None) -> RoutedLeaf:
    def sized(axis: LiveAxis | None, channels: int) -> int:
        return channels if axis is None else axis.size

    if isinstance(layer, nn.Conv2d):
        _require(name, layer, groups=1, dilation=(1, 1), padding_mode="zeros")
        if isinstance(layer.padding, str):
            raise invalid(f"{name}.padding", layer.padding, "numbers")
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        return RoutedConv2d(experts, *channels, layer.kernel_size, layer.stride, layer.padding, layer.bias is not None)  # type: ignore[arg-type]
    if isinstance(layer, nn.Conv1d):
        _require(name, layer, kernel_size=(1,), stride=(1,), padding=(0,), groups=1)
        kind = RoutedLinear if type(layer) is not nn.Conv1d else RoutedConv1d
        channels = sized(in_, layer.in_channels), sized(out, layer.out_channels)
        leaf = kind(experts, *channels, layer.bias is not None)
        leaf.filter_axis = True
        return leaf
    if isinstance(layer, nn.Linear):
        channels = sized(in_, layer.in_features), sized(out, layer.out_features)
        return RoutedLinear(experts, *channels, layer.bias is not None)
    if isinstance(layer, nn.GroupNorm):
        size = sized(out, layer.num_channels)
        per_group = layer.num_channels // layer.num_groups
        return RoutedGroupNorm(experts, max(size // per_group, 1), size, layer.eps)
    if isinstance(layer, nn.Embedding):
        _require(name, layer, padding_idx=None, max_norm=None, scale_grad_by_freq=False, sparse=False)
        return RoutedEmbedding(experts, layer.num_embeddings, layer.embedding_dim)
    raise invalid(name, type(layer).__name__, "a layer that has a routed twin")


def _require(name: str, layer: nn.Module, **settings: object) -> None:
    for setting, value in settings.items():
        if getattr(layer, setting) != value:
            raise invalid(f"{name}.{setting}", getattr(layer, setting), f"{value}, all that routed layers have")
