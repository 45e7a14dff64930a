"""routed_linear is the routed convolution of tokens: same numbers, no copy of the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import RoutingPlan, routed_linear
from tests.cases import Routing, routings
from tests.tolerance import assert_as_accurate_as_torch


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, routing: Routing) -> Tensor:
    pieces = [x.new_zeros(0, *x.shape[1:-1], weight.shape[1])]
    for _, expert, start, stop in routing.segments():
        y = F.linear(x[start:stop], weight[expert], None if bias is None else bias[expert])
        pieces.append(y if residual is None else y + residual[start:stop])
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_equals_one_linear_layer_per_group(dtype: torch.dtype) -> None:
    @given(
        routing=routings(), tokens=st.none() | st.integers(1, 5), channels=st.tuples(*[st.integers(1, 17)] * 2),
        bias=st.booleans(), residual=st.booleans(), strided=st.booleans(), seed=st.integers(0, 999),
    )  # fmt: skip
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(
        routing: Routing, tokens: int | None, channels: tuple[int, int], bias: bool, residual: bool, strided: bool,
        seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        middle = () if tokens is None else (tokens,)
        shapes = {"x": (routing.batch, *middle, channels[0]), "weight": (routing.num_experts, channels[1], channels[0])}
        shapes |= {"bias": (routing.num_experts, channels[1])} if bias else {}
        shapes |= {"residual": (routing.batch, *middle, channels[1])} if residual else {}
        values = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
        results = []
        for as_dtype, function in ((dtype, "ours"), (dtype, "plain"), (torch.float64, "plain")):
            t = {name: value.to(as_dtype) for name, value in values.items()}
            if strided:
                t["x"] = t["x"].repeat_interleave(2, -1)[..., ::2]
            t = {name: value.detach().requires_grad_() for name, value in t.items()}
            arguments = t["x"], t["weight"], t.get("bias")
            if function == "ours":
                y = routed_linear(*arguments, routing.plan(), residual=t.get("residual"))
            else:
                y = plain(*arguments, t.get("residual"), routing)
            if y.requires_grad:
                y.square().sum().backward()
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
        ("x", {"x": torch.zeros(2, 3, 4, 1)}),
        ("weight", {"weight": torch.zeros(2, 6, 4, 1)}),
        ("x", {"x": None}),
        ("weight", {"weight": None}),
        ("residual", {"residual": 1.0}),
        ("residual", {"residual": torch.zeros(2, 6)}),
        ("residual", {"residual": torch.zeros(2, 3, 5)}),
    ],
)
def test_a_wrong_shape_names_the_argument(argument: str, change: dict[str, Tensor]) -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    arguments = {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(2, 6, 4), "bias": None} | change
    with pytest.raises(ValueError, match=f"^{argument}: "):
        routed_linear(**arguments, plan=plan)
