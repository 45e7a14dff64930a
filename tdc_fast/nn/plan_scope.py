"""Which routing plan the layers of a model run under, also when a gradient checkpoint recomputes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tdc_fast.routing import RoutingPlan


class PlanScope:
    """Holds the plan that all routed layers of a model share.

    Attributes:
        plan: the plan of the running forward; None outside it.
    """

    def __init__(self) -> None:
        self.plan: RoutingPlan | None = None

    @contextmanager
    def using(self, plan: RoutingPlan | None) -> Iterator[None]:
        """Sets `plan` for the block and restores the earlier one after it."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before


def checkpoint(function: Callable[..., Any], routing: PlanScope | None, *args: Any) -> Any:
    """`function(*args)` without keeping activations: it runs again in the backward, under this forward's plan.

    Another forward may run in between, so the plan is kept here and not read from `routing` again.
    """
    if routing is None or torch.compiler.is_compiling():  # a compiled graph holds the plan itself
        return torch_checkpoint(function, *args, use_reentrant=False)
    plan = routing.plan

    def under_plan(*inputs: Any) -> Any:
        with routing.using(plan):
            return function(*inputs)

    return torch_checkpoint(under_plan, *args, use_reentrant=False)
