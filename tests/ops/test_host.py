"""The extension in C++ finds, repeats and differentiates calls as the code in Python does; without it all works."""

from __future__ import annotations

import gc
import logging
import re
import stat
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops import backends, call_cache, conv2d, group_norm, host, host_build, linear, native
from tdc_fast.ops.cuda_nvrtc import CACHE_VARIABLE

CPU = torch.device("cpu")
OPERATORS: dict[str, tuple[Callable[..., Tensor], Any, tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "routed_conv2d": (
        routed_conv2d, conv2d.forward, ((4, 4, 5, 5), (2, 6, 4, 3, 3), (2, 6)), {"padding": 1, "backend": "reference"}
    ),
    "routed_group_norm": (
        routed_group_norm, group_norm.forward, ((4, 4, 5, 5), (2, 4), (2, 4)),
        {"num_groups": 2, "activation": "silu", "backend": "reference"},
    ),
    "routed_linear": (routed_linear, linear.forward, ((4, 5, 4), (2, 6, 4), (2, 6)), {"backend": "reference"}),
}  # fmt: skip
cases = pytest.mark.parametrize("name", OPERATORS)


def tensors_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Tensors of an operator that want gradients."""
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in OPERATORS[name][2]]


def run(name: str, tensors: list[Tensor], **settings: Any) -> Tensor:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 0, 1]), 2)
    operator, _, _, usual = OPERATORS[name]
    return operator(*tensors, plan, **usual | settings)


def in_extension(name: str) -> int:
    """How many calls of an operator the extension keeps."""
    calls = OPERATORS[name][1]._calls
    return 0 if calls is None else len(calls)


@pytest.fixture
def only_extension(host_extension: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which a call that the extension does not find is an error."""

    def close() -> None:
        def not_found(*args: Any) -> Any:
            raise AssertionError("not found by the extension")

        for operator in call_cache._operators:
            if operator._calls is not None:
                monkeypatch.setattr(operator, "_find_in_python", not_found)
            monkeypatch.setattr(operator, "_again", not_found)

    return close


@cases
def test_a_second_call_is_found_and_has_the_results_of_the_general_way(
    name: str, only_extension: Callable[[], None]
) -> None:
    tensors = tensors_of(name)
    expected_y = run(name, tensors)
    dy = torch.randn_like(expected_y)
    expected = torch.autograd.grad(expected_y, tensors, dy)
    assert type(expected_y.grad_fn).__name__ != "CppFunction"
    other = tensors_of(name, 1)
    torch.autograd.grad(run(name, other), other, dy)
    only_extension()
    y = run(name, tensors)
    assert type(y.grad_fn).__name__ == "CppFunction" and y.grad_fn.name() == f"{name}Backward"
    assert torch.equal(y, expected_y)
    assert all(map(torch.equal, torch.autograd.grad(y, tensors, dy), expected))
    with torch.no_grad():
        assert not run(name, tensors).requires_grad
    assert in_extension(name) == 1


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "the native module is there")
def test_what_is_recorded_tells_tensors_apart_that_were_one(host_extension: None) -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 0, 1]), 2)
    x, added = torch.randn(4, 3, 4), torch.randn(4, 3, 4)
    weight = torch.randn(2, 4, 4)
    live, other = (torch.tensor(widths, dtype=torch.int32) for widths in ([4, 4], [1, 3]))

    def call(residual: Tensor, out_widths: Tensor) -> Tensor:
        widths = {"in_widths": live, "out_widths": out_widths}
        return routed_linear(x, weight, None, plan, residual=residual, **widths, backend="cpu")

    for residual, out_widths in ((x, other), (added, live)):
        backends.forget()
        expected = call(added, other)
        call(residual, out_widths)
        for _ in range(2):
            assert torch.equal(call(added, other), expected)


