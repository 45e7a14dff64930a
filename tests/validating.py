"""Routing plans that all validate, for tests of what models feed to the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tdc_fast import RoutingPlan
from tdc_fast.ops import conv2d, group_norm, linear


def validate_every_plan(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets every plan that is made from now on validate; the list receives the name of the widths of every check."""
    made, seen = RoutingPlan.from_groups.__func__, []  # type: ignore[attr-defined]

    def validating(cls: type[RoutingPlan], *args: Any, **settings: Any) -> RoutingPlan:
        plan: RoutingPlan = made(cls, *args, **{**settings, "validate": True})
        return plan

    def counting(check: Callable[..., None]) -> Callable[..., None]:
        def count(name: str, *args: Any) -> None:
            seen.append(name)
            check(name, *args)

        return count

    monkeypatch.setattr(RoutingPlan, "from_groups", classmethod(validating))
    for module in (conv2d, group_norm, linear):
        monkeypatch.setattr(module, "check_dead_inputs", counting(module.check_dead_inputs))
    return seen
