"""A dense model on the routed kernels: the model of one expert, with the parameters of the dense one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tdc_fast.kernels.problems import NormProblem
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.per_group import PerGroup
from tdc_fast.ops.backends import select
from tdc_fast.routing import TimestepGroups


class OneExpert:
    """Calls a dense model as a packed model of one expert, which runs on the routed kernels.

    The parameters are those of the dense model, seen as stacks of one: its state dict and its optimizer stay as they
    are, and gradients arrive at it. Whether dropout is active is the dense model's mode.

    Layers that are to be computed again in the backward (`use_checkpoint`) would not find the parameters then: where
    gradients are recorded, such a model runs as it is.

    Args:
        model: any module that `pack_experts` can pack; its structure and its parameters must stay as they are.

    Attributes:
        has_layers_without_kernels: whether a part of the model only runs group by group (`PerGroup`).
    """

    def __init__(self, model: nn.Module) -> None:
        # Packed without memory: the parameters of the copy are never read.
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
        packed = pack_experts(copy.deepcopy(model, memo), TimestepGroups([0, 1]))
        self._model, self._packed = model, packed
        self.has_layers_without_kernels = any(isinstance(module, PerGroup) for module in packed.modules())
        self._recomputes = any(getattr(module, "use_checkpoint", False) for module in model.modules())
        ranks = {name: parameter.dim() for name, parameter in packed.named_parameters()}
        self._parameters = [
            (f"model.{name}", parameter, parameter.dim() + 1 > ranks[f"model.{name}"])
            for name, parameter in model.named_parameters()
        ]

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The model's output; arguments as for the model, with integer timesteps t (B,)."""
        if self._recomputes and torch.is_grad_enabled():
            return self._model(x, t, *args, **kwargs)
        if self._packed.training != self._model.training:
            self._packed.train(self._model.training)
        stacked = {
            name: parameter[None].flatten(2) if has_filter_axis else parameter[None]
            for name, parameter, has_filter_axis in self._parameters
        }
        kwargs["expert_ids"] = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return functional_call(self._packed, stacked, (x, t, *args), kwargs)


def as_one_expert(model: nn.Module, num_timesteps: int) -> RoutedModel:
    """A dense model packed as one expert for all timesteps, with a copy of its weights.

    On the CPU its output for a sample does not depend on the batch it is in, bit for bit, which torch's own
    convolutions do not promise.

    Args:
        model: any module that `pack_experts` can pack.
        num_timesteps: T of the process that it was trained on.
    """
    return pack_experts(model, TimestepGroups([0, num_timesteps])).train(model.training)


def kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether routed operators run on GPU kernels on this device, so that packing one expert is worth it."""
    return device.type == "cuda" and _backend(device, dtype) in ("triton", "cuda", "hopper")


def cpu_kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether routed operators run on the CPU kernels on this device."""
    return device.type == "cpu" and _backend(device, dtype) == "cpu"


def _backend(device: torch.device, dtype: torch.dtype) -> str:
    problem = NormProblem("routed_group_norm", device, dtype, 1, 8, 8, 64, 32, 1e-5, True, 1, 1)
    return select(problem, "").name
