"""Which of a model's arguments have an entry per sample and are sorted with the batch, also within dicts and lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree

from tdc_fast.errors import invalid
from tdc_fast.nn.timesteps import other_arguments

RESULT = "return"
_PLAIN = (int, float, complex, str, bytes, type(None))


def checked_names(per_sample: Collection[str] | None, model: nn.Module) -> tuple[str, ...] | None:
    """Returns `per_sample` as a tuple; ValueError for a name that is no argument of the model's forward."""
    if per_sample is None:
        return None
    if isinstance(per_sample, str) or not all(isinstance(name, str) for name in per_sample):
        raise invalid("per_sample", per_sample, 'a sequence of argument names, such as ("y",), or None')
    parameters = inspect.signature(model.forward).parameters.values()
    known = [*other_arguments(model), RESULT]
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name in per_sample:
        if name.partition(".")[0] not in known and not anything:
            raise invalid("per_sample", name, f"one of {known}, or such a name and the path within it (cond.text)")
    return tuple(per_sample)


def map_samples(
    function: Callable[[Tensor], Tensor], value: Any, name: str, batch: int, per_sample: tuple[str, ...] | None
) -> Any:
    """Applies `function` to every tensor in `value` that has an entry per sample.

    Args:
        function: sorts the samples of a tensor, or undoes it.
        value: a tensor, or what holds tensors.
        name: the argument's name.
        batch: B.
        per_sample: names of what has an entry per sample; None takes every tensor whose first dimension is B.

    Raises:
        ValueError: for a tensor named in `per_sample` that has another first dimension, and for what may have an entry
            per sample but cannot be sorted.
    """

    def mapped(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        full = ".".join(
            [name, *(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)]
        )
        if _has_no_paths(leaf):
            node = _pytree.SUPPORTED_NODES[type(leaf)]
            children, context = node.flatten_fn(leaf)
            keys = list(leaf) if isinstance(leaf, Mapping) else range(len(children))
            parts = [
                map_samples(function, child, f"{full}.{key}", batch, per_sample)
                for key, child in zip(keys, children, strict=True)
            ]
            return node.unflatten_fn(parts, context)
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise invalid(full, "a nested tensor", "a dense one: convert it with to_padded_tensor()")
        if not isinstance(leaf, Tensor):
            if per_sample is None or any(
                f"{full}.".startswith(f"{w}.") or w.startswith(f"{full}.") for w in per_sample
            ):
                _refuse_hidden(full, leaf, batch, per_sample is not None)
            return leaf
        if per_sample is None:
            return function(leaf) if leaf.shape[:1] == (batch,) else leaf
        if not any(full == wanted or full.startswith(wanted + ".") for wanted in per_sample):
            return leaf
        if leaf.shape[:1] != (batch,):
            raise invalid(full, tuple(leaf.shape), f"one entry for each of the {batch} samples, as per_sample says")
        return function(leaf)

    if isinstance(value, (Tensor, *_PLAIN)):
        return mapped((), value)
    return _pytree.tree_map_with_path(mapped, value, is_leaf=lambda node: _is_row(node) or _has_no_paths(node))


def _is_row(value: Any) -> bool:
    """True for a list or tuple of texts, numbers and tensors of one number, which may have an entry per sample."""
    return isinstance(value, (list, tuple)) and all(
        entry.ndim == 0 if isinstance(entry, Tensor) else isinstance(entry, _PLAIN) for entry in value
    )


def _has_no_paths(value: Any) -> bool:
    """True for a container that torch can take apart, but not with the names of its parts: an output of diffusers."""
    node = _pytree.SUPPORTED_NODES.get(type(value))
    return node is not None and node.flatten_with_keys_fn is None


def _refuse_hidden(name: str, leaf: Any, batch: int, named: bool) -> None:
    """Raises ValueError for entries per sample that would stay unsorted without a word."""
    if isinstance(leaf, np.ndarray):
        if leaf.shape[:1] == (batch,):
            raise invalid(name, f"a numpy array of {batch} entries", "a torch tensor, which is sorted with the samples")
    elif _is_row(leaf):
        # A tuple of numbers is rather a size or a range, which all samples share, unless per_sample says otherwise.
        shared = isinstance(leaf, tuple) and not named and all(isinstance(entry, int | float) for entry in leaf)
        if len(leaf) == batch and not shared and any(entry is not None for entry in leaf):
            raise invalid(
                name,
                leaf,
                "tensors for what each sample has; if all samples share it, name in per_sample what they do not",
            )
    elif not isinstance(leaf, nn.Module):
        inside = list(leaf.values() if isinstance(leaf, Mapping) else leaf if isinstance(leaf, Collection) else ())
        inside += getattr(leaf, "__dict__", {}).values()
        inside += [getattr(leaf, slot, None) for kind in type(leaf).__mro__ for slot in _slots(kind)]
        if any(isinstance(part, Tensor) for part in _pytree.tree_leaves(inside)):
            raise invalid(name, type(leaf).__name__, "tensors in dicts, lists and tuples, where they can be sorted")


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
