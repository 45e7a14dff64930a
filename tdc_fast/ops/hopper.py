"""The `hopper` backend: the `cuda` backend with further kernels for compute capability 9.0.

These are convolutions and their gradients with TMA and wgmma (the "Hopper form", csrc/cuda/conv/hopper_*), and group
norms and their gradients as a stream, where there are many chunks (csrc/cuda/group_norm/stream.cuh), or by clusters,
where images are large (csrc/cuda/group_norm/cluster.cuh). `form` says which calls these kernels serve, and `explain`
shows it; everything else runs as in `cuda`.

The backend runs where it is asked for by name, as a `backend` or in TDC_FAST_BACKEND, and where measured times of the
device say that it is the fastest.
"""

from __future__ import annotations

import functools

from tdc_fast.kernels.problems import ConvProblem, NormProblem, Problem
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


# As in `cuda`, with the kernels above where these serve.
conv2d = functools.partial(cuda.conv2d, hopper=True)
conv2d_dgrad = functools.partial(cuda.conv2d_dgrad, hopper=True)
conv2d_wgrad = functools.partial(cuda.conv2d_wgrad, hopper=True)
group_norm = functools.partial(cuda.group_norm, streamed=True)
group_norm_backward = functools.partial(cuda.group_norm_backward, streamed=True)
