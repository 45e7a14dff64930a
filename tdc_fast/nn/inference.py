"""How a denoiser computes: its precision, and whether a dense one runs on torch's kernels or on the routed ones.

Its output is always in fp32, as losses and samplers, the arithmetic of the diffusion process, are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.nn.casts import InDtype
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.nn.one_expert import OneExpert, kernels_serve
from tdc_fast.nn.packing import RoutedModel

_log = logging.getLogger("tdc_fast.inference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def denoiser_in(model: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A model in a precision, with its weights as they are: gradients arrive at them.

    Args:
        model: a denoiser, dense or packed, on its device.
        dtype: float32 returns the model itself. bfloat16 and float16 compute under autocast, on a GPU with a dense
            model on the routed kernels, which are faster there. (In fp32 torch's convolutions are the faster ones, as
            they round their factors to TF32.)

    Returns:
        What is called as the model is, with integer timesteps, and gives fp32.
    """
    if dtype == torch.float32:
        return model
    return InDtype(OneExpert(model) if _runs_on_kernels(model, dtype) else model, dtype)


class ForInference(nn.Module):
    """A denoiser as `for_inference` prepares it.

    Attributes:
        model: the denoiser itself.
        dtype: what it computes in.
        on_routed_kernels: whether it is a dense model that runs as one expert.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, on_routed_kernels: bool) -> None:
        super().__init__()
        self.model, self.dtype, self.on_routed_kernels = model, dtype, on_routed_kernels
        inner: Callable[..., Tensor] = OneExpert(model) if on_routed_kernels else model
        # In a tuple, so that no parameter is found twice.
        self._denoise = (inner if dtype == torch.float32 else InDtype(inner, dtype),)

    @property
    def groups(self) -> Any:
        """The groups of a packed model, else None."""
        return getattr(self.model, "groups", None)

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """The output for x (B, ...) at the integer timesteps t (B,), in fp32."""
        return self._denoise[0](x, t, **condition)

    def extra_repr(self) -> str:
        """How it computes, for `repr`."""
        return f"{self.dtype}{', on the routed kernels' if self.on_routed_kernels else ''}"


def for_inference(
    model: nn.Module, dtype: torch.dtype = torch.float32, *, routed_kernels: bool | None = None
) -> nn.Module:
    """A denoiser prepared for sampling and evaluation, in place, as by `Module.to`.

    It is switched to evaluation mode. In bfloat16 and float16 the weights of its convolutions and linear layers are
    cast, once, so that they take half the memory; it then computes under autocast, norms of a dense model and
    embeddings in fp32. The fp32 weights are lost: load them again to train.

    An expert as a plain module runs on the routed kernels so::

        expert = for_inference(routed.expert(2).cuda(), torch.bfloat16)

    Args:
        model: a denoiser, called as model(x, t, **condition), dense or packed, on its device.
        dtype: float32 leaves the weights as they are.
        routed_kernels: run a dense model on the routed kernels, as one expert. None does so where they are faster than
            torch's: on a GPU, in bfloat16 and float16. (On the CPU they take from 0.7 to 1.1 times torch's time in
            fp32, and from 0.8 to 1.6 times in bfloat16, depending on the shapes.) One that cannot be packed then stays
            on torch's; the log (`tdc_fast.inference`) says why.

    Returns:
        The model itself where nothing has to change, else a `ForInference`.

    Raises:
        ValueError: an unknown dtype, a model that was prepared before, or one that `pack_experts` cannot pack, with
            `routed_kernels`.
    """
    if dtype not in DTYPES:
        raise invalid("dtype", dtype, "torch.float32, torch.bfloat16 or torch.float16")
    if isinstance(model, ForInference):
        raise invalid("model", f"one for inference in {model.dtype}", "the denoiser itself, with its fp32 weights")
    if routed_kernels and isinstance(model, RoutedModel):
        routed_kernels = False  # it runs on them in any case
    as_expert = _runs_on_kernels(model, dtype) if routed_kernels is None else routed_kernels
    model.eval()
    if dtype == torch.float32 and not as_expert:
        return model
    try:
        prepared = ForInference(model, dtype, as_expert)  # refuses what cannot be packed before anything is cast
    except ValueError as refusal:
        if routed_kernels:
            raise
        _log.info("%s stays on torch's kernels: %s", type(model).__name__, refusal)
        as_expert, prepared = False, ForInference(model, dtype, False)
    if dtype != torch.float32:
        cast_weights(model, dtype)
    if as_expert:
        _log.info("%s runs on the routed kernels, as one expert, in %s", type(model).__name__, dtype)
    return prepared


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the fp32 parameters that autocast would cast in every forward, in place.

    They are those of convolutions and linear layers, and in a packed model of most norms too. Results under autocast
    are the same, bit for bit.
    """
    for module in model.modules():
        is_dense = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))
        if is_dense or (isinstance(module, RoutedLeaf) and module.in_autocast_dtype):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(dtype)


def _runs_on_kernels(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is a dense model that the routed kernels compute in less time than torch's."""
    if isinstance(model, RoutedModel) or dtype == torch.float32:
        return False
    first = next(model.parameters(), None)
    return first is not None and kernels_serve(first.device, dtype)
