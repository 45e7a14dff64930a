"""Routed problems on a device, the precisions they come in, and torch's own error for each.

Every test of this folder runs on a GPU (marker `gpu`) and, with the same body and the reference backend, on the CPU:
the dry run finds mistakes in a test without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm
from tdc_fast.ops import cuda_launch
from tdc_fast.ops.cuda_device import Facts, Launcher
from tests.cases import ConvCase, NormCase, Routing, laid_out


@dataclass(frozen=True)
class Target:
    device: str
    backend: str


def targets(*backends: str) -> list[Any]:
    """pytest parameters: these backends on a GPU, and the reference on the CPU."""
    on_gpu = [pytest.param(Target("cuda", name), marks=pytest.mark.gpu, id=name) for name in backends]
    return [*on_gpu, pytest.param(Target("cpu", "reference"), id="dry-run")]


on_every_backend = pytest.mark.parametrize("target", targets("triton", "cuda", "reference"))
on_fast_backends = pytest.mark.parametrize("target", targets("triton", "cuda"))
# The backend of every operator in a network: the automatic choice, or one backend for all.
on_every_choice = pytest.mark.parametrize(
    ("device", "backend"),
    [
        *(pytest.param("cuda", name, marks=pytest.mark.gpu, id=name or "chosen") for name in ("", "triton", "cuda")),
        pytest.param("cpu", "reference", id="dry-run"),
    ],
)
on_device = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"), pytest.param("cpu", id="dry-run")]
)


@dataclass(frozen=True)
class Precision:
    name: str
    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def active(self) -> Iterator[None]:
        """float32 means float32, in torch's own kernels too, unless this is TF32."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


BF16, FP16 = Precision("bf16", torch.bfloat16), Precision("fp16", torch.float16)
FP32, TF32 = Precision("fp32", torch.float32), Precision("tf32", torch.float32, tf32=True)


def truncated_to_tf32(tensor: Tensor) -> Tensor:
    """fp32 values as tensor cores read them: truncated to 10 bits of mantissa."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).view(tensor.shape)


FEW_SMS = 2


class FewSms:
    """A launcher that says of its GPU that it has few SMs: planners choose large tiles, each block computes many."""

    def __init__(self, launcher: Launcher) -> None:
        self.name, self._launcher = launcher.name, launcher

    def device_facts(self, device: torch.device) -> Facts:
        arch, _, shared = self._launcher.device_facts(device)
        return arch, FEW_SMS, shared

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        self._launcher.run(launches, device)


@contextmanager
def on_sms(few: bool) -> Iterator[None]:
    """Within the block the kernels of the current GPU run on few of its SMs, or on all."""
    if not few:
        yield
        return
    launcher, reason = cuda_launch.launcher_for(torch.device("cuda"))
    assert launcher is not None, reason
    with cuda_launch.use_launcher(FewSms(launcher)):
        yield


def plan_on(routing: Routing, device: str) -> RoutingPlan:
    index = None if routing.weight_index is None else torch.tensor(routing.weight_index, dtype=torch.int32)
    groups = torch.tensor(routing.groups, dtype=torch.int64, device=device)
    return RoutingPlan.from_groups(groups, routing.num_groups, None if index is None else index.to(device))


def moved(tensors: dict[str, Tensor], device: str, layout: str) -> dict[str, Tensor]:
    """The tensors as leaves on the device; activations keep the memory layout of the case."""
    result = {}
    for name, tensor in tensors.items():
        there = tensor.detach().to(device)
        result[name] = (laid_out(there, layout) if tensor.dim() == 4 else there).requires_grad_()
    return result


def settings_on(case: ConvCase | NormCase, device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.settings().items()}


def routed(
    case: ConvCase | NormCase,
    tensors: dict[str, Tensor],
    target: Target,
    plan: RoutingPlan | None = None,
    settings: dict[str, Any] | None = None,
) -> Tensor:
    """The routed operator of the case on the tensors' device; `plan` and `settings` are built if not given."""
    device = target.device
    arguments: dict[str, Any] = (settings or settings_on(case, device)) | {"backend": target.backend}
    plan = plan or plan_on(case.routing, device)
    if isinstance(case, ConvCase):
        extras = {name: tensors.get(name) for name in ("sample_bias", "residual", "x2")}
        return routed_conv2d(tensors["x"], tensors["weight"], tensors.get("bias"), plan, **arguments, **extras)
    extras = {name: tensors.get(name) for name in ("scale", "shift", "x2")}
    return routed_group_norm(tensors["x"], tensors["weight"], tensors["bias"], plan, **arguments, **extras)


def gradients(y: Tensor, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The result and the gradient of every input, on the CPU."""
    if y.requires_grad:
        grads = torch.autograd.grad(
            y, list(tensors.values()), dy.to(y.device), allow_unused=True, materialize_grads=True
        )
    else:  # an empty batch
        grads = tuple(torch.zeros_like(t) for t in tensors.values())
    return {"y": y.detach().cpu(), **{f"d{k}": grad.cpu() for k, grad in zip(tensors, grads, strict=True)}}


def refusal(case: ConvCase | NormCase, tensors: dict[str, Tensor], target: Target) -> str | None:
    """Why the backend does not serve the case, or None."""
    plan, settings = plan_on(case.routing, target.device), settings_on(case, target.device)
    operator = routed_conv2d if isinstance(case, ConvCase) else routed_group_norm
    inputs = (tensors["x"], tensors["weight"], tensors.get("bias"))
    what = explain(operator, *inputs, plan, **settings, x2=tensors.get("x2"))
    return what.reasons.get(target.backend, "it is not registered")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
