"""Registration of operators with torch.library: the one place that knows torch's dispatch keys.

An operator is registered in four layers, outermost first. Each layer calls the same operator again below its own key,
so that no registered operator is ever called from inside another:

    Autocast    casts the arguments (`add_autocast`)
    Autograd    one autograd.Function, or straight through when no gradient is wanted (`add_autograd`)
    Python key  torch's modes live here: FlopCounterMode, FakeTensorMode, torch.compile's tracing
    CPU, CUDA   the implementation, which checks its arguments and picks a backend

A call like an earlier one goes past all of them (call_cache.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta

NAMESPACE = "tdc_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_implementations: dict[str, Callable[..., Any]] = {}
_BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset
_DEVICE_KEYS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Registers an operator.

    Args:
        schema: "name(Tensor x, ...) -> Tensor".
        implementation: Computes the operator, on any device.
        fake: Takes the same arguments; returns empty tensors of the right shapes, dtypes and strides.

    Returns:
        The overload to call.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _implementations[name] = implementation
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _name(op: torch._ops.OpOverload) -> str:
    return op._opname


def add_autograd(
    op: torch._ops.OpOverload, save: Callable[..., None], backward: Callable[..., Any], tangent: Callable[..., Any]
) -> Callable[..., Any]:
    """Gives `op` its derivatives: one autograd.Function, skipped when no gradient is wanted, and forward mode.

    Args:
        op: What `define` returned.
        save: save(ctx, args, result) keeps in `ctx` what the backward needs.
        backward: backward(ctx, *grads) returns a gradient or None for each argument of `op`.
        tangent: tangent(args, tangents) returns the derivative of the (first) result along `tangents`, which has a
            tensor or None for each argument. It calls differentiable functions only.

    Returns:
        The Function's `apply` for plain tensors: of all arguments and, last, the function that computes them.
    """
    name = _name(op)
    implementation, redispatch = below_autograd(_implementations[name]), below_autograd(op)
    function = _function(name, save, backward)
    apply = function.apply
    is_grad_enabled = torch.is_grad_enabled
    tensor = torch.Tensor

    def autograd(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        # Without a mode or a tensor subclass, a second trip through the dispatcher would only cost time (5 us).
        direct = (keys & _BELOW_AUTOGRAD).highestPriorityTypeId() in _DEVICE_KEYS
        run = implementation if direct else redispatch
        if forward_ad._current_level >= 0:
            primals, tangents = _unpacked(args)
            if any(moving is not None for moving in tangents):
                return _with_tangent(autograd(keys, *primals), tangent(primals, tangents))
        if is_grad_enabled():
            for arg in args:
                if isinstance(arg, tensor) and arg.requires_grad:
                    if torch._C._are_functorch_transforms_active():
                        raise RuntimeError(
                            f"{name}: torch.func.grad and torch.func.vjp do not work through tdc_fast operators, which "
                            "are differentiable once; use torch.autograd.grad or backward()"
                        )
                    return apply(*args, run)
        return run(*args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return super(torch.autograd.Function, function).apply  # without its search for wrappers of torch.func


def _unpacked(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments without their tangents (forward mode), and the tangents; None where there is none."""
    duals = [
        forward_ad.unpack_dual(arg) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else (arg, None)
        for arg in args
    ]
    return tuple(primal for primal, _ in duals), tuple(moving for _, moving in duals)


def _with_tangent(result: Any, moving: torch.Tensor) -> Any:
    if isinstance(result, torch.Tensor):
        return forward_ad.make_dual(result, moving)
    return forward_ad.make_dual(result[0], moving), *result[1:]


def _function(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """The Function of an operator: it takes the operator's arguments and, last, the function that runs them."""

    def run_and_save(ctx: Any, *args: Any) -> Any:
        result = args[-1](*args[:-1])
        save(ctx, args[:-1], result)
        return result

    def gradients(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    methods = {"forward": staticmethod(run_and_save), "backward": staticmethod(gradients)}
    return FunctionMeta(name, (torch.autograd.Function,), methods)


def below_autograd(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with the operators that it calls dispatched below autograd."""

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    return below


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether nothing of torch but autograd and autocast stands between tensors and their memory on a CPU or GPU.

    No subclass, wrapper of torch.func or of a mode, lazy negation, other layout or device.
    """
    return not torch._C._are_functorch_transforms_active() and all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.device.type in ("cpu", "cuda")
        and torch._C._dispatch_keys(t).raw_repr() in _plain_keys(t.device.type)
        for t in tensors
    )


@functools.cache
def _plain_keys(device_type: str) -> set[int]:
    """The dispatch keys of a new tensor, and of one of inference mode."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return found


def without_autocast() -> Any:
    """The context in which operators are dispatched below autocast."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a `backward`: with create_graph=True it raises, instead of losing terms silently; so it does in vmap.

    torch's decorator of that name raises only when the incoming gradient itself requires one.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("tdc_fast operators are differentiable once: call backward without create_graph=True")
        if forward_ad._current_level >= 0:
            tensors = tuple(grads) + tuple(ctx.saved_tensors)
            if any(moving is not None for moving in _unpacked(tensors)[1]):
                raise RuntimeError("tdc_fast operators are differentiable once: no forward mode through their backward")
        if any(_is_batch_of_vmap(grad) for grad in grads if grad is not None):
            raise RuntimeError(
                "tdc_fast operators take one gradient at a time: call torch.autograd.grad for each, without "
                "is_grads_batched=True, vectorize=True and vmap"
            )
        return backward(ctx, *grads)

    return wrapper


def _is_batch_of_vmap(tensor: torch.Tensor) -> bool:
    functorch = torch._C._functorch  # is_grads_batched=True has batches of a kind of its own
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def add_autocast(op: torch._ops.OpOverload, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Makes `op` receive `cast(device_type, *args)` under torch.autocast."""

    def kernel(device_type: str) -> Callable[..., Any]:
        def autocast(*args: Any) -> Any:
            with without_autocast():
                return op(*cast(device_type, *args))

        return autocast

    name = _name(op)
    _library.impl(name, kernel("cpu"), "AutocastCPU")
    _library.impl(name, kernel("cuda"), "AutocastCUDA")
