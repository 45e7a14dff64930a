"""The routed layer norm: torch's kernel without an affine, then each sample's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.ops.plan import check_plan
from tdc_fast.routing import RoutingPlan


class RoutedLayerNorm(RoutedLeaf):
    """`nn.LayerNorm` with an affine per expert: weight and bias (E, *normalized_shape).

    Statistics need no parameters, so all samples share one launch of torch's kernel.
    """

    in_autocast_dtype = False

    def __init__(self, num_experts: int, normalized_shape: Sequence[int], eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(num_experts)
        self.normalized_shape, self.eps = tuple(normalized_shape), eps
        self.weight = nn.Parameter(torch.ones(num_experts, *normalized_shape))
        self.bias = nn.Parameter(torch.zeros(num_experts, *normalized_shape)) if bias else None

    def forward(self, x: Tensor, plan: RoutingPlan | None = None) -> Tensor:
        """Normalise x (B, ..., *normalized_shape), sorted by the plan, and apply each sample's affine; like x."""
        plan = self.current_plan(plan)
        check_plan(x, plan)
        experts = plan.weight_index[plan.groups].long()
        y = F.layer_norm(x, self.normalized_shape, None, None, self.eps)
        weight = self._of_samples(self.weight, experts, x)
        if self.bias is None:
            return y * weight
        return torch.addcmul(self._of_samples(self.bias, experts, x), y, weight)

    def _of_samples(self, value: Tensor, experts: Tensor, x: Tensor) -> Tensor:
        """Each sample's row, shaped to meet x; a look-up whose gradient is deterministic."""
        rows = F.embedding(experts, value.flatten(1))
        between = [1] * (x.dim() - 1 - len(self.normalized_shape))
        return rows.view(len(experts), *between, *self.normalized_shape)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.num_experts}, {self.normalized_shape}, eps={self.eps}"
