"""A call like an earlier one skips the general way; a call that differs in anything, or is watched, does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm
from tdc_fast.ops import backends, call_cache, conv2d, group_norm
from tests.ops.test_conv2d import gradients, random_case, routed
from tests.ops.test_group_norm import gradients as norm_gradients
from tests.ops.test_group_norm import routed as routed_norm
from tests.ops.test_group_norm import some_case


class GeneralWay(Exception):
    """Raised where the arguments are checked."""


def plan_of(batch: int = 3) -> RoutingPlan:
    return RoutingPlan.from_groups(torch.arange(batch) % 2, 2)


def tensors(channels: int = 4, batch: int = 3) -> dict[str, Any]:
    x = torch.randn(batch, channels, 5, 5).to(memory_format=torch.channels_last)
    return {"x": x, "weight": torch.randn(2, 6, channels, 3, 3), "bias": torch.randn(2, 6), "plan": plan_of(batch)}


def norm_tensors() -> dict[str, Any]:
    arguments = tensors() | {"weight": torch.randn(2, 4), "bias": torch.randn(2, 4)}
    return arguments | {"num_groups": 2}


@pytest.fixture(autouse=True)
def nothing_seen(repeating: None) -> None:
    backends.forget()


@pytest.fixture
def general_way_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def raises(*_: Any, **__: Any) -> Any:
        raise GeneralWay

    def close() -> None:
        monkeypatch.setattr(conv2d, "_checked", raises)
        monkeypatch.setattr(group_norm, "_checked", raises)

    return close


def test_a_call_like_an_earlier_one_is_not_checked_again(general_way_raises: Callable[[], None]) -> None:
    routed_conv2d(**tensors(), padding=1)
    routed_group_norm(**norm_tensors(), activation="silu")
    general_way_raises()
    again = tensors()
    assert routed_conv2d(**again, padding=1).shape == (3, 6, 5, 5)
    assert routed_conv2d(**again, padding=(1, 1)).shape == (3, 6, 5, 5)
    assert routed_group_norm(**norm_tensors(), activation="silu").shape == (3, 4, 5, 5)


def test_a_call_with_one_tensor_in_two_places_is_told_from_one_with_two(
    general_way_raises: Callable[[], None],
) -> None:
    arguments = tensors(channels=6) | {"padding": 1}
    x, widths = arguments["x"], torch.tensor([4, 6], dtype=torch.int32)
    x[:2, 4:] = 0  # dead in group 0
    x.requires_grad_()

    def results(**others: Tensor) -> list[Tensor]:
        y = routed_conv2d(**arguments | others)
        return [y, *torch.autograd.grad(y.square().sum(), x)]

    def results_of_all() -> list[list[Tensor]]:
        return [
            results(residual=x, in_widths=widths, out_widths=widths),
            results(residual=x, in_widths=widths, out_widths=widths.clone()),
            results(residual=x.clone(), in_widths=widths.clone(), out_widths=widths.clone()),
        ]

    expected = results_of_all()[-1]
    general_way_raises()
    for found in results_of_all():
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another shape": lambda a: a | tensors(channels=8),
    "another batch": lambda a: a | tensors(batch=4),
    "another dtype": lambda a: a | {name: a[name].bfloat16() for name in ("x", "weight", "bias")},
    "mixed dtypes": lambda a: a | {"bias": a["bias"].double()},
    "another memory order": lambda a: a | {"x": a["x"].contiguous()},
    "a wider row": lambda a: a | {"bias": torch.randn(2, 7)[:, :6]},
    "a gradient": lambda a: a | {"weight": a["weight"].clone().requires_grad_()},
    "a parameter": lambda a: a | {"weight": nn.Parameter(a["weight"], requires_grad=False)},
    "a lazily negated tensor": lambda a: a | {"x": torch._neg_view(a["x"])},
    "no bias": lambda a: a | {"bias": None},
    "a sample bias": lambda a: a | {"sample_bias": torch.randn(3, 6)},
    "a residual in the place of the sample bias": lambda a: a | {"residual": torch.randn(3, 6, 5, 5)},
    "one tensor twice": lambda a: a | {"bias": torch.randn(3, 6), "sample_bias": torch.randn(3, 6)},
    "a plan of another batch": lambda a: a | {"plan": plan_of(4)},
    "no plan": lambda a: a | {"plan": None},
    "something like a plan": lambda a: a
    | {"plan": SimpleNamespace(**{name: getattr(a["plan"], name) for name in RoutingPlan.__slots__})},
    "more groups": lambda a: a | {"plan": RoutingPlan.from_groups(torch.arange(3), 3, [0, 1, 0])},
    "another padding": lambda a: a | {"padding": 0},
    "another backend": lambda a: a | {"backend": "reference"},
    "no tensor": lambda a: a | {"x": [1.0]},
    "a number": lambda a: a | {"x": torch.tensor(1.0)},
    "a subclass": lambda a: a | {"bias": a["bias"].as_subclass(type("Own", (Tensor,), {}))},
    "a tensor on the meta device": lambda a: a | {"bias": a["bias"].to("meta")},
    "a nested tensor": lambda a: a | {"bias": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])},
    "a sparse tensor": lambda a: a | {"bias": a["bias"].to_sparse()},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_goes_the_general_way(general_way_raises: Callable[[], None], change: str) -> None:
    arguments = tensors() | {"padding": 1}
    routed_conv2d(**arguments)
    routed_conv2d(**arguments)
    general_way_raises()
    with pytest.raises(GeneralWay):
        routed_conv2d(**CHANGES[change](arguments))


@pytest.mark.parametrize("value", [1.0, (1.0, 1.0), [[1], 1], True])
@pytest.mark.parametrize("argument", ["padding", "upsample"])
def test_what_equals_an_integer_is_refused(argument: str, value: Any) -> None:
    arguments = tensors() | {"padding": 1, "upsample": 1}
    for _ in range(3):
        routed_conv2d(**arguments)
        with pytest.raises(ValueError, match=f"^{argument}: got"):
            routed_conv2d(**arguments | {argument: value})


def test_a_backend_that_is_false_is_refused() -> None:
    arguments = tensors()
    for _ in range(2):
        routed_conv2d(**arguments)
        with pytest.raises(ValueError, match="^backend: got 0"):
            routed_conv2d(**arguments, backend=0)


@pytest.mark.parametrize("change", ["num_groups", "activation", "plan", "eps"])
def test_so_does_a_group_norm(general_way_raises: Callable[[], None], change: str) -> None:
    arguments = norm_tensors()
    routed_group_norm(**arguments)
    general_way_raises()
    other = {"num_groups": 4, "activation": "relu", "plan": plan_of(4), "eps": 1e-4}
    with pytest.raises(GeneralWay):
        routed_group_norm(**arguments | {change: other[change]})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_memory_is_checked_at_every_call(name: str) -> None:
    arguments = tensors()
    for _ in range(3):
        routed_conv2d(**arguments)
    arguments[name] = arguments[name].clone(memory_format=torch.preserve_format)
    arguments[name].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=f"^{name}: .* storage holds 8 bytes"):
        routed_conv2d(**arguments)


def test_the_environment_and_what_backends_support_are_asked_at_every_call(
    monkeypatch: pytest.MonkeyPatch, general_way_raises: Callable[[], None]
) -> None:
    arguments = tensors()
    routed_conv2d(**arguments)
    general_way_raises()
    routed_conv2d(**arguments)
    with monkeypatch.context() as patch:
        patch.setenv(backends.ENVIRONMENT, "reference")
        with pytest.raises(GeneralWay):
            routed_conv2d(**arguments)
    routed_conv2d(**arguments)
    backends.forget()
    with pytest.raises(GeneralWay):
        routed_conv2d(**arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_later_calls_compute_what_the_general_way_computes(backend: str) -> None:
    def results(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        conv, norm = random_case(stride=(2, 1), seed=seed), some_case(seed=seed)
        of_conv, of_norm = conv.tensors(torch.float32), norm.tensors(torch.float32)
        found = [*gradients(routed(conv, of_conv, backend=backend), of_conv, conv).values()]
        found += norm_gradients(routed_norm(norm, of_norm, backend=backend), of_norm).values()
        return [t.nan_to_num() for t in found]

    later = [results(seed) for seed in (0, 1, 2)][-1]
    assert len(call_cache.cached_calls()) == 5  # both forwards, dgrad, wgrad and the norm's backward, once each
    backends.forget()
    for one, other in zip(later, results(2), strict=True):
        assert torch.equal(one, other)


def test_what_watches_operators_sees_every_call() -> None:
    arguments = tensors() | {"padding": 1}
    once = 2 * 3 * 6 * 5 * 5 * 4 * 9

    class Listing(TorchFunctionMode):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    for _ in range(3):
        routed_conv2d(**arguments)
        with FlopCounterMode(display=False) as counter:
            routed_conv2d(**arguments)
        assert counter.get_total_flops() == once
        with Listing() as listing:
            routed_conv2d(**arguments)
        assert any("routed_conv2d" in name for name in listing.seen)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            routed_conv2d(**arguments)
        assert "tdc_fast::routed_conv2d" in {event.name for event in profile.events()}
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(routed_conv2d(**arguments), torch._subclasses.FakeTensor)


def test_transforms_see_every_call() -> None:
    arguments = tensors() | {"padding": 1}
    x = arguments.pop("x")

    def function(x: Tensor) -> Tensor:
        return routed_conv2d(x, **arguments)

    for _ in range(3):
        y = function(x)
        primal, tangent = torch.func.jvp(function, (x,), (x,))
        torch.testing.assert_close(primal, y)
        torch.testing.assert_close(tangent, function(x) - function(torch.zeros_like(x)))
        torch.testing.assert_close(torch.func.vmap(function)(x[None])[0], y)
        with pytest.raises(RuntimeError, match=r"torch\.func\.grad"):
            torch.func.grad(lambda x: function(x).sum())(x)
        arguments["weight"].requires_grad_()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(function(x).sum(), arguments["weight"], create_graph=True)
        arguments["weight"].requires_grad_(False)


def test_what_wraps_tensors_sees_every_call() -> None:
    class Logged(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls += "routed_conv2d" in str(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    arguments = tensors()
    arguments["x"] = arguments["x"].as_subclass(Logged)
    for call in range(3):
        routed_conv2d(**arguments)
        assert Logged.calls == call + 1
    assert call_cache.cached_calls() == []


def test_autocast_is_done_at_every_call(general_way_raises: Callable[[], None]) -> None:
    arguments = tensors() | {"padding": 1}
    weight = arguments["weight"].requires_grad_()
    for call in range(3):
        if call == 2:
            general_way_raises()
        weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = routed_conv2d(**arguments)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_under_autocast_wrong_arguments_raise_what_they_always_raised() -> None:
    arguments = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            routed_conv2d(**arguments)
            with pytest.raises(ValueError, match="^bias: got torch.sparse_coo"):
                routed_conv2d(**arguments | {"bias": arguments["bias"].to_sparse()})
            with pytest.raises(ValueError, match="^x: got 3"):
                routed_conv2d(**arguments | {"x": 3})


def test_the_graph_is_recorded_where_gradients_are_on(general_way_raises: Callable[[], None]) -> None:
    arguments = tensors()
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        routed_conv2d(**arguments)
    general_way_raises()
    with torch.no_grad():
        assert not routed_conv2d(**arguments).requires_grad
    assert routed_conv2d(**arguments).requires_grad


@pytest.mark.parametrize(
    "place, name",
    [
        (torch._C._dynamo.guards, "TensorGuards"),
        (torch._C, "_is_torch_function_mode_enabled"),
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_is_any_autocast_enabled"),
        (torch.autograd, "_profiler_enabled"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_torch_that_does_not_tell_what_watches_a_call_takes_the_general_way(
    place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("another")
    with monkeypatch.context() as patch:
        patch.delattr(place, name)
        exec(compile(Path(call_cache.__file__).read_text(), "call_cache", "exec"), vars(module))
    assert not module._unobserved() and call_cache._unobserved()
    monkeypatch.setattr(call_cache, "_is_told", False)
    arguments = tensors()
    first, second = (routed_conv2d(**arguments, padding=1) for _ in range(2))
    assert torch.equal(first, second) and not call_cache.cached_calls()


def test_the_number_of_remembered_calls_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "_LIMIT", 2)
    monkeypatch.setattr(call_cache, "_MOST_ALIKE", 2)
    for channels in (1, 2, 3, 4):
        for columns in (6, 7, 8):
            arguments = tensors(channels)
            routed_conv2d(**arguments | {"bias": torch.randn(2, columns)[:, :6]})
            kept = [calls for kept in conv2d.forward._kept.values() for calls in kept.values()]
            assert len(kept) <= 2
            assert max(map(len, kept)) <= 2


def test_integers_of_numpy_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, two, one = RoutingPlan.from_groups(torch.tensor([0, 1]), 2), np.int64(2), np.int64(1)
    x, weight = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 3, 3)
    affine = torch.randn(2, 4)

    def calls() -> list[torch.Tensor]:
        return [
            routed_conv2d(x, weight, None, plan, stride=one, padding=(one, one), upsample=two),
            routed_group_norm(x, affine, affine, plan, num_groups=two),
        ]

    first = calls()
    with pytest.raises(ValueError, match=r"^num_groups: got 2.0"):  # which equals an integer
        routed_group_norm(x, affine, affine, plan, num_groups=2.0)
    monkeypatch.setattr(call_cache.Operator, "call_first", lambda self, *args: pytest.fail("the general way"))
    assert all(map(torch.equal, first, calls()))