def saved_by(name: str, tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    """What a forward hands to hooks of saved tensors, which a backward then unpacks, each once."""
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def unpack(index: int) -> Tensor:
        unpacked.append(index)
        return packed[index]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, unpack):
        y = run(name, tensors)
    torch.autograd.grad(y.sum(), [t for t in tensors if t.requires_grad])
    assert sorted(unpacked) == list(range(len(packed)))
    return [(t.shape, t.dtype) for t in packed]


@cases
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,)])
def test_it_saves_what_the_general_way_saves(name: str, wanted: tuple[int, ...], host_extension: None) -> None:
    tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(map(Tensor.detach, tensors_of(name)))]
    first = saved_by(name, tensors)
    assert in_extension(name) == 1
    assert saved_by(name, tensors) == first


@cases
def test_checkpoint_offloading_and_anomaly_mode(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)
    expected = torch.autograd.grad(run(name, tensors).sum(), tensors)
    for _ in range(2):
        y = checkpoint(lambda *tensors: run(name, list(tensors)).sin(), *tensors, use_reentrant=False)
        for one, other in zip(torch.autograd.grad(y, tensors, 1 / run(name, tensors).cos()), expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.autograd.graph.save_on_cpu():
            y = run(name, tensors)
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), tensors), expected))
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            torch.autograd.grad(run(name, tensors).sum(), tensors)


@cases
def test_errors_of_the_graph_are_those_of_the_general_way(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)
    for call in range(3):
        y = run(name, tensors).sum()
        torch.autograd.grad(y, tensors, retain_graph=True)
        torch.autograd.grad(y, tensors)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, tensors)
        y = run(name, tensors)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(y.sum(), tensors, create_graph=True)
        with pytest.raises(RuntimeError, match="one gradient at a time"):
            torch.autograd.grad(y, tensors, torch.ones(2, *y.shape), is_grads_batched=True)
        with torch.no_grad():
            tensors[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), tensors)
        assert (in_extension(name) > 0) == (call >= 0)


class Absent(torch.autograd.Function):
    """Hands back no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@cases
def test_an_absent_gradient_gives_what_the_general_way_gives(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)

    def gradients() -> list[Tensor | None]:
        return list(torch.autograd.grad(Absent.apply(run(name, tensors)).sum(), tensors, allow_unused=True))

    first, later = gradients(), gradients()
    assert [g is None for g in later] == [g is None for g in first]
    assert all(g is None or not g.any() for g in later)


@cases
def test_a_graph_that_is_gone_keeps_no_memory(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)
    for _ in range(2):
        run(name, tensors)
    x = tensors[0].detach().clone().requires_grad_()
    y = run(name, [x, *tensors[1:]])
    torch.autograd.grad(y.sum(), x)
    gone = [weakref.ref(t) for t in (x, y)]
    del x, y
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@cases
def test_a_backward_runs_in_any_thread(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)
    expected = torch.autograd.grad(run(name, tensors).sum(), tensors)
    ys = [run(name, tensors) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda y: torch.autograd.grad(y.sum(), tensors), ys))
    assert all(all(map(torch.equal, grads, expected)) for grads in found)


def test_compiled_autograd_is_refused_with_the_remedy(host_extension: None) -> None:
    from torch._dynamo import compiled_autograd

    tensors = tensors_of("routed_conv2d")
    ys = [run("routed_conv2d", tensors) for _ in range(2)]
    with compiled_autograd._enable(lambda graph: graph), pytest.raises(NotImplementedError, match="TDC_FAST_HOST=off"):
        ys[1].sum().backward()


def test_under_autocast_a_call_that_casts_nothing_is_found(only_extension: Callable[[], None]) -> None:
    name = "routed_conv2d"
    low, full = tensors_of(name, dtype=torch.bfloat16), tensors_of(name, dtype=torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(name, low)
            assert run(name, full).dtype == torch.bfloat16
        assert run(name, full).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert run(name, low).dtype == torch.float16
    only_extension()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(name, low), y)
        with pytest.raises(AssertionError, match="not found"):
            run(name, full)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(AssertionError, match="not found"):
        run(name, low)


@cases
def test_inference_mode_and_training_are_kept_apart(name: str, host_extension: None) -> None:
    tensors = tensors_of(name)
    for _ in range(3):
        with torch.inference_mode():
            assert run(name, tensors).is_inference()
            copies = [t.clone() for t in tensors]
            assert run(name, copies).is_inference()
        assert run(name, tensors).requires_grad
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            run(name, [copies[0], *tensors[1:]])


def test_forgetting_and_the_limit(host_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "_LIMIT", 3)
    for samples in range(1, 9):
        x, *rest = tensors_of("routed_conv2d")
        plan = RoutingPlan.from_groups(torch.zeros(samples, dtype=torch.int64), 2)
        routed_conv2d(x[:1].expand(samples, -1, -1, -1), *rest, plan, padding=1)
        assert 1 <= in_extension("routed_conv2d") <= 3
    backends.forget()
    assert in_extension("routed_conv2d") == 0


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state of a process that did not ask for the extension yet, and the cache, which is empty."""
    monkeypatch.setattr(host, "_loaded", [])
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(host.VARIABLE, "on")
    backends.forget()
    return tmp_path


