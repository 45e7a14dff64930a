"""Many pruned candidates of one base as one routed model: they share its weights and differ in their widths.

Candidates of one group order their atoms the same way, most important first, so a candidate is just one width per
unit. The base's weights are stored once, in that order and at full width. Every candidate is a group of the routing
plan, whose `weight_index` points all of them at these weights; the layers' widths differ from candidate to candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.protocols import Denoiser
from tdc_fast.nn.casts import InDtype
from tdc_fast.nn.inference import cast_weights
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.nn.modes import evaluating
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.plan_scope import Running
from tdc_fast.nn.routed import RoutedConv1d, RoutedConv2d
from tdc_fast.nn.units import Prunable, PruningUnit, module_of, units_of
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tdc_fast.routing import RoutingPlan, TimestepGroups


class CandidateModel:
    """The base with its atoms ordered by importance; runs candidates of different widths in one batch.

    Args:
        base: its units are named after modules, and `pack_experts` can pack it. It is not changed.
        orders: {unit: atoms, most important first}.
        dtype: what the candidates compute in. Other than float32, the weights are cast to it, once.
    """

    def __init__(
        self, base: nn.Module | Prunable, orders: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> None:
        module = module_of(base)
        self.units: tuple[PruningUnit, ...] = tuple(units_of(base))
        whole = {unit.name: ExpertUnit(tuple(orders[unit.name]), unit.channels) for unit in self.units}
        plan = WidthPlan(base_hash="0" * 64, boundaries=(0, 1), experts=(whole,))
        packed = pack_experts([module], TimestepGroups([0, 1]), plan)
        self._model: nn.Module = packed.model.requires_grad_(False)
        self._routing = packed.routing
        self._device = next(self._model.parameters()).device
        self._open: dict[str, Tensor] = {}  # unit -> (K,), 0 where the candidate has no such unit
        self._widths: dict[int, dict[tuple[str, str], Tensor]] = {}  # K -> by leaf and axis, or by unit: (K,)
        self._of: dict[int, Denoiser] = {}
        for unit in self.units:
            for part in unit.slices:
                if part.dim == "in":
                    self._drop_bias_at_width_0(unit.name, self._model.get_submodule(part.module))
        self._dtype = dtype
        if dtype != torch.float32:
            cast_weights(self._model, dtype)

    @contextmanager
    def of_widths(self, candidates: Sequence[Mapping[str, int]]) -> Iterator[Denoiser]:
        """A denoiser of K candidates.

        It takes (x, t, **kwargs) of K blocks of equally many samples, block k for candidate k. Keyword tensors whose
        first dimension is the number of samples are per sample, as everywhere.

        Args:
            candidates: the widths of each candidate, {unit: channels}.
        """
        for unit in self.units:
            live = [widths[unit.name] for widths in candidates]
            self._open[unit.name] = self._of_count((unit.name, ""), [float(width > 0) for width in live])
            for part in unit.slices:
                leaf = self._model.get_submodule(part.module)
                assert isinstance(leaf, RoutedLeaf)
                entries = [width * part.scale * part.copies for width in live]
                name = "out_widths" if part.dim == "out" else "in_widths"
                setattr(leaf, name, self._of_count((part.module, name), entries))
        # One object for each number of candidates, so that a graph of it is found again.
        if len(candidates) not in self._of:
            denoise = partial(self._denoise, len(candidates))
            self._of[len(candidates)] = denoise if self._dtype == torch.float32 else InDtype(denoise, self._dtype)
        with evaluating(self._model):
            yield self._of[len(candidates)]

    def _of_count(self, name: tuple[str, str], values: Sequence[float]) -> Tensor:
        """The values in a tensor that stays where it is for one number of candidates, so that graphs can read it."""
        dtype = torch.int32 if name[1] else torch.float32
        kept = self._widths.setdefault(len(values), {})
        if name not in kept:
            kept[name] = torch.empty(len(values), dtype=dtype, device=self._device)
        return kept[name].copy_(torch.tensor(values, dtype=dtype))

    def _denoise(self, count: int, x: Tensor, t: Tensor, /, **kwargs: Any) -> Tensor:
        groups = torch.arange(count, device=x.device).repeat_interleave(len(x) // count)
        weights = torch.zeros(count, dtype=torch.int32, device=x.device)
        plan = RoutingPlan.from_groups(groups, count, weights)  # sorted already, so nothing is permuted
        prediction: Tensor = self._routing.run(self._model, Running(plan), x, t, **kwargs)
        return prediction

    def _drop_bias_at_width_0(self, unit: str, leaf: nn.Module) -> None:
        """Leave out the bias of a unit's last layer for the samples of candidates at width 0.

        All candidates share the bias, so it is removed from the layer and added per sample instead.
        """
        assert isinstance(leaf, RoutedLeaf)
        if leaf.bias is None:
            return
        bias = leaf.get_parameter("bias").detach()  # (1, C_out)
        leaf.register_parameter("bias", None)

        def add_bias(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            x, plan = args[0], self._routing.plan
            assert plan is not None
            per_sample = (bias * self._open[unit][plan.groups, None]).to(x.dtype)  # (B, C_out)
            if isinstance(layer, RoutedConv2d):
                return args, {**kwargs, "sample_bias": per_sample}
            tokens = [1] * (x.dim() - 2)
            added = per_sample.view(len(x), *tokens, -1)
            if kwargs.get("residual") is not None:
                return args, {**kwargs, "residual": kwargs["residual"] + added}
            positions = x.shape[2:] if isinstance(layer, RoutedConv1d) else x.shape[1:-1]
            return args, {**kwargs, "residual": added.expand(len(x), *positions, added.shape[-1]).contiguous()}

        leaf.register_forward_pre_hook(add_bias, with_kwargs=True)
