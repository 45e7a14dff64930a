"""routed_linear is the routed convolution of tokens: same numbers, no copy of the input."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import RoutingPlan, routed_linear
from tdc_fast.ops import linear_operators
from tdc_fast.ops.dead_channels import note_widths
from tests.cases import Routing, routings
from tests.tolerance import assert_as_accurate_as_torch

Widths = list[tuple[int, int]] | None  # live inputs and outputs of each group


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, routing: Routing, widths: Widths
) -> Tensor:
    pieces = [x.new_zeros(0, *x.shape[1:-1], weight.shape[1])]
    for group, expert, start, stop in routing.segments():
        live_in, live_out = widths[group] if widths else (weight.shape[2], weight.shape[1])
        own = weight[expert, :live_out, :live_in]
        y = F.linear(x[start:stop, ..., :live_in], own, None if bias is None else bias[expert, :live_out])
        y = y if residual is None else y + residual[start:stop, ..., :live_out]
        pieces.append(F.pad(y, (0, weight.shape[1] - live_out)))
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_equals_one_linear_layer_per_group(dtype: torch.dtype) -> None:
    @given(
        routing=routings(), tokens=st.none() | st.integers(0, 5), channels=st.tuples(*[st.integers(1, 17)] * 2),
        bias=st.booleans(), residual=st.booleans(), strided=st.booleans(), pruned=st.booleans(),
        seed=st.integers(0, 999),
    )  # fmt: skip
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(
        routing: Routing, tokens: int | None, channels: tuple[int, int], bias: bool, residual: bool, strided: bool,
        pruned: bool, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        draw = Random(seed)
        widths = [tuple(draw.randint(0, c) for c in channels) for _ in range(routing.num_groups)] if pruned else None
        live = zip(("in_widths", "out_widths"), zip(*widths, strict=True), strict=True) if widths else ()
        of_groups = {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in live}
        middle = () if tokens is None else (tokens,)
        shapes = {"x": (routing.batch, *middle, channels[0]), "weight": (routing.num_experts, channels[1], channels[0])}
        shapes |= {"bias": (routing.num_experts, channels[1])} if bias else {}
        shapes |= {"residual": (routing.batch, *middle, channels[1])} if residual else {}
        values = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
        for group, _, start, stop in routing.segments() if widths else ():
            values["x"][start:stop, ..., widths[group][0] :] = 0
        results = []
        for as_dtype, function in ((dtype, "ours"), (dtype, "plain"), (torch.float64, "plain")):
            t = {name: value.to(as_dtype) for name, value in values.items()}
            if strided:
                t["x"] = t["x"].repeat_interleave(2, -1)[..., ::2]
            t = {name: value.detach().requires_grad_() for name, value in t.items()}
            arguments = t["x"], t["weight"], t.get("bias")
            if function == "ours":
                y = routed_linear(*arguments, routing.plan(), residual=t.get("residual"), **of_groups)
            else:
                y = plain(*arguments, t.get("residual"), routing, widths)
            if y.requires_grad:
                y.add(1).square().sum().backward()  # a gradient in dead channels, too
            results.append([y, *(v.grad if v.grad is not None else torch.zeros_like(v) for v in t.values())])
        for ours, torchs, exact in zip(*results, strict=True):
            assert_as_accurate_as_torch(ours, torchs, exact, str(tuple(ours.shape)))

    check()


def test_the_result_is_contiguous() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([1, 0]), 2)
    assert routed_linear(torch.randn(2, 5, 3), torch.randn(2, 4, 3), None, plan).is_contiguous()
    assert routed_linear(torch.randn(2, 3), torch.randn(2, 4, 3), None, plan).is_contiguous()


def test_widths_apply_to_tokens_as_to_pixels() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(2, 6, 4), torch.randn(2, 6)
    widths = {
        "in_widths": torch.tensor([2, 4], dtype=torch.int32),
        "out_widths": torch.tensor([5, 0], dtype=torch.int32),
    }
    y = routed_linear(x, weight, bias, plan, **widths)
    torch.testing.assert_close(y[0, :, :5], x[0, :, :2] @ weight[0, :5, :2].T + bias[0, :5])
    assert not y[0, :, 5:].any() and not y[1].any()


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", torch.zeros(2, 3, 4, 1)),
        ("x", torch.zeros(2, 3, 0)),
        ("x", None),
        ("weight", torch.zeros(2, 6, 4, 1)),
        ("weight", torch.zeros(2, 6, 5)),
        ("weight", torch.zeros(2, 0, 4)),
        ("weight", torch.zeros(0, 6, 4)),
        ("weight", None),
        ("bias", torch.zeros(6)),
        ("residual", 1.0),
        ("residual", torch.zeros(2, 6)),
        ("residual", torch.zeros(2, 3, 5)),
        ("residual", torch.zeros(2, 1, 6)),
        ("residual", torch.zeros(2, 0, 6)),
    ],
)
def test_a_wrong_shape_is_named_as_it_was_given(argument: str, change: Any) -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(2, 6, 4), "bias": None} | {argument: change}
    value = tuple(change.shape) if isinstance(change, Tensor) else change
    with pytest.raises(ValueError, match=re.escape(f"{argument}: got {value}; ")):
        routed_linear(**arguments, plan=plan)


def test_without_tokens_the_result_has_none_and_the_weights_do_not_move() -> None:
    plan, weight = RoutingPlan.from_groups(torch.tensor([0, 1]), 2), torch.randn(2, 6, 4, requires_grad=True)
    x, bias = torch.randn(2, 0, 4, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    for _ in range(2):  # the general way, then repeated
        y = routed_linear(x, weight, bias, plan, residual=torch.zeros(2, 0, 6))
        assert y.shape == (2, 0, 6) and y.is_contiguous()
        dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert dx.shape == x.shape and not dweight.any() and not dbias.any()
    with pytest.raises(ValueError, match=re.escape("residual: got (2, 1, 6); expected shape (2, 0, 6)")):
        routed_linear(x, weight, bias, plan, residual=torch.zeros(2, 1, 6))


def test_an_error_about_backends_names_no_other_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, x, weight = RoutingPlan.from_groups(torch.tensor([0, 1]), 2), torch.zeros(2, 4), torch.zeros(2, 6, 4)
    expected = "expected one that supports this call: its tensors live on a CUDA device, not on cpu$"
    with pytest.raises(ValueError, match=f"^backend: got 'triton'; {expected}"):
        routed_linear(x, weight, None, plan, backend="triton")
    y = routed_linear(x.requires_grad_(), weight, None, plan)
    monkeypatch.setenv("TDC_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match="^TDC_FAST_BACKEND: got 'triton'; expected one that supports the backward"):
        y.sum().backward()


def layer(*middle: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """x, weight, bias and residual, and the layer of them, where three groups have widths."""
    torch.manual_seed(0)
    shapes = ((4, *middle, 5), (3, 6, 5), (3, 6), (4, *middle, 6))
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    plan = RoutingPlan.from_groups(torch.tensor([0, 0, 1, 2]), 3)
    live = {name: torch.tensor([5, 2, 0], dtype=torch.int32) for name in ("in_widths", "out_widths")}
    alive = (torch.arange(5) < live["in_widths"][plan.groups][:, None]).view(4, *[1] * len(middle), 5)
    return tensors, lambda x, w, b, r: routed_linear(x * alive, w, b, plan, residual=r, **live)


@pytest.mark.parametrize("middle", [(), (3,), (0,)])
def test_gradcheck(middle: tuple[int, ...]) -> None:
    tensors, function = layer(*middle, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("middle", [(), (3,), (0,)])
def test_compiled_as_one_graph_it_gives_the_same(middle: tuple[int, ...]) -> None:
    tensors, function = layer(*middle)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(y := f(*tensors), *torch.autograd.grad(y.sin().sum(), tensors)) for f in (function, compiled)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("x", [torch.randn(2, 4), torch.randn(2, 3, 4)])
def test_autograd_records_one_node_and_no_view(x: Tensor) -> None:
    weight, plan = torch.randn(2, 6, 4, requires_grad=True), RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    for _ in range(2):  # the general way, then repeated
        y = routed_linear(x.requires_grad_(), weight, None, plan)
        assert [type(node).__name__ for node, _ in y.grad_fn.next_functions if node] == ["AccumulateGrad"] * 2
        assert y._base is None
        y.mul_(2)  # as torch's own results may be


@pytest.mark.parametrize("noted", [False, True])
def test_a_gradient_that_a_layer_wrote_is_known_to_be_zero_past_its_widths(
    noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    call = linear_operators.dgrad.call

    def listening(*args: Any) -> Any:
        told.append(args[-2])
        return call(*args)

    monkeypatch.setattr(linear_operators.dgrad, "call", listening)
    plan, weight = RoutingPlan.from_groups(torch.tensor([0, 1]), 2), torch.randn(2, 4, 4)
    widths = [torch.tensor([4, 2], dtype=torch.int32) for _ in range(2)]
    for live in widths if noted else ():
        note_widths(live, (4, 2))
    h = routed_linear(torch.randn(2, 4, requires_grad=True), weight, None, plan, out_widths=widths[0])
    routed_linear(h, weight, None, plan, in_widths=widths[1]).sum().backward()
    assert told == [False, noted]
