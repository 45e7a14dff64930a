"""Operators given anything: the result is that of the reference in fp64, or a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import RoutingPlan, TimestepGroups, explain, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops.pack import pack_channels
from tests.generated import examples, is_ours

Arguments = dict[str, Any]
Change = Callable[[Any, int], Any]

DTYPES = (
    torch.float64, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn,
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    0, 1, 2, 3, -1, True, 1.5, 1e-6, float("nan"), float("inf"), 2**31, 2**63, 10**30, None, "", "silu", "cpu", b"x",
    (1, 2), [2, 1], (1,), (1, 1, 1), (0, -1), (1.0, 1), ("1", "1"), {}, np.int64(1), np.float32(1), np.array([1, 2]),
    torch.tensor(1), object, "\0", "triton", "reference",
)  # fmt: skip


class OwnTensor(Tensor):
    """A subclass that changes nothing."""


def plan_of(count: int = 4) -> RoutingPlan:
    return RoutingPlan.from_groups([0, 1, 1, 0, 1][:count], 2)


def widths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def conv() -> Arguments:
    return {
        "x": torch.randn(4, 4, 5, 5), "weight": torch.randn(2, 6, 4, 3, 3), "bias": torch.randn(2, 6),
        "sample_bias": torch.randn(4, 6), "residual": torch.randn(4, 6, 5, 5), "in_widths": widths(4, 2),
        "out_widths": widths(6, 3), "plan": plan_of(), "stride": 1, "padding": 1, "backend": None,
    }  # fmt: skip


def conv_of_two() -> Arguments:
    more = {"x2": torch.randn(4, 1, 3, 3), "residual": torch.randn(4, 6, 6, 6), "upsample": 2}
    return {**conv(), "x": torch.randn(4, 3, 3, 3), **more}


def linear() -> Arguments:
    return {
        "x": torch.randn(4, 3, 4), "weight": torch.randn(2, 6, 4), "bias": torch.randn(2, 6),
        "residual": torch.randn(4, 3, 6), "in_widths": None, "out_widths": widths(2, 6), "plan": plan_of(),
        "backend": None,
    }  # fmt: skip


def norm() -> Arguments:
    return {
        "x": torch.randn(4, 4, 5, 5), "weight": torch.randn(2, 4), "bias": torch.randn(2, 4),
        "scale": torch.randn(4, 4), "shift": torch.randn(4, 4), "widths": widths(4, 2), "plan": plan_of(),
        "num_groups": 2, "eps": 1e-5, "activation": "silu", "backend": None,
    }  # fmt: skip


def norm_of_two() -> Arguments:
    return {**norm(), "x": torch.randn(4, 1, 5, 5), "x2": torch.randn(4, 3, 5, 5)}


def pack() -> Arguments:
    return {
        "source": torch.randn(2, 4, 3), "out_order": torch.tensor([[0, 1, 3], [1, 0, 2]], dtype=torch.int32),
        "in_order": torch.tensor([[2, 0], [1, 0]], dtype=torch.int32), "out_widths": widths(3, 1),
        "in_widths": widths(1, 2), "out": torch.zeros(2, 3, 2),
    }  # fmt: skip


def resized(t: Tensor, n: int) -> Tensor:
    """One size of the shape a little larger, smaller, or zero."""
    shape = list(t.shape) or [1]
    dim = n % len(shape)
    shape[dim] = (shape[dim] + 1, max(shape[dim] - 1, 0), 0, 2 * shape[dim])[n // 5 % 4]
    return torch.zeros(shape, dtype=t.dtype)


def reshaped(t: Tensor, n: int) -> Tensor:
    """More or fewer dimensions."""
    return (t[None], t[..., None], t.flatten(), t.reshape(-1)[:1].reshape(()), t.transpose(0, -1))[n % 5]


def strided(t: Tensor, n: int) -> Tensor:
    """The same values, or some of them, in another order in memory."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype)
    with_holes = wide[..., n % 3 : n % 3 + 2 * t.shape[-1] : 2].copy_(t)
    first = t[:1].expand_as(t)
    reversed_ = t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    return (with_holes, first, reversed_, torch.as_strided(t, t.shape, (0,) * t.dim()))[n // 3 % 4]


def shrunk(t: Tensor, n: int) -> Tensor:
    """A view whose storage ends around its end: at most one byte before, or much before."""
    view = strided(t.clone(), n)
    span = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    end = (view.storage_offset() + span + 1) * view.itemsize
    view.untyped_storage().resize_((end, end - 1, 0, view.nbytes, end // 2)[n % 5])
    return view


def with_values(t: Tensor, n: int) -> Tensor:
    """Numbers at the edges of what the dtype holds, in one place."""
    value: float = (-1, 0, 7, 2**31 - 1, -(2**31), 2**15)[n % 6]
    if t.is_floating_point():  # padding is 0 * NaN or nothing at all, so no filter is NaN
        value = float("nan") if t.dim() in (2, 4) else 100.0
    t = t.clone()
    if t.numel():
        t.view(-1)[n % t.numel()] = value
    return t


def nested(t: Tensor, n: int) -> Tensor:
    return torch.nested.nested_tensor([t[0], t[0]])


CHANGES: dict[str, Change] = {
    "another dtype": lambda t, n: t.to(DTYPES[n % len(DTYPES)]),
    "another size": resized,
    "another rank": reshaped,
    "other strides": strided,
    "a shrunk storage": shrunk,
    "other values": with_values,
    "the meta device": lambda t, n: t.to("meta"),
    "a sparse tensor": lambda t, n: (t.to_sparse, t.to_sparse_csr if t.dim() == 2 else t.to_sparse)[n % 2](),
    "a nested tensor": nested,
    "a lazily negated tensor": lambda t, n: (-t)._neg_view() if t.is_floating_point() else t,
    "a parameter": lambda t, n: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "a subclass": lambda t, n: t.as_subclass(OwnTensor),
    "an inference tensor": lambda t, n: in_inference_mode(t),
    "numpy": lambda t, n: t.numpy(),
    "a list": lambda t, n: t.tolist(),
    "no tensor": lambda t, n: SCALARS[n % len(SCALARS)],
}
PLAN_FIELDS = ("order", "inverse", "offsets", "groups", "tiles", "weight_index")


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def changed(value: Any, kind: str, n: int) -> Any:
    """An argument after a change; the same where the change does not apply to it."""
    if isinstance(value, RoutingPlan):
        if kind == "no tensor":
            return (SCALARS[n % len(SCALARS)], plan_of(3), plan_of(5), RoutingPlan.from_groups([0] * 4, 1))[n % 4]
        parts = {name: getattr(value, name) for name in PLAN_FIELDS}
        name = PLAN_FIELDS[n % len(PLAN_FIELDS)]
        parts[name] = changed(parts[name], kind, n // len(PLAN_FIELDS))
        try:
            return RoutingPlan(**parts, num_groups=value.num_groups)
        except ValueError as error:
            assert is_ours(error), error
            return value
    if isinstance(value, Tensor):
        try:
            return CHANGES[kind](value, n)
        except (RuntimeError, IndexError, TypeError):  # torch cannot make that
            return value
    return SCALARS[n % len(SCALARS)]


Changes = list[tuple[int, str, int]]
changes = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(sorted(CHANGES)), st.integers(0, 119)), min_size=1, max_size=2
)


def with_changes(arguments: Arguments, made: Changes) -> Arguments:
    names, freed = list(arguments), set()
    for index, kind, n in made:
        name = names[index % len(names)]
        if name not in freed:  # else this test would read what it freed
            arguments[name] = changed(arguments[name], kind, n)
        if kind == "a shrunk storage":
            freed.add(name)
    return arguments


def exact(value: Any) -> Any:
    """The same argument in fp64, dense memory and without a gradient."""
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor).clone(memory_format=torch.contiguous_format).resolve_neg()
        return plain.double() if plain.is_floating_point() else plain
    return value


def is_about_inference(error: Exception) -> bool:
    """Whether it is torch's, about what no operator may do with tensors made in inference mode."""
    return "nference tensor" in str(error)


ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


def check(operator: Callable[..., Tensor], arguments: Arguments) -> None:
    """The result and the gradients against the reference in fp64, or an error of ours."""
    try:
        y = operator(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        assert is_ours(error) or is_about_inference(error), error
        try:
            explain(operator, **arguments)
        except ValueError as explained:
            assert is_ours(explained), explained
        return
    assert explain(operator, **arguments).backend
    if y.device.type == "meta":
        return
    expected = operator(**{**{name: exact(value) for name, value in arguments.items()}, "backend": "reference"})
    assert expected.shape == y.shape
    rounding = ROUNDING[y.dtype]
    torch.testing.assert_close(
        y.detach().as_subclass(Tensor).double(), expected, rtol=rounding, atol=rounding, equal_nan=True
    )
    if y.requires_grad and not any(t.is_inference() for t in arguments.values() if isinstance(t, Tensor)):
        y.sum().backward()


@examples(300)
@given(st.sampled_from([conv, conv_of_two]), changes)
@example(conv, [(0, "a shrunk storage", 0)])
def test_convolution(make: Callable[[], Arguments], made: Changes) -> None:
    torch.manual_seed(0)
    check(routed_conv2d, with_changes(make(), made))


@examples(150)
@given(changes)
def test_linear(made: Changes) -> None:
    torch.manual_seed(0)
    check(routed_linear, with_changes(linear(), made))


@examples(250)
@given(st.sampled_from([norm, norm_of_two]), changes)
@example(norm, [(9, "no tensor", 28)])  # an array as the activation
def test_group_norm(make: Callable[[], Arguments], made: Changes) -> None:
    torch.manual_seed(0)
    check(routed_group_norm, with_changes(make(), made))


@examples(150)
@given(changes)
def test_packing(made: Changes) -> None:
    torch.manual_seed(0)
    arguments = with_changes(pack(), made)
    try:
        packed = pack_channels(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        assert is_ours(error) or is_about_inference(error), error
        return
    if packed.device.type != "meta":
        plain = {name: exact(value) for name, value in arguments.items() if name != "out"}
        torch.testing.assert_close(packed.detach().as_subclass(Tensor).double(), packed_by_hand(**plain).double())


def packed_by_hand(
    source: Tensor, out_order: Tensor | None, in_order: Tensor | None, out_widths: Any, in_widths: Any
) -> Tensor:
    experts = max(len(part) for part in (source, out_order, in_order, out_widths, in_widths) if part is not None)
    sizes = [source.shape[dim] if order is None else order.shape[1] for dim, order in ((1, out_order), (2, in_order))]
    result = source.new_zeros(experts, *sizes, *source.shape[3:])
    for e in range(experts):
        for o in range(sizes[0] if out_widths is None else min(sizes[0], int(out_widths[e]))):
            for i in range(sizes[1] if in_widths is None else min(sizes[1], int(in_widths[e]))):
                row = o if out_order is None else int(out_order[e, o])
                column = i if in_order is None else int(in_order[e, i])
                result[e, o, i] = source[e if len(source) > 1 else 0, row, column]
    return result


@examples(150)
@given(changes)
def test_plans(made: Changes) -> None:
    arguments = {"groups": torch.tensor([2, 0, 1, 0]), "num_groups": 3, "weight_index": torch.tensor([0, 1, 0])}
    with_changes(arguments, made)
    try:
        plan = RoutingPlan.from_groups(**arguments)
    except (ValueError, TypeError) as error:
        assert is_ours(error), error
        return
    if plan.order.device.type == "meta":
        return
    groups = [int(g) for g in arguments["groups"]]
    assert plan.groups.tolist() == sorted(groups)
    assert plan.order.tolist() == sorted(range(len(groups)), key=groups.__getitem__)
    assert plan.inverse[plan.order].tolist() == list(range(len(groups)))


@examples(150)
@given(changes)
def test_sorting(made: Changes) -> None:
    arguments = with_changes({"x": torch.randn(4, 3), "plan": plan_of()}, made)
    x, plan = arguments["x"], arguments["plan"]
    if not isinstance(plan, RoutingPlan):
        return
    try:
        y = plan.sort(x)
    except (ValueError, TypeError) as error:
        assert is_ours(error), error
        return
    if y.device.type != "meta":
        expected = exact(x)[[int(i) for i in plan.order]]
        torch.testing.assert_close(exact(y), expected, equal_nan=True)


@examples(100)
@given(changes)
def test_groups_of_timesteps(made: Changes) -> None:
    arguments = with_changes({"t": torch.tensor([0, 5, 9]), "num_timesteps": 10, "num_groups": 3}, made)
    try:
        groups = TimestepGroups.uniform(arguments["num_timesteps"], arguments["num_groups"])
        ids = groups.group_of(arguments["t"])
    except (ValueError, TypeError) as error:
        assert is_ours(error), error
        return
    if ids.device.type != "meta":
        for t, group in zip(arguments["t"].flatten().tolist(), ids.flatten().tolist(), strict=True):
            assert groups.boundaries[group] <= t < groups.boundaries[group + 1]
