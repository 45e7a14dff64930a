"""routed_conv2d equals one convolution per group, on every backend, and nothing dead leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from tdc_fast import RoutingPlan, explain, routed_conv2d
from tdc_fast.ops import available_backends
from tests.cases import ConvCase, Routing, conv_cases, upstream
from tests.tolerance import assert_as_accurate_as_torch

SERVED = [
    (backend, dtype)
    for backend in available_backends()
    for dtype in (torch.float32, torch.bfloat16)
    if explain(
        "routed_conv2d",
        torch.zeros(1, 1, 1, 1, dtype=dtype),
        torch.zeros(1, 1, 1, 1, 1, dtype=dtype),
        None,
        RoutingPlan.from_groups(torch.zeros(1, dtype=torch.int64), 1),
    ).reasons[backend]
    is None
]
served = pytest.mark.parametrize(("backend", "dtype"), SERVED, ids=lambda v: str(v).removeprefix("torch."))


def routed(case: ConvCase, tensors: dict[str, Tensor], **overrides: Any) -> Tensor:
    extras = {name: tensors.get(name) for name in ("sample_bias", "residual", "x2")}
    arguments = case.settings() | extras | overrides
    return routed_conv2d(tensors["x"], tensors["weight"], tensors.get("bias"), case.routing.plan(), **arguments)


def gradients(y: Tensor, tensors: dict[str, Tensor], case: ConvCase) -> dict[str, Tensor]:
    """The output, and the gradient of every input for the case's upstream gradient."""
    dy = upstream(case, y.shape, y.dtype)
    if y.requires_grad:
        grads = torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True, materialize_grads=True)
    else:  # a batch of nothing
        grads = tuple(torch.zeros_like(t) for t in tensors.values())
    return {"y": y, **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def random_case(**changes: Any) -> ConvCase:
    settings = {
        "routing": Routing((0, 2, 2, 1, 0, 2), 3, 3, None),
        "in_channels": 11,
        "out_channels": 9,
        "size": (6, 5),
        "filter": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "in_widths": (11, 4, 7),
        "out_widths": (3, 9, 5),
        "extras": ("bias", "sample_bias", "residual"),
        "layout": "channels_last",
        "seed": 3,
    }
    return ConvCase(**(settings | changes))


@given(case=conv_cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_reference_equals_one_convolution_per_group(case: ConvCase) -> None:
    tensors, copies = case.tensors(torch.float64), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors, backend="reference"), tensors, case)
    plain = gradients(case.plain(copies), copies, case)
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@served
def test_every_backend_is_as_accurate_as_torch(backend: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    @given(case=conv_cases())
    @settings(max_examples=80, deadline=None, derandomize=True)
    def check(case: ConvCase) -> None:
        tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
        ours = gradients(routed(case, tensors, backend=backend), tensors, case)
        torchs = gradients(case.plain(copies), copies, case)
        reference = gradients(routed(case, exact, backend="reference"), exact, case)
        taps, pixels = case.filter[0] * case.filter[1], case.out_size[0] * case.out_size[1]
        forward_terms = taps * max(case.in_channels, case.out_channels)
        for name in ours:
            terms = forward_terms if name in ("y", "dx") else case.routing.batch * pixels
            assert_as_accurate_as_torch(ours[name], torchs[name], reference[name], f"{name} of {case}", max(terms, 64))

    check()


@served
def test_the_result_is_channels_last(backend: str, dtype: torch.dtype) -> None:
    for layout in ("channels_last", "contiguous", "strided"):
        case = random_case(layout=layout)
        y = routed(case, case.tensors(dtype), backend=backend)
        assert y.is_contiguous(memory_format=torch.channels_last)


@served
def test_weights_may_have_any_strides(backend: str, dtype: torch.dtype) -> None:
    case = random_case()
    plain = case.tensors(dtype)
    expected = gradients(routed(case, plain, backend=backend), plain, case)
    views = case.tensors(dtype)
    for name, by in (("weight", (3, 4, 1, 0, 2)), ("bias", (1, 0)), ("sample_bias", (1, 0))):
        inverse = sorted(range(len(by)), key=by.__getitem__)
        views[name] = plain[name].detach().permute(by).contiguous().permute(inverse).requires_grad_()
    actual = gradients(routed(case, views, backend=backend), views, case)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    shared = plain["weight"].detach()[:1].expand(3, -1, -1, -1, -1)  # one expert's weights for all
    y = routed(case, plain | {"weight": shared}, backend=backend)
    assert torch.equal(y, routed(case, plain | {"weight": shared.contiguous()}, backend=backend))


@served
def test_everything_past_the_widths_is_exactly_zero(backend: str, dtype: torch.dtype, nan_filled_memory: None) -> None:
    case = random_case()
    tensors = case.tensors(dtype)
    with torch.no_grad():
        for group, expert, _, _ in case.routing.segments():  # each expert serves one group here
            tensors["bias"][expert, case.out_widths[group] :] = float("nan")
            tensors["weight"][expert, case.out_widths[group] :] = float("nan")
            tensors["weight"][expert, :, case.in_widths[group] :] = float("nan")
    y = routed(case, tensors, backend=backend)
    dy = torch.ones_like(y)
    for group, _, start, stop in case.routing.segments():
        dy[start:stop, case.out_widths[group] :] = float("nan")
    grads = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    for group, expert, start, stop in case.routing.segments():
        live_in, live_out = case.in_widths[group], case.out_widths[group]
        dead = {
            "y": y[start:stop, live_out:],
            "dx": grads["x"][start:stop, live_in:],
            "dresidual": grads["residual"][start:stop, live_out:],
            "dsample_bias": grads["sample_bias"][start:stop, live_out:],
            "dbias": grads["bias"][expert, live_out:],
            "dweight of dead outputs": grads["weight"][expert, live_out:],
            "dweight of dead inputs": grads["weight"][expert, :, live_in:],
        }
        for name, values in dead.items():
            assert torch.equal(values, torch.zeros_like(values)), name
    assert not any(grad.isnan().any() for grad in (y, *grads.values()))


@served
def test_input_width_zero_leaves_bias_and_residual(backend: str, dtype: torch.dtype) -> None:
    case = random_case(in_widths=(0, 0, 0), out_widths=None)
    t = case.tensors(dtype)
    expected = case.plain(case.tensors(torch.float64)).to(dtype)
    torch.testing.assert_close(routed(case, t, backend=backend), expected)


@served
def test_an_expert_that_nobody_uses_has_zero_gradient(
    backend: str, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    case = random_case(routing=Routing((0, 2), 3, 4, (3, 1, 0)))
    tensors = case.tensors(dtype)
    grads = gradients(routed(case, tensors, backend=backend), tensors, case)
    for name in ("dweight", "dbias"):
        for unused in (1, 2):
            assert torch.equal(grads[name][unused], torch.zeros_like(grads[name][unused])), name


@served
def test_an_expert_shared_by_groups_of_other_widths_sums_their_gradients(backend: str, dtype: torch.dtype) -> None:
    case = random_case(routing=Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)))
    tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors, backend=backend), tensors, case)
    torchs, plain = gradients(case.plain(copies), copies, case), gradients(case.plain(exact), exact, case)
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], plain[name], name, terms=128)


