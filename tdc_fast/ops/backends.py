"""The registry of backends and the choice between them.

A backend is a module (or object) with a `name`, `supports(problem) -> None | reason` and one function per operator that
it serves, each of a problem and a named tuple of tensors (kernels/problems.py):

    conv2d(problem, t)                              group_norm(problem, t)
    conv2d_dgrad(problem, dy, t)                    group_norm_backward(problem, dy, mean, rstd, t, mask)
    conv2d_wgrad(problem, dy, t, mask)

group_norm returns y, mean, rstd and counters (NormTensors), which group_norm_backward finds in its tensors.

A call may fuse two things into reading its input: "x2", a second tensor with the last channels, and "upsample", nearest
upsampling. A backend says in `fuses` which of them it has. Where it lacks one, or does not support the problem, the
call goes through `Unfused` (unfused.py), which makes the tensor first and gives the backend a problem without it.

The `backend` argument decides first, then the environment variable TDC_FAST_BACKEND; otherwise the fastest backend that
supports the problem runs. Where the device has measured times of a similar problem, they decide which one is fastest
(measured.py); elsewhere each operator has a usual order. A backend chosen by name that cannot serve raises with its
reason.
builtin.py registers these:

    cpu        C++ for host memory: fp32, bf16
    triton     kernels of tdc_fast.kernels, on NVIDIA GPUs from sm_80 on: fp32, bf16, fp16
    cuda       CUDA C++, likewise: convolutions in bf16, fp16 and (where allowed) tf32; group norms in all three
    hopper     cuda with convolutions of its own for compute capability 9.0 (hopper.py); on request, or where it was
               measured to be the fastest
    reference  plain torch, anywhere, any float dtype; the oracle
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.ops import call_cache
from tdc_fast.ops.call_cache import ENVIRONMENT as ENVIRONMENT
from tdc_fast.ops.checks import are_in_memory, check_memory, extents, require_backend_name, signature
from tdc_fast.ops.measured import Times, times_near
from tdc_fast.ops.unfused import Unfused

_MEMO_LIMIT = 4096


class Backend(Protocol):
    """What `register` takes: it has a function for every problem that `supports` accepts.

    Optional attributes:
        fuses: which of "x2" and "upsample" its kernels do while they read their input; without it, none.
        only_launches: True if its functions only call torch's operators and launch kernels in ways that ops/replay.py
            can repeat.
        form(problem): names the kernels that serve a problem, for a backend with several kinds.
        leads(problem): whether these kernels come first in the usual order.
    """

    name: str

    def supports(self, problem: Any, /) -> str | None:
        """None where the backend serves the problem, else the reason why not."""


_backends: list[Backend] = []
# The usual order, fastest first, by the kind of problem; other backends come before these.
_ORDER: dict[type, tuple[str, ...]] = {
    ConvProblem: ("cpu", "triton", "cuda", "hopper", "reference"),
    NormProblem: ("cpu", "cuda", "triton", "hopper", "reference"),
}
_memo: dict[Any, tuple[Any, Any, list[int]]] = {}
_reads_two: dict[Any, bool] = {}
_explained: dict[str, tuple[inspect.Signature, Callable[..., Problem]]] = {}  # by the names of public operators


def available_backends() -> list[str]:
    """Names of the registered backends, fastest first for a convolution."""
    return [backend.name for backend in _backends]


def register(backend: Backend) -> None:
    """Adds a backend, tried before all registered so far.

    Raises:
        ValueError: The name is taken.
    """
    if backend.name in available_backends():
        raise invalid("backend", backend.name, "a name that is not taken yet")
    _backends.insert(0, backend)
    forget()


def forget() -> None:
    """Forgets every choice made so far, after a change in what backends support."""
    _memo.clear()
    _reads_two.clear()
    call_cache.forget()


def _servers(problem: Problem, times: Times | None) -> Iterator[tuple[Any, str | None]]:
    """What would run a problem on each backend, fastest first, with None, or the reason why it cannot serve.

    Those that make copies first (`Unfused`) come after those that do not, but before the reference.

    Args:
        problem: What is to run.
        times: Measured times, None for the usual order.
    """
    usual = _usual(problem)
    order = usual if times is None else times.order(usual)
    ordered = sorted(_backends, key=lambda backend: order.index(backend.name) if backend.name in order else -1)
    if not problem.fused:
        return ((backend, backend.supports(problem)) for backend in ordered)
    servers = [_server(backend, problem) for backend in ordered]
    return iter(sorted(servers, key=lambda found: (found[0].name == "reference", isinstance(found[0], Unfused))))


def _usual(problem: Problem) -> tuple[str, ...]:
    """The usual order of backends for a problem, where those that lead come first but for the CPU's."""
    usual = _ORDER[type(problem)]
    leaders = [backend.name for backend in _backends if hasattr(backend, "leads") and backend.leads(problem)]
    return tuple(sorted(usual, key=lambda name: name != "cpu" and name not in leaders)) if leaders else usual


