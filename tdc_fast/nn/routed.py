"""The routed leaves: one layer that holds E experts' weights and computes each sample with its own group's expert.

A routed leaf has the call signature of its dense twin in `tdc_fast.nn.layers`. Unless a plan is passed, it takes the
plan of the running forward from the `PlanScope` of the model. Samples must be sorted by that plan. Where neighbouring
groups share weights there are fewer experts than groups; widths are still those of every group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import integer, invalid
from tdc_fast.nn.leaf import RoutedLeaf, has_hooks
from tdc_fast.ops import routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops.checks import can_read, check_memory, pair
from tdc_fast.ops.layout import empty_channel_innermost
from tdc_fast.routing import RoutingPlan


class RoutedConv2d(RoutedLeaf):
    """`routed_conv2d` with parameters weight (E, C_out, C_in, R, S) and bias (E, C_out).

    The memory order of the weight is [E, C_out, R, S, C_in], which GPU kernels read in place. Its gradient and its
    optimizer state have the same order; a state dict of any order can be loaded.
    """

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
        filter_size = pair("kernel_size", kernel_size, 1)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, filter_size
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(empty_channel_innermost((num_experts, out_channels, in_channels, *filter_size)))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        _initialise(self.weight, self.bias)

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan | None = None,
        *,
        x2: Tensor | None = None,
        upsample: int = 1,
        sample_bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve each sample with its expert's weight, then add what is given.

        Args:
            x: images (B, C_in, H, W), sorted by the plan; with x2 the first channels of them.
            plan: the plan; None takes that of the running forward.
            x2: the last input channels (B, C_2, H, W).
            upsample: 2 doubles height and width first, by repeating pixels.
            sample_bias: bias per sample (B, C_out).
            residual: (B, C_out, OH, OW).

        Returns:
            (B, C_out, OH, OW).
        """
        return routed_conv2d(
            x,
            *self.operands(x.dtype, plan),
            stride=self.stride,
            padding=self.padding,
            in_widths=self.in_widths,
            out_widths=self.out_widths,
            sample_bias=sample_bias,
            residual=residual,
            x2=x2,
            upsample=upsample,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies `fn`, such as a change of dtype or memory format, to weights as torch's Conv2d has them.

        The weight is seen as (E * C_out, C_in, R, S), so `to(memory_format=torch.channels_last)` means what it means
        for a dense layer.
        """

        def on_filters(value: Tensor) -> Tensor:
            if value.dim() != 5:
                return fn(value)
            filters = value.flatten(0, 1)
            moved = fn(filters)
            return value if moved is filters else moved.unflatten(0, value.shape[:2])

        return super()._apply(on_filters, recurse)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return (
            f"{self.num_experts}, {self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


class RoutedLinear(RoutedLeaf):
    """`routed_linear` with parameters weight (E, C_out, C_in) and bias (E, C_out)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(num_experts)
        self.in_features, self.out_features = in_features, out_features
        self.filter_axis = False  # True where the dense twin is a 1x1 Conv1d, whose weight is (C_out, C_in, 1)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        _initialise(self.weight, self.bias)

    def forward(self, x: Tensor, plan: RoutingPlan | None = None, *, residual: Tensor | None = None) -> Tensor:
        """Map x (B, ..., C_in), sorted by the plan, to (B, ..., C_out) and add the residual (B, ..., C_out).

        Blocks of channels are consecutive, as in the dense layer. If experts differ in width this needs a copy, which
        `chunks` avoids.
        """
        copies = 1 if self.live_out is None else self.live_out.copies
        if copies == 1:
            return self._stacked(x, plan, residual)
        y = self._stacked(x, plan).unflatten(-1, (-1, copies)).transpose(-1, -2).flatten(-2)
        return y if residual is None else residual + y

    def _stacked(self, x: Tensor, plan: RoutingPlan | None, residual: Tensor | None = None) -> Tensor:
        """The output in the order of the stacked channels."""
        if x.dim() > 3:
            tokens = x.flatten(1, -2)
            added = None if residual is None else residual.flatten(1, -2)
            return self._stacked(tokens, plan, added).unflatten(1, x.shape[1:-1])
        return routed_linear(
            x,
            *self.operands(x.dtype, plan),
            in_widths=self.in_widths,
            out_widths=self.out_widths,
            residual=residual,
        )

    def chunks(self, x: Tensor, count: int, plan: RoutingPlan | None = None) -> tuple[Tensor, ...]:
        """The output of x in the `count` blocks of channels of the dense layout, each (..., C_out / count)."""
        if self._interleaves(count) and not has_hooks(self):
            return self._stacked(x, plan).unflatten(-1, (-1, count)).unbind(-1)
        return self(x, plan).chunk(count, dim=-1)

    def apart(self, value: Tensor, count: int) -> Tensor:
        """A weight or bias (E, C_out, ...) by the blocks that `chunks` gives: a view (count, E, C_out / count, ...)."""
        if self._interleaves(count):
            return value.unflatten(1, (-1, count)).movedim(2, 0)
        return value.unflatten(1, (count, -1)).movedim(1, 0)

    def _interleaves(self, count: int) -> bool:
        return self.live_out is not None and self.live_out.copies == count

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.num_experts}, {self.in_features}, {self.out_features}"

    def _dense_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape, 1) if self.filter_axis and name == "weight" else tuple(shape)


