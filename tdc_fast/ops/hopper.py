"""The `hopper` backend: the `cuda` backend with forms of its own.

They are the convolution's Hopper form (TMA and wgmma, csrc/cuda/conv/hopper_*), and group norms and their gradients as
a stream, where there are many chunks (csrc/cuda/group_norm/stream.cuh), or by clusters, where images are large
(csrc/cuda/group_norm/cluster.cuh).

On a GPU of compute capability 9.0 it serves 3x3 and 1x1 convolutions, linear layers and their gradients in that form
where it can (`form` says where, and `explain` shows it), everything else as `cuda` does. It runs where it is asked for
by name, as a `backend` or in TDC_FAST_BACKEND, and where measured times of the device say that it is the fastest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.ops import cuda, native
from tdc_fast.ops.cuda_device import Facts
from tdc_fast.ops.cuda_launch import launcher_facts

name = "hopper"
fuses = cuda.fuses
only_launches = True
ARCHITECTURE = 90
HOPPER_FORM = "in the Hopper form"  # what `form` says of it
NORM_FORMS = ("as a stream", "by clusters")  # and of norms that do not run as in `cuda`


def supports(problem: Problem) -> str | None:
    """None where the backend serves the problem, else the reason why not."""
    reason = cuda.supports(problem)
    if reason is not None:
        return reason
    arch = launcher_facts(problem.device)[0]
    if arch != ARCHITECTURE:
        return f"it is for compute capability 9.0, not {arch // 10}.{arch % 10}: `cuda` has the other kernels"
    return None


def form(problem: Problem) -> str:
    """In words, which kernels serve a problem that the backend supports, and why not the Hopper form."""
    if isinstance(problem, NormProblem):
        core = native.module
        form_of = (
            core.cuda_group_norm_backward_hopper_form
            if problem.op == "routed_group_norm_backward"
            else core.cuda_group_norm_forward_hopper_form
        )
        return str(form_of(**cuda.norm_sizes(problem), device=launcher_facts(problem.device)))
    return form_of_conv(problem, launcher_facts(problem.device))


def form_of_conv(problem: ConvProblem, facts: Facts) -> str:
    """What `form` says of a convolution on a device with these facts, which need not be here."""
    few_channels = cuda.form_of_conv(problem, facts)
    if few_channels:
        return few_channels
    core = native.module
    refuse = {
        "routed_conv2d": core.cuda_conv_forward_hopper_refusal,
        "routed_conv2d_dgrad": core.cuda_conv_dgrad_hopper_refusal,
        "routed_conv2d_wgrad": core.cuda_conv_wgrad_hopper_refusal,
    }[problem.op]
    reason = refuse(**cuda.geometry(problem), device=facts)
    return f"in the portable form: the Hopper form does not serve this, {reason}" if reason else HOPPER_FORM


def group_norm(p: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y (B, C, H, W), channels_last; mean and rstd (B, norm groups) fp32; counters, zeros."""
    return cuda.group_norm(p, t, streamed=True)


def group_norm_backward(
    p: NormProblem,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    t: NormTensors,
    mask: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, weight, bias, scale, shift and x2, in their shapes; None where unmasked."""
    return cuda.group_norm_backward(p, dy, mean, rstd, t, mask, streamed=True)


def conv2d(p: ConvProblem, t: ConvTensors) -> Tensor:
    """Returns y (B, C_out, OH, OW), channels_last."""
    return cuda.conv2d(p, t, hopper=True)


def conv2d_dgrad(p: ConvProblem, dy: Tensor, t: ConvTensors) -> tuple[Tensor, Any]:
    """Returns dx and dx2 or None, as `cuda` does."""
    return cuda.conv2d_dgrad(p, dy, t, hopper=True)


def conv2d_wgrad(
    p: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns dweight, dbias (E, C_out), dsample_bias (B, C_out); None where unmasked."""
    return cuda.conv2d_wgrad(p, dy, t, mask, hopper=True)