def _times_of(problem: Problem) -> Times | None:
    """The measured times near a problem, of the backends that run it with the kernels that were measured."""
    times = times_near(problem)
    if times is None or not problem.fused:
        return times
    alone = problem.unfused()
    timed = [backend for backend in _backends if backend.name in times.ms and backend.supports(problem) is None]
    others = {backend.name for backend in timed if _form(backend, problem) != _form(backend, alone)}
    return replace(times, ms={name: ms for name, ms in times.ms.items() if name not in others})


def _server(backend: Backend, problem: Problem) -> tuple[Any, str | None]:
    """The backend itself where it fuses what this problem fuses, else the backend through copies."""
    if set(problem.fused) <= set(getattr(backend, "fuses", ())) and backend.supports(problem) is None:
        return backend, None
    unfused = Unfused(backend, problem)
    return unfused, backend.supports(unfused.problem)


def select(problem: Problem, requested: str) -> Any:
    """The backend that serves a problem.

    Args:
        problem: What is to run.
        requested: The name of a backend, or "" for any.

    Raises:
        ValueError: The backend requested, here or in the environment, does not exist or cannot serve; with the reason.
    """
    asked_by = "backend"
    if not requested:
        requested, asked_by = os.environ.get(ENVIRONMENT, ""), ENVIRONMENT
    for server, reason in _servers(problem, None if requested else _times_of(problem)):
        if requested and server.name != requested:
            continue
        if reason is None:
            return server
        if requested:
            call = "the backward of this call" if problem.op.endswith(("grad", "backward")) else "this call"
            raise invalid(asked_by, requested, f"one that supports {call}: {reason}")
    if requested:
        raise invalid(asked_by, requested, f"one of {available_backends()}")
    raise RuntimeError(f"no backend supports {problem}")  # unreachable: the reference supports everything


def only_launches(server: Any) -> bool:
    """Whether the functions of a backend that `select` returned only launch kernels and call torch's operators."""
    return getattr(server, "only_launches", False)


