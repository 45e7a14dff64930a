"""How a denoiser computes: its precision, and whether a dense one runs on torch's kernels or on the routed ones.

Its output is always in fp32, because losses and samplers compute in fp32.
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
from tdc_fast.nn.one_expert import OneExpert, cpu_kernels_serve, kernels_serve
from tdc_fast.nn.packing import RoutedModel

_log = logging.getLogger("tdc_fast.inference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def denoiser_in(model: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A model that computes in a given precision. Its weights keep their own and receive gradients.

    Args:
        model: a denoiser, dense or packed, on its device.
        dtype: float32 returns the model itself. bfloat16 and float16 compute under autocast, on a GPU with a dense
            model on the routed kernels, which are faster there. (In fp32 torch's convolutions are the faster ones, as
            they round their factors to TF32.)

    Returns:
        A module that is called as the model is, with integer timesteps, and returns fp32.
    """
    if dtype == torch.float32:
        return model
    on_kernels = not isinstance(model, RoutedModel) and kernels_serve(_device(model), dtype)
    return InDtype(OneExpert(model) if on_kernels else model, dtype)


class ForInference(nn.Module):
    """A denoiser as `for_inference` prepares it.

    Attributes:
        model: the denoiser itself.
        dtype: what it computes in.
        on_routed_kernels: whether it is a dense model that runs as one expert.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, as_expert: OneExpert | None) -> None:
        super().__init__()
        self.model, self.dtype, self.on_routed_kernels = model, dtype, as_expert is not None
        inner: Callable[..., Tensor] = as_expert or model
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

    To run an expert that is a plain module on the routed kernels::

        expert = for_inference(routed.expert(2).cuda(), torch.bfloat16)

    Args:
        model: a denoiser, called as model(x, t, **condition), dense or packed, on its device.
        dtype: what it computes in; float32 does not cast the weights.
        routed_kernels: run a dense model on the routed kernels, as one expert. None does so where they are faster than
            torch's: on a GPU in bfloat16 and float16, and on the CPU in float32 for models with convolutions. (UNets
            take from 0.7 to 1.0 times torch's time there, the less the larger the batch; in bfloat16 from 0.8 to 1.4
            times.) A model of which some layer has no routed kernel then stays on torch's; the log
            (`tdc_fast.inference`) says which way it went, and why.

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
    as_expert = None  # what cannot be packed is refused before anything is cast
    if not isinstance(model, RoutedModel):
        wanted = _is_faster_on_routed_kernels(model, dtype) if routed_kernels is None else routed_kernels
        as_expert = _as_expert(model, required=routed_kernels is True) if wanted else None
    model.eval()
    if dtype != torch.float32:
        cast_weights(model, dtype)
    if as_expert is not None:
        _log.info("%s runs on the routed kernels, as one expert, in %s", type(model).__name__, dtype)
    if dtype == torch.float32 and as_expert is None:
        return model
    return ForInference(model, dtype, as_expert)


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


def _as_expert(model: nn.Module, required: bool) -> OneExpert | None:
    """The model as one expert; None, and a line in the log, where that is not required and not worth it."""
    try:
        as_expert = OneExpert(model)
    except ValueError as refusal:
        if required:
            raise
        why = str(refusal)
    else:
        if required or not as_expert.has_layers_without_kernels:
            return as_expert
        why = "some of its layers have no routed kernel"
    _log.info("%s stays on torch's kernels: %s", type(model).__name__, why)
    return None


def _is_faster_on_routed_kernels(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the routed kernels take less time than torch's for a dense model that is not trained."""
    device = _device(model)
    if device.type != "cpu":
        return dtype != torch.float32 and kernels_serve(device, dtype)
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
    in_fp32 = dtype == torch.float32 and all(parameter.dtype == dtype for parameter in model.parameters())
    return has_convolutions and in_fp32 and cpu_kernels_serve(device, dtype)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
