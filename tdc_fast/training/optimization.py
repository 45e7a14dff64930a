"""AdamW, its learning-rate schedule, and gradient norms of a model or per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.training.stored_state import MOMENTS


@dataclass(frozen=True)
class LearningRate:
    """The learning rate by step: a linear rise, then constant, then a linear fall to 0. Steps count from 0.

    Attributes:
        peak: the constant rate.
        warmup: steps of the rise.
        anneal_start: step at which the fall begins.
        anneal_end: step at which it ends; 0 for no fall.
    """

    peak: float
    warmup: int = 0
    anneal_start: int = 0
    anneal_end: int = 0

    def __call__(self, step: int) -> float:
        """The rate at a step."""
        rate = self.peak
        if self.anneal_end and step > self.anneal_start:
            rate *= max(0.0, 1.0 - (step - self.anneal_start) / (self.anneal_end - self.anneal_start))
        if step < self.warmup:
            rate *= (step + 1) / self.warmup
        return rate


def create_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as improved-diffusion uses it, in torch's fused form (one kernel for all parameters).

    Its learning rate is a 0-dim tensor, which every step reads where it is: see `rate_of`.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    # torch's fused kernels read the rate as a float on a GPU, and as a double on the CPU.
    rate = torch.tensor(lr, dtype=torch.float32 if on_gpu else torch.float64, device=device)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay, fused=True, capturable=on_gpu)


def rate_of(optimizer: torch.optim.Optimizer) -> Tensor:
    """The learning rate of an optimizer of `create_optimizer`, 0-dim: write into it to change the rate."""
    rate: Tensor = optimizer.param_groups[0]["lr"]
    return rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with the learning rate as a number, as other programs have it."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[int, Mapping[str, Any]]) -> None:
    """Take AdamW's state by number of the parameter; the settings and the tensor of the rate stay the optimizer's."""
    rate = rate_of(optimizer)
    settings = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The fused kernels read all tensors of a parameter in the order of their memory: the strides have to be its own.
    with torch.no_grad():
        state = {
            number: {
                "step": torch.tensor(float(entry["step"])),
                **{name: torch.empty_like(parameters[number]).copy_(entry[name]) for name in MOMENTS},
            }
            for number, entry in moments.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": settings})
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], limit: float, num_experts: int | None = None) -> Tensor:
    """The norm of all gradients before they are clipped.

    Args:
        parameters: those without a gradient are ignored.
        limit: gradients are scaled down to this norm; 0 does not clip.
        num_experts: E if every gradient has a leading dimension E. Each expert is then clipped by its own norm, so an
            outlier of one expert does not shrink the steps of the others.

    Returns:
        0-dim tensor; nothing is read back to the host.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not limit or num_experts is None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if limit:
            torch._foreach_mul_(gradients, _scale(norm, limit))
        return norm
    # Lists of one expert's gradients: a GPU takes a few launches for each, not two for every parameter.
    of_expert = [[gradient[expert] for gradient in gradients] for expert in range(num_experts)]
    norms = torch.stack([torch.linalg.vector_norm(torch.stack(torch._foreach_norm(part))) for part in of_expert])
    for part, scale in zip(of_expert, _scale(norms, limit), strict=True):
        torch._foreach_mul_(part, scale)
    return torch.linalg.vector_norm(norms)


def _scale(norm: Tensor, limit: float) -> Tensor:
    return (limit / (norm + 1e-6)).clamp(max=1.0)
