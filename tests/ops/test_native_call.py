"""A call in host memory that is like earlier ones goes straight to the native kernel, with its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops import backends, call_cache, cpu, native, native_call
from tdc_fast.ops.replay import Replayed

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=native.why_missing or "the native module is there"),
    pytest.mark.usefixtures("repeating"),
]

GROUPS = 3
PLAN = RoutingPlan.from_groups(torch.tensor([0, 0, 1, 2, 2]), GROUPS)
FUNCTIONS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "group_norm", "group_norm_backward")


def images(channels: int, size: int = 4) -> Tensor:
    return torch.randn(5, channels, size, size).contiguous(memory_format=torch.channels_last)


def widths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def conv(**more: Any) -> dict[str, Any]:
    return {"x": images(8), "weight": torch.randn(GROUPS, 8, 8, 3, 3), "bias": None, "plan": PLAN, "padding": 1} | more


def norm(**more: Any) -> dict[str, Any]:
    weights = {name: torch.randn(GROUPS, 8) for name in ("weight", "bias")}
    return {"x": images(8), "plan": PLAN, "num_groups": 4} | weights | more


def one_width_twice() -> dict[str, Any]:
    both = widths(4, 8, 0)
    return conv(in_widths=both, out_widths=both, bias=torch.randn(GROUPS, 8))


Case = tuple[Callable[..., Tensor], Callable[[], dict[str, Any]]]
CASES: dict[str, Case] = {
    "convolution": (routed_conv2d, conv),
    "its epilogue": (
        routed_conv2d,
        lambda: conv(bias=torch.randn(GROUPS, 8), sample_bias=torch.randn(5, 8), residual=images(8)),
    ),
    "widths": (routed_conv2d, lambda: conv(in_widths=widths(8, 4, 0), out_widths=widths(2, 8, 5))),
    "one tensor of widths for both sides": (routed_conv2d, one_width_twice),
    "two inputs": (routed_conv2d, lambda: conv(x=images(5), x2=images(3))),
    "linear": (
        routed_linear,
        lambda: {"x": torch.randn(5, 8), "weight": torch.randn(GROUPS, 6, 8), "bias": None, "plan": PLAN},
    ),
    "group norm": (routed_group_norm, norm),
    "all of a group norm": (
        routed_group_norm,
        lambda: norm(x=images(6), x2=images(2), scale=torch.randn(5, 8), shift=torch.randn(5, 8), activation="silu"),
    ),
    "a norm's widths": (routed_group_norm, lambda: norm(widths=widths(8, 2, 0))),
}


@pytest.fixture(autouse=True)
def forgetting() -> Iterator[None]:
    backends.forget()
    yield
    backends.forget()


def results(case: Case, given: dict[str, Any]) -> list[Tensor]:
    """The result and the gradients of all that has one."""
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in given.items()
        if isinstance(t, Tensor) and t.is_floating_point()
    }
    y = case[0](**given | leaves)
    dy = torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]


@pytest.mark.parametrize("name", CASES)
def test_a_repeated_call_does_what_the_backend_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    given = case[1]()
    expected = results(case, given)
    backends.forget()
    for _ in range(2):  # the general way, then recorded
        results(case, case[1]())
    kept = [call.run for call in call_cache.cached_calls()]
    assert kept and all(isinstance(run, Replayed) and not run.never_repeats for run in kept)

    def refuse(*_: Any) -> None:
        raise AssertionError("a repeated call came to the backend")

    for function in FUNCTIONS:
        monkeypatch.setattr(cpu, function, refuse)
    for found, wanted in zip(results(case, given), expected, strict=True):
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()


@pytest.mark.parametrize(
    ("case", "bad", "message"),
    [
        (CASES["widths"], {"in_widths": widths(8, 9, 0)}, "^in_widths: got "),
        (CASES["widths"], {"out_widths": widths(2, 8, -1)}, "^out_widths: got "),
        (CASES["a norm's widths"], {"widths": widths(8, 3, 0)}, "^widths: got "),
    ],
)
def test_numbers_in_a_repeated_call_are_checked(case: Case, bad: dict[str, Tensor], message: str) -> None:
    given = case[1]()
    with pytest.raises(ValueError, match=message) as first:
        case[0](**given | bad)
    for _ in range(3):
        case[0](**given)
    with pytest.raises(ValueError, match=message) as repeated:
        case[0](**given | bad)
    assert str(repeated.value) == str(first.value)


def test_the_number_of_threads_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    given = conv()
    for _ in range(3):
        routed_conv2d(**given)
    monkeypatch.setattr(native_call, "_threads", lambda: asked.append(1) or 1)
    routed_conv2d(**given)
    assert asked == [1]


def test_a_call_of_an_empty_batch_is_checked_every_time() -> None:
    given = conv(x=images(8)[:0], plan=RoutingPlan.from_groups(torch.arange(0), GROUPS), in_widths=widths(8, 4, 0))
    for _ in range(3):
        routed_conv2d(**given)
    with pytest.raises(ValueError, match="^in_widths: got "):
        routed_conv2d(**given | {"in_widths": widths(8, 9, 0)})