class RoutedConv1d(RoutedLinear):
    """A routed 1x1 Conv1d on (B, C, T)."""

    def forward(self, x: Tensor, plan: RoutingPlan | None = None, **fused: Tensor | None) -> Tensor:
        """Map x (B, C_in, T), sorted by the plan, to (B, C_out, T)."""
        return super().forward(x.transpose(1, 2).contiguous(), plan, **fused).transpose(1, 2)


class RoutedGroupNorm(RoutedLeaf):
    """`routed_group_norm` with parameters weight and bias (E, C).

    A pruned expert keeps whole normalisation groups, each with as many channels as before pruning; `num_groups` counts
    those of the widest expert.
    """

    bias: Tensor

    def __init__(self, num_experts: int, num_groups: int, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_experts)
        num_groups = integer("num_groups", num_groups)
        if num_channels % num_groups:
            raise invalid("num_groups", num_groups, f"a divisor of the {num_channels} channels")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = nn.Parameter(torch.ones(num_experts, num_channels))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_channels))

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan | None = None,
        *,
        x2: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Compute `activation(norm(x) * (1 + scale) + shift)` with each sample's expert.

        Args:
            x: (B, C), (B, C, T) or (B, C, H, W), sorted by the plan.
            plan: the plan; None takes that of the running forward.
            x2: the last channels of images (B, C_2, H, W), of which x is the first.
            scale: (B, C).
            shift: (B, C).
            activation: "silu", or None for none.

        Returns:
            Like x, or (B, C, H, W) with x2, in the dtype of x.
        """
        image = x if x.dim() == 4 else x.reshape(x.shape[0], x.shape[1], -1, 1)
        weight, bias, plan = self.operands(x.dtype, plan)
        if bias is None or weight.dtype != x.dtype:  # a norm of fp32 under autocast computes in fp32
            weight, bias = self.weight, self.bias
        y = routed_group_norm(
            image,
            weight,
            bias,
            plan,
            num_groups=self.num_groups,
            eps=self.eps,
            widths=self.out_widths,
            scale=scale,
            shift=shift,
            activation=activation,
            x2=x2,
        )
        return y if x.dim() == 4 else y.reshape(x.shape)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.num_experts}, {self.num_groups}, {self.num_channels}, eps={self.eps}"


class RoutedEmbedding(RoutedLeaf):
    """A table per expert: weight (E, num_embeddings, D)."""

    in_autocast_dtype = False

    def __init__(self, num_experts: int, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_experts)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.randn(num_experts, num_embeddings, embedding_dim))

    def forward(self, index: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """Look up integer ids `index` (B, ...), sorted by the plan, in each sample's table: (B, ..., D).

        Raises:
            ValueError: for ids that the table does not have, or of another number of samples; and in host memory for
                positions that all samples share, where there are as many as samples (B >= 8).
        """
        plan = self.current_plan(plan)
        if tuple(index.shape[:1]) not in ((1,), (plan.batch_size,)):
            remedy = f"ids of each of the {plan.batch_size} samples, (B, ...); expand what all samples share"
            raise invalid("index", tuple(index.shape), remedy)
        if can_read(index) and index.numel():
            check_memory(index=index, weight=self.weight, plan=plan.groups, weight_index=plan.weight_index)
            low, high = (int(bound) for bound in torch.aminmax(index))
            if low < 0 or high >= self.num_embeddings:  # would read another expert's table
                raise invalid("index", low if low < 0 else high, f"ids in [0, {self.num_embeddings})")
            if self._are_positions(index, plan):
                remedy = "positions, which all samples share, with a dimension for the samples: arange(n)[None]"
                raise invalid("index", f"the numbers from 0 to {high}", remedy)
        expert = plan.weight_index[plan.groups].to(index.dtype)
        rows = index + expert.view(-1, *[1] * (index.dim() - 1)) * self.num_embeddings
        return F.embedding(rows, self.weight.flatten(0, 1))

    def _are_positions(self, index: Tensor, plan: RoutingPlan) -> bool:
        """Whether a row of ids is rather arange(B), made in the forward for all samples, than an id per sample.

        Where all samples have the same expert it makes no difference. Fewer than 8 could well be labels.
        """
        running = None if self.routing is None else self.routing.running
        if running is None or index.ndim != 1 or len(index) < 8 or bool((plan.groups == plan.groups[0]).all()):
            return False
        if not torch.equal(index, torch.arange(len(index), dtype=index.dtype)):
            return False
        return all(given.untyped_storage().data_ptr() != index.untyped_storage().data_ptr() for given in running.ids)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.num_experts}, {self.num_embeddings}, {self.embedding_dim}"


def _initialise(weight: Tensor, bias: Tensor | None) -> None:
    """Initialises every expert as torch initialises the dense layer."""
    bound = 1 / math.sqrt(max(math.prod(weight.shape[2:]), 1))  # the product is the fan-in
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)
