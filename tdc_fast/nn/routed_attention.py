"""The routed twin of `nn.MultiheadAttention`: routed projections around torch's attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.ops import routed_linear
from tdc_fast.routing import RoutingPlan


class _Projection(nn.Module):
    """Holds the output projection's parameters under the names that they have in torch's module."""

    bias: nn.Parameter | None

    def __init__(self, num_experts: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts, width)) if bias else None)


class RoutedMultiheadAttention(RoutedLeaf):
    """Multi-head attention with E experts' projections; parameters are those of `nn.MultiheadAttention`, stacked.

    Args:
        num_experts: E.
        like: the dense layer, of which the sizes and settings are taken.
    """

    # `nn.TransformerEncoderLayer` reads the parameters itself where this is True.
    _qkv_same_embed_dim = False
    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None

    def __init__(self, num_experts: int, like: nn.MultiheadAttention) -> None:
        super().__init__(num_experts)
        self.embed_dim, self.num_heads, self.head_dim = like.embed_dim, like.num_heads, like.head_dim
        self.kdim, self.vdim = like.kdim, like.vdim
        self.dropout, self.batch_first = like.dropout, like.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            own = getattr(like, name)
            stacked = None if own is None else nn.Parameter(torch.empty(num_experts, *own.shape))
            self.register_parameter(name, stacked)
        self.out_proj = _Projection(num_experts, like.embed_dim, like.out_proj.bias is not None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        plan: RoutingPlan | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results as for `nn.MultiheadAttention`, whose samples are sorted by the plan.

        Args:
            query: (B, T, D), or (T, B, D) unless `batch_first`.
            key: (B, S, kdim), likewise.
            value: (B, S, vdim), likewise.
            key_padding_mask: (B, S), True or -inf for keys to leave out.
            need_weights: return the attention weights; torch's fused kernels run only without.
            attn_mask: (T, S), or (B * heads, T, S) for the sorted samples.
            average_attn_weights: the mean of the weights over the heads.
            is_causal: a hint that `attn_mask` is causal; the mask decides.
            plan: the plan; None takes that of the running forward.

        Returns:
            The output, like query, and the weights (B, T, S) or (B, heads, T, S), or None.

        Raises:
            ValueError: for inputs without a batch, and `is_causal` without a mask.
        """
        if query.dim() != 3:
            raise invalid("query", tuple(query.shape), "a batch of sequences, of rank 3")
        if is_causal and attn_mask is None:
            raise invalid("attn_mask", None, "the causal mask, of which is_causal is only a hint")
        plan = self.current_plan(plan)
        q, k, v = (self._heads(part) for part in self._projected(query, key, value, plan))  # (B, heads, T, head_dim)
        mask = self._mask(key_padding_mask, attn_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            h = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        weight, bias = (self._computed_in(value, h) for value in (self.out_proj.weight, self.out_proj.bias))
        y = routed_linear(h.transpose(1, 2).flatten(2), weight, bias, plan)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, plan: RoutingPlan) -> tuple[Tensor, ...]:
        """q, k and v (B, T, D); inputs that are the same are projected in one launch."""
        inputs = [query, key, value]
        bias = self._computed_in(self.in_proj_bias, query)
        if self.in_proj_weight is None:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = [self._computed_in(weight, query) for weight in separate]
        else:
            whole = self._computed_in(self.in_proj_weight, query)
            same = 3 if query is key and key is value else 1
            sizes = [self.embed_dim] * 3 if same == 1 else [3 * self.embed_dim]
            weights = list(whole.split(sizes, dim=1))
            inputs = inputs[:1] if same == 3 else inputs
        biases = [None] * len(weights) if bias is None else bias.split([w.shape[1] for w in weights], dim=1)
        parts = [
            routed_linear(x if self.batch_first else x.transpose(0, 1), weight, own, plan)
            for x, weight, own in zip(inputs, weights, biases, strict=True)
        ]
        return tuple(parts) if len(parts) == 3 else parts[0].chunk(3, dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores (B, heads, T, S)."""
        mask = None if attn_mask is None else _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _computed_in(self, parameter: Any, x: Tensor) -> Any:
        """The parameter for an input x, under autocast its copy in the lower precision; None for None."""
        running = None if self.routing is None else self.routing.running
        if parameter is None or running is None or running.copies is None:
            return parameter
        return running.copies.of(parameter, x.dtype)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.num_experts}, {self.embed_dim}, heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: -inf where a boolean one is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
