"""Models under autocast; the parameters of a packed model are cast all at once, and their gradients back at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree

Key = tuple[torch.dtype, bool]  # dtype; whether gradients are recorded


class InDtype(nn.Module):
    """A denoiser under autocast with its output in fp32, so that the diffusion process computes in fp32.

    Args:
        denoiser: called as denoiser(x, t, **condition).
        dtype: bfloat16 or float16.
    """

    def __init__(self, denoiser: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Any:
        """The output for x (B, ...) at the timesteps t (B,): a tensor, or what holds tensors."""
        with torch.autocast(x.device.type, dtype=self.dtype) if x.device.type != "meta" else nullcontext():
            return _pytree.tree_map_only(Tensor, Tensor.float, self.denoiser(x, t, **condition))


class Copies:
    """Copies of fp32 parameters in a lower precision. Gradients flow back to the parameters.

    They are valid until a parameter changes.

    Args:
        parameters: those to copy; the ones that are not fp32 get no copy.
        dtype: of the copies.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        self._parameters = [
            parameter for parameter in parameters if parameter.dtype == torch.float32
        ]  # keeps ids valid
        self._dtype = dtype
        trained = [p for p in self._parameters if p.requires_grad and torch.is_grad_enabled()]
        fixed = [p for p in self._parameters if not (p.requires_grad and torch.is_grad_enabled())]
        self._copies = dict(zip(map(id, fixed), _cast([p.detach() for p in fixed], dtype), strict=True))
        if trained:
            self._copies.update(zip(map(id, trained), _Cast.apply(dtype, *trained), strict=True))

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy of a parameter for an input of a dtype.

        It is the parameter itself where it has none, and where autocast is not in the dtype of the copies: a part of a
        model may have switched it off.
        """
        copy = self._copies.get(id(parameter))
        if copy is None:
            return parameter
        if copy.dtype == dtype or self._autocast_is_theirs(parameter.device.type):
            return copy
        return parameter

    def _autocast_is_theirs(self, device: str) -> bool:
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == self._dtype


def autocast_key(device: torch.device) -> Key | None:
    """The key of the copies that autocast needs now; None where no copies should be made.

    A compiler fuses casts itself, and transforms of functions do not pass through them.
    """
    if torch.compiler.is_compiling() or device.type not in ("cpu", "cuda"):
        return None
    if not torch.is_autocast_enabled(device.type) or forward_ad._current_level >= 0:
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    return torch.get_autocast_dtype(device.type), torch.is_grad_enabled()


class _Cast(torch.autograd.Function):
    """Nothing is saved, so that several backwards may pass."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_cast(parameters, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_cast([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(wide) for grad in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
