"""The operators are torch operators: schema, fakes, autograd registration, autocast."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tests.ops.test_conv2d import random_case
from tests.ops.test_group_norm import some_case

ops = torch.ops.tdc_fast


def calls(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every registered operator with arguments: (overload, args)."""
    conv, norm = random_case(stride=(2, 1)), some_case()
    plan = conv.routing.plan()
    routing = (plan.offsets, plan.weight_index)
    tiled = (plan.offsets, plan.tiles, plan.weight_index)

    def clean(case: Any) -> dict[str, Tensor]:
        return {k: v.detach().nan_to_num().contiguous(memory_format=torch.channels_last) if v.dim() == 4
                else v.detach().nan_to_num() for k, v in case.tensors(dtype).items()}  # fmt: skip

    def wanting(tensors: dict[str, Tensor]) -> list[Tensor]:
        return [t.requires_grad_() for t in tensors.values()]

    c, settings = clean(conv), conv.settings()
    widths = (settings["in_widths"], settings["out_widths"])
    geometry = (list(conv.stride), list(conv.padding), conv.upsample)
    dy = torch.randn(6, 9, *conv.out_size, dtype=dtype).to(memory_format=torch.channels_last)
    yield ops.routing_plan.default, (torch.tensor([1, 0, 2]), 4)
    yield ops.permute_samples.default, (torch.randn(6, 2, dtype=dtype, requires_grad=True), plan.order, plan.inverse)
    yield ops.routed_conv2d_dgrad.default, (dy, c["weight"], *tiled, *widths, list(conv.size), 0, *geometry, False, "")
    for mask in ([True, True, True], [False, True, False]):
        yield ops.routed_conv2d_wgrad.default, (dy, c["x"], None, c["weight"], *routing, *widths, *geometry, mask, "")
    plain = clean(conv)
    yield ops.routed_conv2d.default, (*wanting(clean(conv)), None, *tiled, *widths, *geometry, "")
    yield (
        ops.routed_conv2d.default,
        (plain["x"], plain["weight"], None, None, None, None, *tiled, None, None, *geometry, ""),
    )
    fused = random_case(x2_channels=4, upsample=2)
    c, geometry = clean(fused), (list(fused.stride), list(fused.padding), fused.upsample)
    yield ops.routed_conv2d.default, (*wanting(clean(fused)), *tiled, *widths, *geometry, "")
    dy = torch.randn(6, 9, *fused.out_size, dtype=dtype).to(memory_format=torch.channels_last)
    yield ops.routed_conv2d_dgrad.default, (dy, c["weight"], *tiled, *widths, list(fused.size), 4, *geometry, False, "")
    inputs = (c["x"], c["x2"], c["weight"])
    yield ops.routed_conv2d_wgrad.default, (dy, *inputs, *routing, *widths, *geometry, [True] * 3, "")
    for middle, mask in (((), [True, True]), ((3,), [False, True])):
        shapes = ((6, *middle, 11), (3, 9, 11), (3, 9), (6, *middle, 9))
        x, weight, bias, residual = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        yield ops.routed_linear.default, (x, weight, bias, residual, *tiled, *widths, "")
        x, weight, dy = x.detach(), weight.detach(), residual.detach()
        yield ops.routed_linear_dgrad.default, (dy, weight, *tiled, *widths, False, "")
        yield ops.routed_linear_wgrad.default, (dy, x, weight, *routing, *widths, mask, "")
    n, rest = clean(norm), (4, 1e-5, True)
    yield ops.routed_group_norm.default, (*wanting(clean(norm)), None, *routing, norm.settings()["widths"], *rest, "")
    y, *statistics = ops.routed_group_norm.default(*n.values(), None, *routing, None, *rest, "")
    saved = (*statistics, *routing, None)
    for mask in ([True] * 5 + [False], [False, True, False, False, True, False]):
        yield (
            ops.routed_group_norm_backward.default,
            (y, *n.values(), None, *saved, *rest, mask, ""),
        )
    two = clean(some_case(x2_channels=5))
    yield ops.routed_group_norm.default, (*wanting(dict(two)), *routing, None, *rest, "")
    two = {name: t.detach() for name, t in two.items()}
    for mask in ([True] * 6, [True] + [False] * 5, [False] * 5 + [True]):
        yield ops.routed_group_norm_backward.default, (y, *two.values(), *saved, *rest, mask, "")


def test_the_list_of_calls_covers_every_registered_operator() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tdc_fast::")
    }
    assert {op._schema.name.split("::")[1] for op, _ in calls(torch.float32)} == registered


# What a backend computes is looked at on each; autograd and compiling with shapes that change belong to the operator.
OF_A_BACKEND = ("test_schema", "test_faketensor")
OF_AN_OPERATOR = ("test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("dtype", "checks"),
    [(torch.float32, (*OF_A_BACKEND, *OF_AN_OPERATOR)), (torch.float64, OF_A_BACKEND)],
    ids=["cpu", "reference"],
)
def test_opcheck_passes_for_every_registered_operator(dtype: torch.dtype, checks: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in calls(dtype):
            assert set(torch.library.opcheck(op, arguments, test_utils=checks).values()) == {"SUCCESS"}, op


def test_the_fake_refuses_what_the_operator_refuses() -> None:
    with torch._subclasses.FakeTensorMode():
        plan = RoutingPlan.from_groups(torch.zeros(2, dtype=torch.int64), 1)
        with pytest.raises(ValueError, match="^weight: got"):
            routed_conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(1, 5, 4, 3, 3), None, plan)


class TestAutocast:
    """bf16 on the CPU."""

    plan = RoutingPlan.from_groups(torch.tensor([1, 0, 1]), 2)

    def test_convolutions_and_linear_layers_run_in_bf16_and_gradients_come_back_in_fp32(self) -> None:
        x, weight = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(2, 6, 4, 3, 3, requires_grad=True)
        bias, sample_bias = torch.randn(2, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = routed_conv2d(x, weight, bias, self.plan, sample_bias=sample_bias)
            z = routed_linear(torch.randn(3, 4), torch.randn(2, 6, 4), None, self.plan)
        assert y.dtype == z.dtype == torch.bfloat16
        y.float().sum().backward()
        for tensor in (x, weight, bias, sample_bias):
            assert tensor.grad is not None and tensor.grad.dtype == torch.float32
        by_hand = [t.detach().bfloat16() for t in (x, weight, bias, sample_bias)]
        assert torch.equal(y, routed_conv2d(*by_hand[:3], self.plan, sample_bias=by_hand[3]))

    def test_mixed_dtypes_are_welcome_there(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routed_conv2d(torch.randn(3, 4, 5, 5).bfloat16(), torch.randn(2, 6, 4, 3, 3), None, self.plan)

    def test_fp64_is_left_alone(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = routed_conv2d(torch.randn(3, 4, 1, 1).double(), torch.randn(2, 6, 4, 1, 1).double(), None, self.plan)
        assert y.dtype == torch.float64

    def test_the_group_norm_keeps_the_dtype_of_its_input(self) -> None:
        affine = [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
        scale = torch.randn(3, 4).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(3, 4, 2, 2, dtype=dtype)
                assert routed_group_norm(x, *affine, self.plan, num_groups=2, scale=scale).dtype == dtype


def test_a_gradient_reaches_a_plan_built_on_any_thread() -> None:
    """The backward runs on torch's own threads, where thread-local state of the forward is gone."""
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y = routed_conv2d(x, torch.randn(2, 6, 4, 3, 3), None, TestAutocast.plan)
    y.sum().backward()
    assert x.grad is not None
