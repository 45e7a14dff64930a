"""Whether a packed model computes what its experts compute one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tdc_fast.errors import invalid
from tdc_fast.nn.modes import evaluating
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.nn.sample_arguments import map_samples
from tdc_fast.nn.timesteps import groups_of, one_per_sample, other_arguments, timestep_argument
from tdc_fast.routing import RoutingPlan

Calls = dict[str, list[Tensor]]
"""What modules returned, call by call, by their path."""


@torch.no_grad()
def check_against_experts(
    routed: RoutedModel, x: Tensor, t: Tensor | float, *args: Any, tolerance: float = 1e-3, **kwargs: Any
) -> float:
    """Compare a packed model with its experts: call this once after you have packed a model of your own.

    A forward may do what packing cannot see: have the samples in another dimension, compute with the weights of another
    layer, or ask for the class of a layer, which is another one in a packed model. Where the shapes happen to fit, that
    raises no error. Here each sample is computed alone by its `expert(i)`, in evaluation mode, and compared.

    Args:
        routed: the packed model, with weights that are not all equal from expert to expert.
        x: samples (B, ...), of several groups.
        t: their timesteps, as for the model.
        *args: the model's other arguments.
        tolerance: the largest difference, relative to the largest value of the output. In 16 bits, take 0.05.
        **kwargs: likewise.

    Returns:
        The largest difference, relative to the largest value of the output.

    Raises:
        ValueError: naming the first module whose output differs, if its output has samples in the first dimension.
    """
    if not isinstance(routed, RoutedModel):
        raise invalid("routed", type(routed).__name__, "a RoutedModel, which pack_experts makes")
    t = one_per_sample(t, x)
    ids = groups_of(routed.groups, t)
    experts = {group: routed.expert(group).eval() for group in ids.unique().tolist()}

    def alone(sample: int) -> Any:
        return _denoise(experts[int(ids[sample])], routed.per_sample, sample, x, t, args, kwargs)

    with evaluating(routed):
        found, expected = _tensors(routed(x, t, *args, **kwargs)), [_tensors(alone(i)) for i in range(len(x))]
        worst = max((_difference(a, b) for a, *b in zip(found, *expected, strict=True)), default=0.0)
        if worst <= tolerance:
            return worst
        with _recording(routed.model) as together:
            routed(x, t, *args, **kwargs)
        apart = []
        for sample in range(len(x)):
            with _recording(experts[int(ids[sample])]) as calls:
                alone(sample)
            apart.append(calls)
    plan = RoutingPlan.from_groups(ids, routed.num_experts)
    path = next((path for path in together if _differs(path, together, apart, plan.unsort, tolerance)), "")
    remedy = (
        f"a model whose output is that of each sample's expert, within {tolerance}; from this module on it is not. "
        "Look at what computes its input and its output: samples belong into the first dimension, parameters are read "
        "by their own module alone, and layers have other classes in a packed model"
    )
    raise invalid(f"module {path!r}", f"a relative difference of {worst:.2g}", remedy)


def _denoise(
    expert: nn.Module,
    per_sample: tuple[str, ...] | None,
    sample: int,
    x: Tensor,
    t: Tensor,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """One sample of a batch, by its dense expert."""
    mine = partial(map_samples, lambda value: value[sample, None], batch=len(x), per_sample=per_sample)
    names = [*other_arguments(expert), *(f"args.{index}" for index in range(len(args)))]
    given = [mine(value=value, name=name) for name, value in zip(names, args, strict=False)]
    named = {name: mine(value=value, name=name) for name, value in kwargs.items()}
    place, timestep = timestep_argument(expert)
    if timestep is not None and len(given) < place:
        named[timestep] = t[sample, None]
    else:
        given.insert(place, t[sample, None])
    return expert(x[sample, None], *given, **named)


def _tensors(out: Any) -> list[Tensor]:
    return [value for value in _pytree.tree_leaves(out) if isinstance(value, Tensor)]


def _difference(found: Tensor, expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value; infinite for another shape or a NaN."""
    whole = torch.cat(list(expected)).double()
    if whole.shape != found.shape:
        return float("inf")
    difference = float((found.double() - whole).abs().amax() / whole.abs().amax().clamp(min=1e-30)) if len(whole) else 0
    return difference if difference >= 0 else float("inf")


@contextmanager
def _recording(model: nn.Module) -> Iterator[Calls]:
    """Keeps what the modules of a model return in the block."""
    calls: Calls = {}

    def keep(path: str, module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            calls.setdefault(path, []).append(out)

    hooks = [module.register_forward_hook(partial(keep, path)) for path, module in model.named_modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _differs(
    path: str, together: Calls, apart: Sequence[Calls], unsort: Callable[[Tensor], Tensor], tolerance: float
) -> bool:
    """Whether a module gave something else; False where calls and shapes are others, as inside of pruned units."""
    found, expected = together[path], [calls.get(path, []) for calls in apart]
    if any(len(calls) != len(found) for calls in expected):
        return False
    return any(
        len({value.shape for value in alone}) == 1
        and (len(apart), *alone[0].shape[1:]) == value.shape
        and _difference(unsort(value), alone) > tolerance
        for value, *alone in zip(found, *expected, strict=True)
    )