@served
def test_two_backward_runs_are_bitwise_equal(backend: str, dtype: torch.dtype) -> None:
    case = random_case(routing=Routing(tuple(i * 7 % 5 for i in range(24)), 5, 2, (0, 1, 1, 0, 1)), size=(9, 9),
                       in_widths=None, out_widths=None)  # fmt: skip
    tensors = case.tensors(dtype)
    first, second = (gradients(routed(case, tensors, backend=backend), tensors, case) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif("cpu" not in {b for b, _ in SERVED}, reason="the native module is not built")
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    case = random_case(size=(9, 9), in_channels=20, out_channels=20)
    tensors = case.tensors(torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(routed(case, tensors, backend="cpu"), tensors, case))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


def test_gradients_nobody_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdc_fast.ops import reference

    called: list[str] = []
    for name in ("conv2d_dgrad", "conv2d_wgrad"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, _f=original, _n=name: (called.append(_n), _f(*a))[1])
    case = random_case()
    for wanted, expected in (("x", ["conv2d_dgrad"]), ("weight", ["conv2d_wgrad"]), ("residual", [])):
        tensors = {name: t.detach().requires_grad_(name == wanted) for name, t in case.tensors(torch.float64).items()}
        called.clear()
        routed(case, tensors, backend="reference").nansum().backward()
        assert called == expected


def test_the_gradient_is_right_by_finite_differences() -> None:
    case = random_case(size=(3, 3), in_channels=4, out_channels=3, in_widths=(4, 1, 2), out_widths=(3, 0, 2))
    tensors = {name: t.detach().nan_to_num().requires_grad_() for name, t in case.tensors(torch.float64).items()}
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: routed(case, dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


def test_a_second_derivative_says_that_there_is_none() -> None:
    case = random_case(in_widths=None, out_widths=None)
    tensors = case.tensors(torch.float64)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(routed(case, tensors).sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("channels", [32, 128])
def test_long_sums_round_no_worse_than_torchs(channels):
    """At a layer's real size: a bias that comes first, or one sum over a whole batch, would double the error."""
    generator = torch.Generator().manual_seed(0)
    shapes = (64, channels, 8, 8), (1, channels, channels, 3, 3), (1, channels), (64, channels, 8, 8)
    x, weight, bias, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    plan = RoutingPlan.from_groups(torch.zeros(64, dtype=torch.int64), 1)

    def results(dtype: torch.dtype, routed: bool) -> list[Tensor]:
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, weight, bias)]
        a, w, b = leaves
        y = routed_conv2d(a, w, b, plan, padding=1) if routed else F.conv2d(a, w[0], b[0], padding=1)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    exact = results(torch.float64, routed=False)
    for ours, torchs, truth in zip(results(torch.float32, True), results(torch.float32, False), exact, strict=True):
        error, allowed = ((value.double() - truth).square().mean().sqrt() for value in (ours, torchs))
        assert error <= 1.25 * allowed
