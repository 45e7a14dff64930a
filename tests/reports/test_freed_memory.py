"""A tensor whose storage was freed or shrunk is refused by every operator, by name, before native code sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdc_fast import RoutingPlan, TimestepGroups, explain, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.nn.routed import RoutedEmbedding
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
    tensors = {
        "x": torch.randn(4, 3, 4), "weight": torch.randn(2, 4, 4), "bias": torch.randn(2, 4),
        "residual": torch.randn(4, 3, 4),
    }  # fmt: skip
    return lambda plan=None, **t: routed_linear(plan=plan or globals()["plan"](), **t), tensors


def norm() -> Call:
    tensors = {
        "x": torch.randn(4, 4, 5, 5), "weight": torch.randn(2, 4), "bias": torch.randn(2, 4),
        "scale": torch.randn(4, 8)[:, 4:], "shift": torch.randn(4, 8)[:, :4], "widths": widths(),
    }  # fmt: skip
    return lambda plan=None, **t: routed_group_norm(plan=plan or globals()["plan"](), num_groups=2, **t), tensors


def conv_of_two() -> Call:
    call, tensors = conv()
    tensors |= {"x": torch.randn(4, 3, 3, 3), "x2": torch.randn(4, 1, 3, 3), "residual": torch.randn(4, 4, 6, 6)}
    return lambda **t: call(upsample=2, **t), tensors


def norm_of_two() -> Call:
    call, tensors = norm()
    return call, {**tensors, "x": torch.randn(4, 1, 5, 5), "x2": torch.randn(4, 3, 5, 5)}


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
    tensors = {"groups": torch.tensor([0, 2, 1]), "weight_index": torch.tensor([0, 1, 0])}
    return lambda groups, weight_index: RoutingPlan.from_groups(groups, 3, weight_index).order, tensors


def from_short_integers() -> Call:
    call, tensors = from_groups()
    return call, {name: tensor.to(torch.int16) for name, tensor in tensors.items()}


def group_of() -> Call:
    return TimestepGroups.uniform(10, 2).group_of, {"t": torch.tensor([0, 9, 4])}


def embedding() -> Call:
    layer = RoutedEmbedding(2, 5, 3)

    def call(index: Tensor, weight: Tensor) -> Tensor:
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer(index, plan())

    return call, {"index": torch.tensor([0, 4, 1, 2]), "weight": torch.randn(2, 5, 3)}


CALLS = [
    conv,
    conv_of_two,
    linear,
    norm,
    norm_of_two,
    pack,
    sort,
    from_groups,
    from_short_integers,
    group_of,
    embedding,
]
NAMES = [(make, name) for make in CALLS for name in make()[1]]
REFUSED = "^{}: got .*storage holds .*; expected"


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
    with pytest.raises(ValueError, match=REFUSED.format(name)):
        call(**tensors)


def with_holes(tensor: Tensor) -> Tensor:
    """The same values in every second element of a larger storage, which has one more element than it needs."""
    view = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)[..., ::2]
    return view.copy_(tensor)


@pytest.mark.parametrize(("make", "name"), NAMES, ids=lambda v: getattr(v, "__name__", v))
def test_a_view_may_end_where_its_storage_does_and_not_one_byte_later(make: Callable[[], Call], name: str) -> None:
    call, tensors = make()
    expected = call(**{key: tensor.clone() for key, tensor in tensors.items()})
    whole, view = tensors[name], with_holes(tensors[name])
    end = view.untyped_storage().nbytes() - view.itemsize
    view.untyped_storage().resize_(end)
    torch.testing.assert_close(call(**{**tensors, name: view}), expected, rtol=0, atol=0)
    for size in (end - 1, whole.nbytes):  # as many bytes as the elements have, which lie further apart
        view.untyped_storage().resize_(size)
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            call(**{**tensors, name: view})


EXPLAINED = {conv: (routed_conv2d, {"padding": 1}), linear: (routed_linear, {})}


@pytest.mark.parametrize(("make", "name"), [(make, name) for make in EXPLAINED for name in (*make()[1], "plan")])
def test_explain_reads_nothing_that_was_freed(make: Callable[[], Call], name: str) -> None:
    operator, settings = EXPLAINED[make]
    _, tensors = make()
    broken = plan()
    shrink(broken.offsets if name == "plan" else tensors[name], 0)
    with pytest.raises(ValueError, match=REFUSED.format("offsets" if name == "plan" else name)):
        explain(operator, plan=broken, **settings, **tensors)


@pytest.mark.parametrize(
    ("make", "name"), [pair for pair in NAMES if pair[0] in (conv, conv_of_two, linear, norm, norm_of_two)]
)
def test_nothing_that_was_freed_is_cast_under_autocast(make: Callable[[], Call], name: str) -> None:
    call, tensors = make()
    if make in (norm, norm_of_two):
        tensors = {key: t if key == "x" or not t.is_floating_point() else t.bfloat16() for key, t in tensors.items()}
    shrink(tensors[name], 0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=REFUSED.format(name)):
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


BACKWARD = {
    conv: ("x", "weight", "in_widths", "out_widths", "offsets", "weight_index", "dy"),
    conv_of_two: ("x", "x2", "weight", "dy"),
    norm_of_two: ("x", "x2", "weight", "dy"),
    linear: ("x", "weight", "offsets", "weight_index", "dy"),
    norm: ("x", "weight", "bias", "scale", "shift", "widths", "offsets", "weight_index", "dy"),
    sort: ("plan",),
}


@pytest.mark.parametrize(("make", "freed"), [(make, name) for make, names in BACKWARD.items() for name in names])
def test_what_the_backward_reads_is_checked(make: Callable[[], Call], freed: str) -> None:
    call, tensors = make()
    for value in tensors.values():
        value.requires_grad_(value.is_floating_point())
    own = plan()
    y = own.sort(**tensors) if make is sort else call(plan=own, **tensors)
    dy = torch.ones(y.shape)  # in an order that the convolution copies
    used = {**tensors, "dy": dy, "plan": own.inverse, "offsets": own.offsets, "weight_index": own.weight_index}
    shrink(used[freed], 0)
    with pytest.raises(ValueError, match=REFUSED.format(freed)):
        y.backward(dy)


@pytest.mark.parametrize("freed", ["offsets", "out_widths", "dy"])
def test_so_is_what_the_gradient_of_a_residual_alone_reads(freed: str) -> None:
    call, tensors = conv()
    tensors["residual"].requires_grad_()
    own = plan()
    y = call(plan=own, **tensors)
    dy = torch.ones_like(y)
    shrink({**tensors, "dy": dy, "offsets": own.offsets}[freed], 0)
    with pytest.raises(ValueError, match=REFUSED.format(freed)):
        y.backward(dy)


@pytest.mark.parametrize("make", [conv, norm])
def test_a_tangent_that_was_freed_is_refused(make: Callable[[], Call]) -> None:
    call, tensors = make()
    with forward_ad.dual_level():
        tangent = torch.ones_like(tensors["x"])
        dual = forward_ad.make_dual(tensors["x"], tangent)
        shrink(forward_ad.unpack_dual(dual).tangent, 0)
        with pytest.raises((ValueError, RuntimeError), match="storage"):
            call(**{**tensors, "x": dual})


@pytest.mark.parametrize("make", [conv, conv_of_two, linear, norm, norm_of_two])
def test_tensors_that_torch_negates_lazily_are_negated(make: Callable[[], Call]) -> None:
    def gradients(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        call, tensors = make()
        tensors = {key: change(t.detach()) if t.is_floating_point() else t for key, t in tensors.items()}
        leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
        y = call(**tensors)
        return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))]

    for found, expected in zip(gradients(lambda t: (-t)._neg_view()), gradients(torch.clone), strict=True):
        torch.testing.assert_close(found, expected)


def test_empty_tensors_need_no_memory() -> None:
    call, tensors = conv()
    tensors = {name: t[:0] if name in ("x", "sample_bias", "residual") else t for name, t in tensors.items()}
    for name in ("x", "sample_bias", "residual"):
        shrink(tensors[name], 0)
    assert call(plan=RoutingPlan.from_groups([], 2), **tensors).shape == (0, 4, 5, 5)


def test_views_of_living_memory_pass() -> None:
    big = torch.randn(9, 8, 5, 5)
    weight = torch.randn(2, 4, 4, 1, 1)
    for x in (big[5:, 4:], big[:4, ::2], big[:1, :4].expand(4, 4, 5, 5), big[4:8, :4].transpose(2, 3)):
        found = routed_conv2d(x, weight, torch.zeros(1, 4).expand(2, 4), plan())
        torch.testing.assert_close(found, routed_conv2d(x.clone(), weight, None, plan()))