def reads_two_inputs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the backend of a group norm like a UNet's reads x and x2 directly.

    A model that needs the joined tensor more than once makes it itself where they are not, instead of once per call.
    """
    key = (device, dtype, os.environ.get(ENVIRONMENT))
    found = _reads_two.get(key)
    if found is None:
        problem = NormProblem("routed_group_norm", device, dtype, 1, 8, 8, 64, 32, 1e-5, True, 1, 1, x2_channels=32)
        found = _reads_two[key] = not isinstance(select(problem, ""), Unfused)
    return found


# As torch.compiler.assume_constant_result does it, which imports the compiler (a second, and triton) to say so.
reads_two_inputs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def remembered(
    key: Any, t: ConvTensors | NormTensors, describe: Callable[[], Problem], requested: str, **gradients: Tensor
) -> tuple[Any, Any]:
    """The problem and the backend of a call, remembered: checking and choosing take longer than a small layer.

    Args:
        key: The operator and its settings; with the tensors and the environment, all that the result depends on.
        t: The tensors of the call; that they are in memory is checked every time.
        describe: Checks the arguments and returns the problem.
        requested: The name of a backend, or "" for any.
        **gradients: The tensors that come first in the schema of a backward.

    Raises:
        ValueError: What `describe` and `select` raise, or a tensor whose storage was freed or shrunk.
    """
    tensors = (*gradients.values(), *t) if gradients else t
    key = (key, signature(tensors), requested or os.environ.get(ENVIRONMENT))
    found = _memo.get(key)
    if found is None:
        problem = describe()
        found = problem, select(problem, requested), extents(tensors)
        if len(_memo) >= _MEMO_LIMIT:
            _memo.clear()
        _memo[key] = found
    problem, backend, spans = found
    if not are_in_memory(tensors, spans):
        check_memory(**gradients, **t._asdict())
    return problem, backend


def explains(operator: Callable[..., Tensor], problem_of: Callable[..., Problem]) -> None:
    """Makes a public operator known to `explain`.

    Args:
        operator: The function that users call; it has an argument `backend`.
        problem_of: Takes all its other arguments by name, checks them and returns the problem of the call.
    """
    _explained[operator.__name__] = inspect.signature(operator), problem_of


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call.

    Attributes:
        operator: Name of the operator.
        backend: Name of the backend; None when one was requested by name and cannot serve.
        because: How it was chosen.
        reasons: Every backend, fastest first, with None where it can serve, else the reason why not.
        copies: For each backend that serves the call through copies, which tensors it makes first.
        forms: For each backend with several kinds of kernels that serves the call, which ones would run.
    """

    operator: str
    backend: str | None
    because: str
    reasons: dict[str, str | None]
    copies: dict[str, str] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend or 'raises'} ({self.because})"]
        for name, reason in self.reasons.items():
            how = f", after {self.copies[name]}" if name in self.copies else ""
            how += f", {self.forms[name]}" if name in self.forms else ""
            lines.append(f"  {name}: {reason or 'supported' + how}")
        return "\n".join(lines)


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend the call `operator(*args, **kwargs)` would run, why, and why the others would not.

    Computes nothing, compiles no kernel and does not wait for the GPU. Fake tensors work too, so a machine without a
    GPU can say what a call on one needs:

        with torch._subclasses.FakeTensorMode():
            x = torch.empty(8, 64, 32, 32, dtype=torch.bfloat16, device="cuda")
            weight = torch.empty(4, 64, 64, 3, 3, dtype=torch.bfloat16, device="cuda")
            plan = RoutingPlan.from_groups(torch.zeros(8, dtype=torch.int64, device="cuda"), 4)
            print(explain(routed_conv2d, x, weight, None, plan, padding=1))

    Args:
        operator: routed_conv2d, routed_linear or routed_group_norm, or its name.
        *args: Arguments of the call.
        **kwargs: Keyword arguments of the call.

    Raises:
        ValueError: The one that the call itself would raise for wrong arguments.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in _explained:
        raise invalid("operator", name, f"one of {sorted(_explained)}")
    parameters, problem_of = _explained[name]
    call = parameters.bind(*args, **kwargs)
    call.apply_defaults()
    requested = call.arguments.pop("backend")
    require_backend_name(requested)
    return explain_problem(name, problem_of(**call.arguments), requested)


def explain_problem(operator: str, problem: Problem, requested: str | None = None) -> Explanation:
    """Says which backend would run a problem, which may be that of a gradient, and why; see `explain`.

    Args:
        operator: What the explanation calls it.
        problem: What is to run.
        requested: The name of a backend; None for any.
    """
    times = _times_of(problem)
    servers = {server.name: (server, reason) for server, reason in _servers(problem, times)}
    reasons = {name: reason for name, (_, reason) in servers.items()}
    copies = {name: server.copies for name, (server, reason) in servers.items()
              if reason is None and isinstance(server, Unfused)}  # fmt: skip
    forms = {name: _form(server, problem) for name, (server, reason) in servers.items() if reason is None}
    forms = {name: form for name, form in forms.items() if form}
    environment = os.environ.get(ENVIRONMENT, "")
    asked, origin = (requested, "backend") if requested else (environment, ENVIRONMENT)
    if asked:
        chosen = asked if asked in reasons and reasons[asked] is None else None
        return Explanation(operator, chosen, f"{origin}={asked!r}", reasons, copies, forms)
    chosen = next(backend for backend, reason in reasons.items() if reason is None)
    because = "the fastest that supports the call, "
    # A backend that copies first comes after those that do not, whatever its kernel takes: times say nothing about it.
    ranked = [name for name, reason in reasons.items() if reason is None and (name in copies) == (chosen in copies)]
    ms = {} if times is None else {name: times.ms[name] for name in ranked if name in times.ms}
    because += str(replace(times, ms=ms)) if times and chosen in ms and len(ms) > 1 else "in the usual order"
    return Explanation(operator, chosen, because, reasons, copies, forms)


def _form(server: Any, problem: Problem) -> str:
    """Which kernels of a backend serve a problem, in words; "" where it has one kind."""
    backend, left = (server.backend, server.problem) if isinstance(server, Unfused) else (server, problem)
    form = getattr(backend, "form", None)
    return form(left) if form else ""
