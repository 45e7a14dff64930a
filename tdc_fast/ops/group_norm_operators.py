"""The registered operators behind routed_group_norm: schemas, implementations, fakes, gradient, autocast.

    tdc_fast::routed_group_norm    tdc_fast::routed_group_norm_backward

Their schemas are flat lists of arguments; everything below them takes NormTensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import NormProblem, NormTensors
from tdc_fast.ops import backends, call_cache, library
from tdc_fast.ops.check_values import check_norm_values, run_or_explain
from tdc_fast.ops.checks import accumulate_dtype, check_memory, converted, norm_problem
from tdc_fast.ops.dead_channels import note_zeros
from tdc_fast.ops.layout import empty_nhwc
from tdc_fast.ops.reference import group_norm_tangent as norm_tangent

_SETTINGS_SCHEMA = "int num_groups, float eps, bool silu"


def _tensors(args: tuple[Any, ...], counters: Tensor | None = None) -> NormTensors:
    """The tensors, which come first in the forward's schema."""
    x, weight, bias, scale, shift, x2, offsets, weight_index, widths = args
    return NormTensors(x, weight, bias, offsets, weight_index, widths, scale, shift, x2, counters)


def forward_problem(*args: Any) -> NormProblem:
    """The problem of the forward's arguments but `backend`; raises the ValueErrors that the forward would raise."""
    t = _tensors(args[:-3])
    problem = norm_problem("routed_group_norm", t, *args[-3:])
    check_memory(**t._asdict())
    check_norm_values(problem, t)
    return problem


def _forward(*args: Any) -> call_cache.Bound:
    t, settings, backend = _tensors(args[:-4]), args[-4:-1], args[-1]

    def describe() -> NormProblem:
        return norm_problem("routed_group_norm", t, *settings)

    problem, chosen = backends.remembered(("routed_group_norm", settings), t, describe, backend)

    def run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = _tensors(args[:-4])
        return run_or_explain(chosen.group_norm, check_norm_values, problem, t, t)

    return call_cache.Bound(run, backends.only_launches(chosen))


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = _tensors(args[:-4])
    p = norm_problem("routed_group_norm", t, *args[-4:-1])
    shape, dtype = (p.batch, p.num_norm_groups), accumulate_dtype(p.dtype)
    y = empty_nhwc(t.x, p.batch, p.channels, p.height, p.width)
    counters = t.x.new_empty((p.num_experts, p.num_norm_groups), dtype=torch.int32)
    return y, t.x.new_empty(shape, dtype=dtype), t.x.new_empty(shape, dtype=dtype), counters


forward = call_cache.Operator(
    "routed_group_norm(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? x2, "
    f"Tensor offsets, Tensor weight_index, Tensor? widths, {_SETTINGS_SCHEMA}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _backward(dy: Tensor, *args: Any) -> call_cache.Bound:
    *inputs, mean, rstd, counters, offsets, weight_index, widths, num_groups, eps, silu, mask, backend = args
    t, settings = _tensors((*inputs, offsets, weight_index, widths), counters), (num_groups, eps, silu)

    def describe() -> NormProblem:
        return norm_problem("routed_group_norm_backward", t, *settings, dy=dy, mean=mean, rstd=rstd)

    key = ("routed_group_norm_backward", settings)
    problem, chosen = backends.remembered(key, t, describe, backend, dy=dy, mean=mean, rstd=rstd)

    def run(dy: Tensor, *args: Any) -> list[Tensor]:
        *inputs, mean, rstd, counters, offsets, weight_index, widths, _, _, _, _, _ = args
        t = _tensors((*inputs, offsets, weight_index, widths), counters)
        grads = run_or_explain(
            chosen.group_norm_backward, check_norm_values, problem, t, dy, mean, rstd, t, tuple(mask)
        )
        return [grad for grad in grads if grad is not None]

    return call_cache.Bound(run, backends.only_launches(chosen))


def _backward_fake(dy: Tensor, *args: Any) -> list[Tensor]:
    x, weight, bias, _, _, x2 = args[:6]
    per_sample, none = dy.shape[:2], torch.Size()
    shapes = (x.shape, weight.shape, bias.shape, per_sample, per_sample, none if x2 is None else x2.shape)
    wanted = (shape for shape, wants in zip(shapes, args[-2], strict=True) if wants)
    return [empty_nhwc(dy, *shape) if len(shape) == 4 else dy.new_empty(shape) for shape in wanted]


# The gradients that `mask` asks for, in the order of x, weight, bias, scale, shift, x2. `counters` holds zeros again at
# the end, so nothing is written as far as torch can tell.
_backward_op = call_cache.Operator(
    "routed_group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? x2, Tensor mean, Tensor rstd, Tensor counters, Tensor offsets, Tensor weight_index, Tensor? widths, "
    f"{_SETTINGS_SCHEMA}, bool[6] mask, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd, counters = result
    *inputs, offsets, weight_index, widths, num_groups, eps, silu, backend = args
    ctx.save_for_backward(*inputs, mean, rstd, counters, offsets, weight_index, widths)
    ctx.settings, ctx.backend = (num_groups, eps, silu), backend
    ctx.mark_non_differentiable(mean, rstd, counters)
    ctx.set_materialize_grads(False)


@library.once_differentiable
def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    mask = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors  # once: torch's checkpoint unpacks no tensor twice
    grads = _backward_op.call(dy, *saved, *ctx.settings, mask, ctx.backend)
    *_, offsets, _, widths = saved
    if mask[0] and not mask[5]:
        note_zeros(grads[0], widths, offsets)
    remaining = iter(grads)
    return (*(next(remaining) if wanted else None for wanted in mask), *(None,) * 7)


def _tangent(args: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The derivative in plain torch, with the statistics computed again so that it can itself be differentiated."""
    t, settings = _tensors(args[:-4]), args[-4:-1]
    problem = norm_problem("routed_group_norm", t, *settings)
    moving = _tensors(tangents[:-4])._replace(offsets=t.offsets, weight_index=t.weight_index, widths=t.widths)
    check_memory(**moving._asdict())
    return norm_tangent(problem, t, moving)


_ARGUMENTS = [argument.name for argument in forward.overload._schema.arguments]


def _cast(device_type: str, x: Tensor, *args: Any) -> tuple[Any, ...]:
    low = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return x, *(
        converted(name, arg, x.dtype) if low and isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for name, arg in zip(_ARGUMENTS[1:], args, strict=True)
    )


forward.add_autograd(_save, _gradients, _tangent)
forward.add_autocast(_cast)
