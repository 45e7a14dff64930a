"""On a GPU a repeated call gives the bits of the backend's own launches, on any stream, thread and in a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.stand_in_gpu import dense_memory
from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops import backends, call_cache
from tdc_fast.ops.replay import Replayed

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("repeating")]
BATCH, GROUPS, CHANNELS = 8, 4, 64
Call = partial[list[Tensor]]  # its keywords are the tensors

OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "convolution": (
        routed_conv2d,
        {"x": (BATCH, CHANNELS, 16, 16), "weight": (GROUPS, CHANNELS, CHANNELS, 3, 3), "bias": (GROUPS, CHANNELS)},
        {"padding": 1},
    ),
    "linear": (
        routed_linear,
        {"x": (BATCH, CHANNELS), "weight": (GROUPS, CHANNELS, CHANNELS), "bias": (GROUPS, CHANNELS)},
        {},
    ),
    "group norm": (
        routed_group_norm,
        {"x": (BATCH, CHANNELS, 16, 16), "weight": (GROUPS, CHANNELS), "bias": (GROUPS, CHANNELS)},
        {"num_groups": 8, "activation": "silu"},
    ),
}
cases = pytest.mark.parametrize("name", OPERATORS)
on_both = pytest.mark.parametrize("backend", ["triton", "cuda"])


def call_of(name: str, backend: str, seed: int) -> Call:
    """A forward and backward of new random numbers, that returns the output and the gradients."""
    operator, shapes, settings = OPERATORS[name]
    torch.manual_seed(seed)
    tensors = {argument: dense_memory(*shape).cuda().requires_grad_() for argument, shape in shapes.items()}
    plan = RoutingPlan.from_groups(torch.randint(GROUPS, (BATCH,)).cuda(), GROUPS)

    def call(**tensors: Tensor) -> list[Tensor]:
        y = operator(**tensors, plan=plan, **settings, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))]

    return partial(call, **tensors)


def repeated_and_not(name: str, backend: str, around: Callable[[Call], list[Tensor]]) -> None:
    """Compares a repeated call, run by `around`, with one that goes the general way."""
    backends.forget()
    for seed in (0, 1):  # the general way, then recorded
        call_of(name, backend, seed)()
    runs = [call.run for call in call_cache.cached_calls()]
    assert runs and all(isinstance(run, Replayed) and not run.never_repeats for run in runs)
    call = call_of(name, backend, 2)
    torch.cuda.synchronize()
    repeated = around(call)
    torch.cuda.synchronize()
    assert len(call_cache.cached_calls()) == len(runs)
    backends.forget()
    for one, other in zip(repeated, call(), strict=True):
        assert torch.equal(one, other)


@cases
@on_both
def test_a_repeated_call_has_the_bits_of_the_backends_launches(name: str, backend: str) -> None:
    repeated_and_not(name, backend, lambda call: call())


@cases
@on_both
def test_on_another_stream(name: str, backend: str) -> None:
    def around(call: Call) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            torch.cuda._sleep(50_000_000)  # tens of milliseconds
            call.keywords["x"].mul_(2)  # which launches on the default stream would not wait for
            with torch.enable_grad():
                return call()

    repeated_and_not(name, backend, around)


@cases
@on_both
def test_in_another_thread(name: str, backend: str) -> None:
    def around(call: Call) -> list[Tensor]:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.extend(call()))
        thread.start()
        thread.join()
        return found

    repeated_and_not(name, backend, around)


@cases
@on_both
def test_in_a_cuda_graph(name: str, backend: str) -> None:
    def around(call: Call) -> list[Tensor]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            found = call()
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        return found

    repeated_and_not(name, backend, around)
