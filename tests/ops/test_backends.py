"""The choice of a backend: by name, by environment, or the fastest that serves; and never in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tdc_fast
from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops import available_backends, backends, cpu, native, reference

needs_native = pytest.mark.skipif(native.module is None, reason="the native module is not built")


def conv(
    dtype: torch.dtype = torch.float32, filter_: int = 3, **settings: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x, weight = torch.randn(2, 3, 6, 6, dtype=dtype), torch.randn(2, 4, 3, filter_, filter_, dtype=dtype)
    return (x, weight, None, plan), settings


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that run a convolution."""
    made: list[str] = []
    for backend in (cpu, reference):
        original = backend.conv2d
        monkeypatch.setattr(backend, "conv2d", lambda *a, _f=original, _n=backend.name: (made.append(_n), _f(*a))[1])
    return made


@needs_native
def test_the_fastest_backend_that_serves_is_taken(calls: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        arguments, settings = conv(dtype)
        routed_conv2d(*arguments, **settings)
    assert calls == ["cpu", "cpu", "reference", "reference"]


@needs_native
def test_the_argument_wins_over_the_environment_over_the_fastest(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, _ = conv()
    monkeypatch.setenv("TDC_FAST_BACKEND", "reference")
    routed_conv2d(*arguments)
    routed_conv2d(*arguments, backend="cpu")
    monkeypatch.delenv("TDC_FAST_BACKEND")
    routed_conv2d(*arguments)
    assert calls == ["reference", "cpu", "cpu"]


@needs_native
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (conv(torch.float64), "float32 and bfloat16, not torch.float64"),
        (conv(filter_=2), r"odd filters, not \(2, 2\)"),
        (conv(stride=3), r"strides 1 and 2, not \(3, 3\)"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_serve_says_why(
    call: tuple[tuple[Any, ...], dict[str, Any]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, settings = call
    with pytest.raises(ValueError, match=f"^backend: got 'cpu'; .*{reason}"):
        routed_conv2d(*arguments, **settings, backend="cpu")
    assert routed_conv2d(*arguments, **settings).shape[1] == 4  # without a name, another one serves
    monkeypatch.setenv("TDC_FAST_BACKEND", "cpu")
    with pytest.raises(ValueError, match=f"^TDC_FAST_BACKEND: got 'cpu'; .*{reason}"):
        routed_conv2d(*arguments, **settings)


def test_an_unknown_backend_is_named() -> None:
    arguments, _ = conv()
    with pytest.raises(ValueError, match="backend: got 'fastest'; expected one of .*reference"):
        routed_conv2d(*arguments, backend="fastest")


def test_explain_says_what_would_run_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, settings = conv(torch.float64)
    explanation = explain(routed_conv2d, *arguments, **settings)
    assert explanation.backend == "reference"
    assert explanation.reasons["reference"] is None
    assert explanation.reasons["cpu"]
    assert list(explanation.reasons) == available_backends()
    assert str(explanation).startswith(
        "routed_conv2d: reference (the fastest that supports the call, in the usual order)"
    )
    refused = explain(routed_conv2d, *arguments, backend="cpu")
    assert refused.backend is None and "backend='cpu'" in str(refused)
    monkeypatch.setenv("TDC_FAST_BACKEND", "reference")
    assert explain("routed_conv2d", *conv()[0]).because == "TDC_FAST_BACKEND='reference'"


def test_explain_covers_every_public_operator() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x, weight = torch.randn(2, 3), torch.randn(2, 4, 3)
    assert explain(routed_linear, x, weight, None, plan).operator == "routed_linear"
    norm = explain(routed_group_norm, torch.randn(2, 4, 1, 2), *torch.randn(2, 2, 4), plan, num_groups=2)
    assert norm.operator == "routed_group_norm"
    with pytest.raises(ValueError, match="operator: got 'softmax'"):
        explain("softmax")


def test_explain_raises_what_the_call_would_raise() -> None:
    (x, weight, bias, plan), _ = conv()
    with pytest.raises(ValueError, match="weight: "):
        explain(routed_conv2d, x, weight[:, :, :2], bias, plan)


def test_without_the_native_module_the_reference_serves_and_explain_says_so(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "the native module is not there")
    backends.forget()
    arguments, _ = conv()
    routed_conv2d(*arguments)
    assert calls == ["reference"]
    assert explain(routed_conv2d, *arguments).reasons["cpu"] == "the native module is not there"
    backends.forget()


def test_a_registered_backend_comes_first_and_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        name = "refusing"

        def supports(self, problem: Any) -> str | None:
            return f"it never serves {problem.op}"

    monkeypatch.setattr(backends, "_backends", list(backends._backends))
    backends.register(Refusing())
    arguments, _ = conv()
    assert explain(routed_conv2d, *arguments).reasons["refusing"] == "it never serves routed_conv2d"
    with pytest.raises(ValueError, match="backend: got 'refusing'"):
        backends.register(Refusing())
    backends.forget()


def test_the_operators_are_public() -> None:
    for name in ("routed_conv2d", "routed_linear", "routed_group_norm", "explain", "RoutingPlan", "TimestepGroups"):
        assert hasattr(tdc_fast, name)
