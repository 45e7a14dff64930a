"""Backends and the choice between them.

A backend is a module (or object) with a `name`, `supports(problem) -> None | reason` and one function per operator it
serves, as `reference` has them: conv2d, conv2d_dgrad, conv2d_wgrad, group_norm, group_norm_backward. The order of
choice: the `backend` argument, then the environment variable TDC_FAST_BACKEND, then the fastest one that supports the
problem, where what is fastest depends on the operator. A backend asked for by name that cannot serve raises with its
reason.

    cpu        C++ for host memory: fp32, bf16
    triton     kernels of tdc_fast.kernels, on NVIDIA GPUs from sm_80 on: fp32, bf16, fp16
    cuda       CUDA C++, likewise: convolutions in bf16, fp16 and (where allowed) tf32; group norms in all three
    reference  plain torch, anywhere, any float dtype; the oracle
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import ConvProblem, NormProblem, Problem
from tdc_fast.ops.checks import require_backend_name

ENVIRONMENT = "TDC_FAST_BACKEND"
_MEMO_LIMIT = 4096


class Backend(Protocol):
    """What `register` takes. Operators it lacks are refused by `supports`."""

    name: str

    def supports(self, problem: Any, /) -> str | None: ...


_backends: list[Backend] = []
# Fastest first, by the kind of problem; what was registered later comes before these.
_ORDER: dict[type, tuple[str, ...]] = {
    ConvProblem: ("cpu", "triton", "cuda", "reference"),
    NormProblem: ("cpu", "cuda", "triton", "reference"),
}
_memo: dict[Any, tuple[Any, Any]] = {}
_describers: dict[str, Callable[..., Problem]] = {}


def available_backends() -> list[str]:
    """Names of the registered backends, fastest first for a convolution."""
    return [backend.name for backend in _backends]


def register(backend: Backend) -> None:
    """Adds a backend ahead of those there are."""
    if backend.name in available_backends():
        raise invalid("backend", backend.name, "a name that is not taken yet")
    _backends.insert(0, backend)
    forget()


def forget() -> None:
    """Drops every choice made so far: what backends support has changed."""
    _memo.clear()


def _ordered(problem: Problem) -> list[Backend]:
    """The backends, fastest for this kind of problem first."""
    order = _ORDER[type(problem)]
    return sorted(_backends, key=lambda backend: order.index(backend.name) if backend.name in order else -1)


def select(problem: Problem, requested: str) -> Any:
    """The backend that serves `problem`; `requested` is a name or "" for any. Raises ValueError with the reason."""
    asked_by = "backend"
    if not requested:
        requested, asked_by = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
    for backend in _ordered(problem):
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
    key = (key, requested or os.environ.get(ENVIRONMENT))
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

    operator: routed_conv2d, routed_linear or routed_group_norm, or its name. Nothing is computed, no kernel is
    compiled, and the GPU is not waited for.
    Raises the ValueError that the call itself would raise for wrong arguments.

    Fake tensors will do, so what a call on a GPU would need can be asked on a machine that has none:

        with torch._subclasses.FakeTensorMode():
            x = torch.empty(8, 64, 32, 32, dtype=torch.bfloat16, device="cuda")
            weight = torch.empty(4, 64, 64, 3, 3, dtype=torch.bfloat16, device="cuda")
            plan = RoutingPlan.from_groups(torch.zeros(8, dtype=torch.int64, device="cuda"), 4)
            print(explain(routed_conv2d, x, weight, None, plan, padding=1))
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _describers:
        raise invalid("operator", name, f"one of {sorted(_describers)}")
    requested = kwargs.pop("backend", None)
    require_backend_name(requested)
    problem = _describers[name](*args, **kwargs)
    reasons = {backend.name: backend.supports(problem) for backend in _ordered(problem)}
    environment = os.environ.get(ENVIRONMENT, "")
    asked, origin = (requested, "backend") if requested else (environment, ENVIRONMENT)
    if asked:
        chosen = asked if asked in reasons and reasons[asked] is None else None
        return Explanation(name, chosen, f"{origin}={asked!r}", reasons)
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    return Explanation(name, chosen, "the fastest that supports the call", reasons)
