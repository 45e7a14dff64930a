"""A tensor whose storage was freed or shrunk is refused by every operator, by name, before native code sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops.pack import pack_channels

Call = tuple[Callable[..., Any], dict[str, Tensor]]


def plan() -> RoutingPlan:
    return RoutingPlan.from_groups([0, 1, 1, 0], 2)


def widths() -> Tensor:
    return torch.tensor([4, 2], dtype=torch.int32)


def conv() -> Call:
    tensors = {
        "x": torch.randn(4, 4, 5, 5), "weight": torch.randn(2, 4, 4, 3, 3), "bias": torch.randn(2, 4),
        "sample_bias": torch.randn(4, 4), "residual": torch.randn(4, 4, 5, 5), "in_widths": widths(),
        "out_widths": widths(),
    }  # fmt: skip
    return lambda plan=None, **t: routed_conv2d(plan=plan or globals()["plan"](), padding=1, **t), tensors


def linear() -> Call:
    tensors = {"x": torch.randn(4, 3, 4), "weight": torch.randn(2, 4, 4), "bias": torch.randn(2, 4)}
    return lambda plan=None, **t: routed_linear(plan=plan or globals()["plan"](), **t), tensors


def norm() -> Call:
    tensors = {
        "x": torch.randn(4, 4, 5, 5), "weight": torch.randn(2, 4), "bias": torch.randn(2, 4),
        "scale": torch.randn(4, 8)[:, 4:], "shift": torch.randn(4, 8)[:, :4], "widths": widths(),
    }  # fmt: skip
    return lambda plan=None, **t: routed_group_norm(plan=plan or globals()["plan"](), num_groups=2, **t), tensors


def pack() -> Call:
    order = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    tensors = {
        "source": torch.randn(2, 2, 2), "out_order": order, "in_order": order.clone(), "out_widths": widths() // 2,
        "in_widths": widths() // 2, "out": torch.zeros(2, 2, 2),
    }  # fmt: skip
    return pack_channels, tensors


def sort() -> Call:
    return lambda x: plan().sort(x), {"x": torch.randn(4, 3)}


def from_groups() -> Call:
    return lambda groups: RoutingPlan.from_groups(groups, 3), {"groups": torch.tensor([0, 2, 1])}


CALLS = [conv, linear, norm, pack, sort, from_groups]
NAMES = [(make, name) for make in CALLS for name in make()[1]]


def shrink(tensor: Tensor, kept: float) -> None:
    storage = tensor.detach().untyped_storage()
    storage.resize_(int(storage.nbytes() * kept))


@pytest.mark.parametrize("kept", [0.0, 0.25], ids=["freed", "shrunk"])
@pytest.mark.parametrize(("make", "name"), NAMES, ids=lambda v: getattr(v, "__name__", v))
def test_every_tensor_of_every_operator_is_checked_on_every_call(
    make: Callable[[], Call], name: str, kept: float
) -> None:
    call, tensors = make()
    call(**tensors)  # shapes are known after this
    shrink(tensors[name], kept)
    views = make is linear and name != "bias"  # torch itself refuses to view freed memory
    error, message = (RuntimeError, "storage") if views else (ValueError, f"^{name}: got .*storage holds .*; expected")
    with pytest.raises(error, match=message):
        call(**tensors)


@pytest.mark.parametrize("field", ["offsets", "weight_index"])
@pytest.mark.parametrize("make", [conv, linear, norm])
def test_a_plan_is_checked_too(make: Callable[[], Call], field: str) -> None:
    call, tensors = make()
    broken = plan()
    call(plan=broken, **tensors)
    shrink(getattr(broken, field), 0)
    with pytest.raises(ValueError, match=f"^{field}: got"):
        call(plan=broken, **tensors)


@pytest.mark.parametrize("make", [conv, norm])
def test_what_the_backward_reads_is_checked(make: Callable[[], Call]) -> None:
    for freed in ("x", "weight", "dy"):
        call, tensors = make()
        for value in tensors.values():
            value.requires_grad_(value.is_floating_point())
        y = call(**tensors)
        dy = torch.ones_like(y)
        shrink({**tensors, "dy": dy}[freed], 0)
        with pytest.raises(ValueError, match=f"^{freed}: got"):
            y.backward(dy)


def test_views_of_living_memory_pass() -> None:
    big = torch.randn(9, 8, 5, 5)
    weight = torch.randn(2, 4, 4, 1, 1)
    for x in (big[5:, 4:], big[:4, ::2], big[:1, :4].expand(4, 4, 5, 5), big[4:8, :4].transpose(2, 3)):
        found = routed_conv2d(x, weight, torch.zeros(1, 4).expand(2, 4), plan())
        torch.testing.assert_close(found, routed_conv2d(x.clone(), weight, None, plan()))
