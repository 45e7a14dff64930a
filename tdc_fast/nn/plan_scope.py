"""Which routing plan the layers of a model run under, also when a checkpoint recomputes them later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

if TYPE_CHECKING:
    from tdc_fast.routing import RoutingPlan


class Routing:
    """The one holder of the plan that all routed layers of a model share; ``plan`` is None outside its forward."""

    def __init__(self) -> None:
        self.plan: RoutingPlan | None = None

    @contextmanager
    def using(self, plan: RoutingPlan | None) -> Iterator[None]:
        """Run the layers under ``plan``, then under what it was before."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before


def checkpoint(function: Callable[..., Any], routing: Routing | None, *args: Any) -> Any:
    """``function(*args)`` without keeping activations: it runs again in the backward, under this forward's plan.

    Another forward may have run in between, hence the plan is held here instead of read from ``routing`` when
    recomputing.
    """
    if routing is None or torch.compiler.is_compiling():  # a compiled graph recomputes from its own values
        return torch_checkpoint(function, *args, use_reentrant=False)
    plan = routing.plan

    def under_plan(*inputs: Any) -> Any:
        with routing.using(plan):
            return function(*inputs)

    return torch_checkpoint(under_plan, *args, use_reentrant=False)