def test_it_is_for_gpus_unless_the_environment_says_otherwise(
    not_loaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_load", lambda: "loaded")
    cuda = torch.device("cuda", 0)
    for setting, expected in {"": (None, "loaded"), "on": ("loaded", "loaded"), "off": (None, None)}.items():
        monkeypatch.setenv(host.VARIABLE, setting)
        assert (host.extension(CPU), host.extension(cuda)) == expected
    monkeypatch.setenv(host.VARIABLE, "yes")
    with pytest.raises(ValueError, match="^TDC_FAST_HOST: got 'yes'; expected auto, on or off"):
        host.extension(CPU)


def compiler(folder: Path, body: str) -> str:
    """A compiler that does what a shell says, with the file to make as $made."""
    script = folder / "compiler"
    lines = ("#!/bin/sh", 'test "$1" = --version && exit 0', "for made; do :; done", body)  # -o comes last
    script.write_text("\n".join(lines) + "\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.mark.parametrize("problem", ["no compiler", "an error", "no extension", "no folder"])
def test_where_it_cannot_be_compiled_the_log_says_why_and_calls_are_repeated_in_python(
    problem: str, not_loaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body, reason = {
        "no compiler": ("", "there is no C[+][+] compiler"),
        "an error": ("echo 'host.cpp:1: error: wrong' >&2; exit 1", "compiler failed: host.cpp:1: error: wrong"),
        "no extension": ("echo > $made", "host-.*so"),
        "no folder": ("", f"cannot be kept in .*: set {CACHE_VARIABLE}"),
    }[problem]
    if problem == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(not_loaded))
    else:
        monkeypatch.setenv("CXX", compiler(not_loaded, body))
    if problem == "no folder":
        (not_loaded / "cache").write_text("")
    tensors = tensors_of("routed_conv2d")
    with caplog.at_level(logging.WARNING, "tdc_fast"):
        ys = [run("routed_conv2d", tensors) for _ in range(3)]
    *before, record = caplog.records
    assert all("compiling" in other.getMessage() for other in before) and len(before) <= 1
    assert record.name == "tdc_fast.host" and re.search(reason, record.getMessage())
    assert torch.equal(ys[0], ys[2])
    assert len(call_cache.cached_calls()) == 1 and in_extension("routed_conv2d") == 0


def test_it_is_compiled_once_however_many_ask(not_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = not_loaded / "log"
    monkeypatch.setenv("CXX", compiler(not_loaded, f"echo $$ >> {log}; echo made > $made"))
    ready = threading.Barrier(4)

    def build(_: int) -> Path:
        ready.wait()
        return host_build.built()

    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(build, range(4)))
    assert path.read_text() == "made\n" and len(log.read_text().splitlines()) == 1
    assert host_build.built() == path
    monkeypatch.setattr(host_build, "_OPTIONS", (*host_build._OPTIONS, "-g"))
    assert host_build.built() != path
    assert {p.suffix for p in path.parent.iterdir()} == {".so", ".lock"}
