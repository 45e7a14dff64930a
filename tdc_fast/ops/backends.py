"""Backends and the choice between them.

A backend is a module (or object) with a `name`, `supports(problem) -> None | reason` and one function per operator it
serves, as `reference` has them: conv2d, conv2d_dgrad, conv2d_wgrad, group_norm, group_norm_backward. The order of
choice: the `backend` argument, then the environment variable TDC_FAST_BACKEND, then the first registered one that
supports the problem. A backend asked for by name that cannot serve raises with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tdc_fast.errors import invalid
from tdc_fast.ops import cpu, reference
from tdc_fast.ops.checks import ConvProblem, NormProblem, require_backend_name

ENVIRONMENT = "TDC_FAST_BACKEND"
_MEMO_LIMIT = 4096
Problem = ConvProblem | NormProblem


class Backend(Protocol):
    """What `register` takes. Operators it lacks are refused by `supports`."""

    name: str

    def supports(self, problem: Any, /) -> str | None: ...


_backends: list[Backend] = [cpu, reference]  # fastest first
_memo: dict[Any, tuple[Any, Any]] = {}
_describers: dict[str, Callable[..., Problem]] = {}


def available_backends() -> list[str]:
    """Names of the registered backends, fastest first."""
    return [backend.name for backend in _backends]


def register(backend: Backend) -> None:
    """Adds a backend ahead of those there are."""
    if backend.name in available_backends():
        raise invalid("backend", backend.name, "a name that is not taken yet")
    _backends.insert(0, backend)
    _memo.clear()


def select(problem: Problem, requested: str) -> Any:
    """The backend that serves `problem`; `requested` is a name or "" for any. Raises ValueError with the reason."""
    asked_by = "backend"
    if not requested:
        requested, asked_by = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
    for backend in _backends:
        if requested and backend.name != requested:
            continue
        reason = backend.supports(problem)
        if reason is None:
            return backend
        if requested:
            raise invalid(asked_by, requested, f"one that supports this call of {problem.op}: {reason}")
    if requested:
        raise invalid(asked_by, requested, f"one of {available_backends()}")
    raise RuntimeError(f"no backend supports {problem}")  # unreachable: the reference supports everything


def remembered(key: Any, describe: Callable[[], Problem], requested: str) -> tuple[Any, Any]:
    """(problem, backend) for a call whose shapes, dtypes and settings are `key`.

    Checking and choosing take longer than a small layer does, and depend on nothing but the key and the environment.
    """
    key = (key, requested, os.environ.get(ENVIRONMENT))
    found = _memo.get(key)
    if found is None:
        problem = describe()
        found = problem, select(problem, requested)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = found
    return found


def describes(operator: str) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Registers the function that turns the arguments of a public operator into its problem, for `explain`."""

    def register_describer(describe: Callable[..., Problem]) -> Callable[..., Problem]:
        _describers[operator] = describe
        return describe

    return register_describer


@dataclass(frozen=True)
class Explanation:
    """What would run. `reasons` maps every backend, fastest first, to None (it can) or why it cannot.

    `backend` is None when a backend was asked for by name and cannot serve. `because` says how it was chosen.
    """

    operator: str
    backend: str | None
    because: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend or 'raises'} ({self.because})"]
        lines += [f"  {name}: {reason or 'supported'}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend the call `operator(*args, **kwargs)` would run, why, and why each other one would not.

    operator: routed_conv2d, routed_linear or routed_group_norm, or its name. Nothing is computed.
    Raises the ValueError that the call itself would raise for wrong arguments.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _describers:
        raise invalid("operator", name, f"one of {sorted(_describers)}")
    requested = kwargs.pop("backend", None)
    require_backend_name(requested)
    problem = _describers[name](*args, **kwargs)
    reasons = {backend.name: backend.supports(problem) for backend in _backends}
    environment = os.environ.get(ENVIRONMENT, "")
    asked, origin = (requested, "backend") if requested else (environment, ENVIRONMENT)
    if asked:
        chosen = asked if asked in reasons and reasons[asked] is None else None
        return Explanation(name, chosen, f"{origin}={asked!r}", reasons)
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    return Explanation(name, chosen, "the fastest that supports the call", reasons)
