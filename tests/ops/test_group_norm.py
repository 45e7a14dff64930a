"""routed_group_norm equals one group norm, scale-shift and SiLU per group, and nothing dead leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tdc_fast import RoutingPlan, explain, routed_group_norm
from tdc_fast.ops import available_backends
from tests.cases import NormCase, Routing, norm_cases
from tests.tolerance import assert_as_accurate_as_torch

SERVED = [
    (backend, dtype)
    for backend in available_backends()
    for dtype in (torch.float32, torch.bfloat16)
    if explain(
        "routed_group_norm",
        torch.zeros(1, 1, 1, 1, dtype=dtype),
        *torch.zeros(2, 1, 1, dtype=dtype),
        RoutingPlan.from_groups(torch.zeros(1, dtype=torch.int64), 1),
        num_groups=1,
    ).reasons[backend]
    is None
]
served = pytest.mark.parametrize(("backend", "dtype"), SERVED, ids=lambda v: str(v).removeprefix("torch."))


def routed(case: NormCase, tensors: dict[str, Tensor], **overrides: Any) -> Tensor:
    extras = {name: tensors.get(name) for name in ("scale", "shift", "x2")}
    arguments = case.settings() | extras | overrides
    return routed_group_norm(tensors["x"], tensors["weight"], tensors["bias"], case.routing.plan(), **arguments)


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every input for some fixed upstream gradient."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)
    if y.requires_grad:
        grads = torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True, materialize_grads=True)
    else:  # a batch of nothing
        grads = tuple(torch.zeros_like(t) for t in tensors.values())
    return {"y": y, **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def some_case(**changes: Any) -> NormCase:
    settings = {
        "routing": Routing((0, 2, 2, 1, 0, 2), 3, 3, None),
        "channels": 12,
        "num_groups": 4,
        "size": (6, 5),
        "widths": (12, 3, 6),
        "extras": ("scale", "shift"),
        "activation": "silu",
        "layout": "channels_last",
        "seed": 3,
    }
    return NormCase(**(settings | changes))


@given(case=norm_cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_reference_equals_one_group_norm_per_group(case: NormCase) -> None:
    tensors, copies = case.tensors(torch.float64), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors, backend="reference"), tensors)
    plain = gradients(case.plain(copies), copies)
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@served
def test_every_backend_is_as_accurate_as_torch(backend: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    @given(case=norm_cases())
    @settings(max_examples=80, deadline=None, derandomize=True)
    def check(case: NormCase) -> None:
        tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
        ours = gradients(routed(case, tensors, backend=backend), tensors)
        torchs = gradients(case.plain(copies), copies)
        reference = gradients(routed(case, exact, backend="reference"), exact)
        # Terms are products of dy, 1 + scale and the slope of SiLU, about 2 in size: as noisy as four of size 1.
        terms = max(64, 4 * case.routing.batch * case.size[0] * case.size[1])
        for name in ours:
            assert_as_accurate_as_torch(ours[name], torchs[name], reference[name], f"{name} of {case}", terms)

    check()


@served
def test_everything_past_the_widths_is_exactly_zero(backend: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    case = some_case()
    tensors = case.tensors(dtype)
    with torch.no_grad():
        for group, expert, _, _ in case.routing.segments():  # each expert serves one group here
            for name in ("weight", "bias"):
                tensors[name][expert, case.widths[group] :] = float("nan")
    y = routed(case, tensors, backend=backend)
    dy = torch.ones_like(y)
    for group, _, start, stop in case.routing.segments():
        dy[start:stop, case.widths[group] :] = float("nan")
    grads = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    for group, expert, start, stop in case.routing.segments():
        live = case.widths[group]
        dead = [y[start:stop, live:], *(grads[name][start:stop, live:] for name in ("x", "scale", "shift"))]
        dead += [grads[name][expert, live:] for name in ("weight", "bias")]
        assert all(torch.equal(values, torch.zeros_like(values)) for values in dead)
    assert not any(grad.isnan().any() for grad in (y, *grads.values()))


@served
def test_an_expert_shared_by_groups_of_other_widths_sums_their_gradients(backend: str, dtype: torch.dtype) -> None:
    case = some_case(routing=Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)))
    tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors, backend=backend), tensors)
    torchs, plain = gradients(case.plain(copies), copies), gradients(case.plain(exact), exact)
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], plain[name], name)


@served
def test_two_backward_runs_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    case = some_case(routing=Routing(tuple(i * 7 % 5 for i in range(24)), 5, 2, (0, 1, 1, 0, 1)), widths=None)
    tensors = case.tensors(dtype)
    first, second = (gradients(routed(case, tensors, backend=backend), tensors) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif("cpu" not in {b for b, _ in SERVED}, reason="the native module is not built")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    case = some_case(size=(9, 9))
    tensors = case.tensors(torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(routed(case, tensors, backend="cpu"), tensors))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


@served
def test_statistics_survive_a_large_mean(backend: str, dtype: torch.dtype) -> None:
    """A one-pass variance in fp32 loses everything here."""
    if dtype != torch.float32:
        pytest.skip("bf16 cannot hold such inputs")
    case = some_case(widths=None)
    tensors, copies, exact = (case.tensors(d) for d in (dtype, dtype, torch.float64))
    for t in (tensors, copies, exact):
        t["x"] = (t["x"].detach() + 1000).requires_grad_()
    ours = routed(case, tensors, backend=backend)
    reference = routed(case, exact, backend="reference")
    assert_as_accurate_as_torch(ours, case.plain(copies), reference)


def test_the_gradient_is_right_by_finite_differences() -> None:
    case = some_case(size=(2, 2))
    tensors = {name: t.detach().nan_to_num().requires_grad_() for name, t in case.tensors(torch.float64).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: routed(case, dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


def test_a_second_derivative_says_that_there_is_none() -> None:
    case = some_case()
    tensors = case.tensors(torch.float64)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(routed(case, tensors).sum(), tensors["x"], create_graph=True)
