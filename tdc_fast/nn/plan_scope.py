"""Which forward the layers of a model run in, also when a gradient checkpoint recomputes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tdc_fast.nn.casts import Copies, Key
from tdc_fast.nn.sharing import Rows
from tdc_fast.routing import RoutingPlan

Sharing = tuple[Rows, bool]
"""The rows of weights of a layer that groups share, and whether those groups can be one in its plan."""


class Running(NamedTuple):
    """What the layers of a running forward share.

    Attributes:
        plan: the plan that sorted the batch.
        copies: the parameters in the dtype of autocast, or None.
        shared: the plans of layers whose weights groups share, by how they share.
        ids: what the model was given with a number per sample, sorted by the plan, such as timesteps and labels; empty
            on a GPU.
    """

    plan: RoutingPlan
    copies: Copies | None = None
    shared: Mapping[Sharing | None, RoutingPlan] = MappingProxyType({})
    ids: tuple[Tensor, ...] = ()


class Kept(NamedTuple):
    """The copies that the forwards of a `cast_once` share, and whether its block began inside a capture."""

    captured: bool
    copies: dict[Key, Copies]


class UsesPlan:
    """A module that asks for the running forward; packing sets its `routing`.

    A class of its own, so that a module of the user's may have an attribute of that name.
    """

    routing: PlanScope | None = None


class PlanScope(threading.local):
    """Gives the routed layers of a model the plan of the forward that they run in.

    Every thread has its own, so forwards in several threads do not mix. (`torch.compile` can trace a `threading.local`,
    but not a `contextvars.ContextVar`.)

    Attributes:
        kept: what the forwards of a `cast_once` share; None outside one.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self._running: Running | None = None
        self._state_at_entry: tuple[bool, Any] = (False, None)
        self._recomputes = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts without a plan; a thread's own state cannot be copied."""
        return PlanScope, ()

    @property
    def plan(self) -> RoutingPlan | None:
        """The plan of the running forward, or of the forward that a checkpoint recomputes; None outside both."""
        running = self.running
        return None if running is None else running.plan

    @property
    def running(self) -> Running | None:
        """The running forward, or the forward that a checkpoint recomputes; None outside both."""
        if torch.compiler.is_compiling():
            return self._running
        if self._running is None:
            node = torch._C._current_autograd_node()
            return None if node is None else _metadata(node).get(self)
        if self._state_at_entry[0] and _autograd_state() != self._state_at_entry:
            self._recomputes = True
        return self._running

    @contextmanager
    def using(self, running: Running | None) -> Iterator[None]:
        """Sets the running forward for the block and restores the earlier one after it."""
        before = self._running, self._state_at_entry
        self._running, self._state_at_entry = running, (False, None)
        try:
            yield
        finally:
            self._running, self._state_at_entry = before

    def run(self, function: Callable[..., Any], running: Running, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, a model's forward.

        A `torch.utils.checkpoint` in the forward runs layers again in the backward. What they need is then found at the
        node of the autograd graph that asks for them, where it is left here; so it is right with any number of forwards
        whose backward is to come.
        """
        if torch.compiler.is_compiling():  # a compiled graph holds the plan itself
            with self.using(running):
                return function(*args, **kwargs)
        before, self._recomputes = self._recomputes, False
        try:
            with self.using(running):
                self._state_at_entry = _autograd_state()
                out = function(*args, **kwargs)
            if self._recomputes:
                # Without the copies, which hold nodes: a cycle, never freed.
                self._leave_at_nodes(out, (args, kwargs), running._replace(copies=None))
            return out
        finally:
            self._recomputes = before

    def _leave_at_nodes(self, out: Any, given: Any, running: Running) -> None:
        """Leaves the forward at the nodes of the graph between its arguments and its results that have none yet."""
        seen = {value.grad_fn for value in _pytree.tree_leaves(given) if isinstance(value, Tensor)}
        nodes = [value.grad_fn for value in _pytree.tree_leaves(out) if isinstance(value, Tensor)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                _metadata(node).setdefault(self, running)
                nodes += [earlier for earlier, _ in node.next_functions]


def _metadata(node: Any) -> dict[Any, Any]:
    """What torch lets others keep at a node of the autograd graph (its type hints call it a method)."""
    kept: dict[Any, Any] = node.metadata
    return kept


def _autograd_state() -> tuple[bool, Any]:
    """Whether gradients are recorded, and what happens to saved tensors; a checkpoint changes one of them."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def checkpoint(function: Callable[..., Any], routing: PlanScope | None, *args: Any, random: bool = True) -> Any:
    """`function(*args)` without keeping activations: it runs again in the backward, as part of this forward.

    Same as torch's checkpoint, but as it keeps the forward itself, `PlanScope` need not search the autograd graph.

    Args:
        function: what to run.
        routing: the holder of the running forward; None without one.
        *args: the function's arguments.
        random: it draws random numbers, which must be the same again. Their state is then read, which a CUDA graph
            cannot hold.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if routing is None or torch.compiler.is_compiling():  # a compiled graph holds the plan itself
        return torch_checkpoint(function, *args, **options)
    running = routing.running

    def within(*inputs: Any) -> Any:
        with routing.using(running):
            return function(*inputs)

    return torch_checkpoint(within, *args, **options)
