"""Checks that experts have one architecture: they may differ in the values of their parameters alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tdc_fast.errors import invalid


def check_same_architecture(experts: Sequence[nn.Module]) -> None:
    """Refuses experts that differ in more than the values of their parameters.

    A packed model takes everything else from expert 0, so that another setting or buffer would be lost in silence.

    Args:
        experts: The modules. Compared are the types of their submodules, attributes that are numbers, strings, named
            functions or sequences of these, tensors, modules that are no submodules, the names and shapes of
            parameters, and the buffers.

    Raises:
        ValueError: Naming the first module, attribute, parameter or buffer that is not as in expert 0.
    """
    modules, parameters, buffers = (dict(named) for named in _named_parts(experts[0]))
    for index, expert in enumerate(experts[1:], 1):
        if expert is experts[0]:
            continue
        own_modules, own_parameters, own_buffers = (dict(named) for named in _named_parts(expert))
        for mine, theirs in ((modules, own_modules), (parameters, own_parameters), (buffers, own_buffers)):
            for name in sorted(mine.keys() ^ theirs.keys()):
                raise invalid(f"experts[{index}]", name, "the same layers as experts[0]; only one of them has this")
        for name, module in own_modules.items():
            _check_same_settings(f"experts[{index}]", name, module, modules[name])
        for name, parameter in own_parameters.items():
            if parameter.shape != parameters[name].shape:
                wanted = f"{tuple(parameters[name].shape)}, as in experts[0]"
                raise invalid(f"experts[{index}].{name}", tuple(parameter.shape), wanted)
        for name, buffer in own_buffers.items():
            if not torch.equal(buffer, buffers[name]):
                raise invalid(f"experts[{index}].{name}", "another buffer", "the buffer of experts[0]")
        known = set(own_modules.values()), set(modules.values())
        for name, module in own_modules.items():
            _check_same_hidden(f"experts[{index}]", name, module, modules[name], known)


def _named_parts(expert: nn.Module) -> tuple[Iterable[tuple[str, Any]], ...]:
    """Its modules, parameters and buffers with all their paths."""
    return (
        expert.named_modules(remove_duplicate=False),
        expert.named_parameters(remove_duplicate=False),
        expert.named_buffers(remove_duplicate=False),
    )


def _check_same_settings(expert: str, name: str, module: nn.Module, first: nn.Module) -> None:
    if type(module) is not type(first):
        raise invalid(dotted_path(expert, name), type(module).__name__, f"a {type(first).__name__}, as in experts[0]")
    own, others = _settings(module), _settings(first)
    for key in sorted(own.keys() | others.keys()):
        value, wanted = own.get(key, "missing"), others.get(key, "missing")
        if value != wanted or type(value) is not type(wanted):
            remedy = f"{wanted!r}, as in experts[0]: packed experts differ in their parameters alone"
            raise invalid(dotted_path(expert, name, key), value, remedy)


def _check_same_hidden(
    expert: str, name: str, module: nn.Module, first: nn.Module, known: tuple[Collection[nn.Module], ...]
) -> None:
    """Compares tensors that are no buffers, and modules that are no submodules, such as those in a list of Python."""
    (own, tensors), (others, _) = (_hidden(m, k) for m, k in zip((module, first), known, strict=True))
    for key, value in own.items():
        other = others.get(key)
        if other is None or value.shape != other.shape or not torch.equal(value, other):
            what = "another tensor" if key in tensors else "a layer with other weights, which is no submodule"
            remedy = "what experts[0] has there: weights that the experts do not share belong into submodules"
            raise invalid(dotted_path(expert, name, key), what, remedy)


def _hidden(module: nn.Module, known: Collection[nn.Module]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by the path at which a module holds them beside its parameters, buffers and submodules."""
    found: dict[str, Tensor] = {}
    tensors: set[str] = set()
    for key, attribute in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules"):
            continue
        if not isinstance(attribute, Tensor | nn.Module | list | tuple | dict):  # most are numbers
            continue
        for path, value in _pytree.tree_leaves_with_path(attribute):
            full = key + _pytree.keystr(path)
            if isinstance(value, Tensor):
                found[full] = value
                tensors.add(full)
            elif isinstance(value, nn.Module) and value not in known:
                found |= {f"{full}.{name}": inside for name, inside in value.state_dict().items()}
    return found, tensors


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes that decide what a module computes, as far as their values can be compared."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    named = isinstance(value, FunctionType | BuiltinFunctionType) and "<" not in value.__qualname__
    return named or value is None or isinstance(value, bool | int | float | str | torch.dtype)


def dotted_path(*names: str) -> str:
    """The path of a module or of what it has; a model's own name is empty."""
    return ".".join(name for name in names if name)
