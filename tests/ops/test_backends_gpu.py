"""What the GPU backends say without a GPU: reasons, order, lazy imports, the launcher that tests inject."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm
from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.ops import available_backends, backends, cuda, cuda_launch, cuda_native, cuda_nvrtc, native

needs_native = pytest.mark.skipif(native.module is None, reason="the native module is not built")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def conv_problem(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> ConvProblem:
    problem = ConvProblem(
        "routed_conv2d", torch.device(device), dtype, 4, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1), 8, 8, 2, 2
    )
    return dataclasses.replace(problem, **changes)


def norm_problem(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> NormProblem:
    problem = NormProblem("routed_group_norm", torch.device(device), dtype, 4, 8, 8, 16, 4, 1e-5, True, 2, 2)
    return dataclasses.replace(problem, **changes)


class Recorder:
    """A launcher that keeps what it is given."""

    name = "recorder"

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def device_facts(self, device: torch.device) -> tuple[int, int, int]:
        return 90, 132, 232448

    def run(self, launches: Sequence[Any], device: torch.device) -> None:
        self.launches += launches


def test_the_order_of_choice_depends_on_the_operator() -> None:
    assert available_backends() == ["cpu", "triton", "cuda", "hopper", "reference"]
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    conv = explain("routed_conv2d", torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 3, 1, 1), None, plan)
    norm = explain("routed_group_norm", torch.zeros(2, 4, 3, 3), *torch.zeros(2, 2, 4), plan, num_groups=2)
    assert list(conv.reasons) == ["cpu", "triton", "cuda", "hopper", "reference"]
    assert list(norm.reasons) == ["cpu", "cuda", "triton", "hopper", "reference"]


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("triton", "cpu", "its tensors live on a CUDA device, not on cpu"),
        ("cuda", "cpu", "its tensors live on a CUDA device, not on cpu"),
        ("cpu", "cuda", "its tensors live in host memory, not on cuda"),
    ],
)
def test_a_backend_of_another_device_says_where_tensors_should_be(backend: str, device: str, reason: str) -> None:
    chosen = next(b for b in backends._backends if b.name == backend)
    for problem in (conv_problem(device), norm_problem(device)):
        assert (chosen.supports(problem) or "").startswith(reason)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_asked_for_by_name_on_host_memory_a_gpu_backend_raises_with_its_reason(backend: str) -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x, affine = torch.zeros(2, 4, 3, 3), torch.zeros(2, 2, 4)
    expected = f"^backend: got '{backend}'; expected one that supports this call: .*live on a CUDA device, not on cpu"
    with pytest.raises(ValueError, match=expected):
        routed_conv2d(x, torch.zeros(2, 4, 4, 1, 1), None, plan, backend=backend)
    with pytest.raises(ValueError, match=expected):
        routed_group_norm(x, *affine, plan, num_groups=2, backend=backend)


@needs_native
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (conv_problem(dtype=torch.float64), "float32, bfloat16 and float16, not torch.float64"),
        (
            conv_problem(dtype=torch.float32),
            'rounds products to tf32, which torch.set_float32_matmul_precision("high")',
        ),
        (conv_problem(filter=(2, 3)), "odd filters, not (2, 3)"),
        (conv_problem(stride=(1, 3)), "strides 1 and 2, not (1, 3)"),
        (norm_problem(dtype=torch.float64), "float32, bfloat16 and float16, not torch.float64"),
    ],
    ids=["fp64", "exact fp32", "even filter", "stride 3", "fp64 norm"],
)
def test_the_cuda_backend_says_what_it_lacks_before_it_looks_for_a_gpu(problem: Any, reason: str) -> None:
    assert reason in (cuda.supports(problem) or "")


@needs_native
@without_gpu
@pytest.mark.parametrize("problem", [conv_problem(), norm_problem()], ids=["conv", "norm"])
def test_what_only_a_gpu_is_missing_for_says_so(problem: Any) -> None:
    assert cuda.supports(problem) == "there is no GPU that torch can use here"


@needs_native
def test_tf32_serves_fp32_convolutions_once_it_is_allowed() -> None:
    with cuda_launch.use_launcher(Recorder()):
        assert cuda.supports(conv_problem(dtype=torch.float32)) is not None
        assert cuda.supports(conv_problem(dtype=torch.float32, tf32=True)) is None


@needs_native
def test_explain_describes_a_gpu_problem_with_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(8, 16, 4, 4, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(4, 16, 16, 3, 3, dtype=torch.bfloat16, device="cuda")
        affine = [torch.empty(4, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        index = torch.empty(4, dtype=torch.int32, device="cuda")
        plan = RoutingPlan.from_groups(torch.empty(8, dtype=torch.int64, device="cuda"), 4, index)
        said = explain(routed_conv2d, x, weight, None, plan, padding=1)
        refused = explain(routed_conv2d, x, weight, None, plan, padding=1, backend="cpu")
        with cuda_launch.use_launcher(Recorder()):
            norm = explain(routed_group_norm, x, *affine, plan, num_groups=4)
    assert said.reasons["cpu"] == "its tensors live in host memory, not on cuda:0"
    assert said.reasons["reference"] is None
    assert refused.backend is None
    assert norm.backend == "cuda" and norm.reasons["cuda"] is None


def test_changing_the_precision_changes_the_problem() -> None:
    """The choice for a call is remembered; it must not outlive torch.set_float32_matmul_precision."""
    seen: list[bool] = []

    class Watching:
        name = "watching"

        def supports(self, problem: Any) -> str | None:
            seen.append(problem.tf32)
            return "it only watches"

    before, registered = torch.get_float32_matmul_precision(), list(backends._backends)
    plan = RoutingPlan.from_groups(torch.tensor([0]), 1)
    try:
        backends.register(Watching())
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            routed_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 2, 1, 1), None, plan)
    finally:
        torch.set_float32_matmul_precision(before)
        backends._backends[:] = registered
        backends.forget()
    assert seen == [False, True]


@needs_native
def test_an_injected_launcher_gets_the_launches_of_a_call_and_is_forgotten_after_it() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 1]), 2)
    x, weight = torch.zeros(3, 8, 4, 4).bfloat16(), torch.zeros(2, 16, 8, 3, 3).bfloat16()
    recorder = Recorder()
    with cuda_launch.use_launcher(recorder):
        y = routed_conv2d(x, weight, None, plan, padding=1, backend="cuda")
    assert y.shape == (3, 16, 4, 4)
    [launch] = recorder.launches
    assert launch.kernel in native.module.cuda_kernels["conv_forward"]
    assert min(launch.grid) >= 1 and launch.threads >= 32 and len(launch.params) > 0
    assert "16" in launch.shapes  # the channels, for an error message
    with pytest.raises(ValueError, match="live on a CUDA device"):
        routed_conv2d(x, weight, None, plan, padding=1, backend="cuda")


@needs_native
def test_an_empty_batch_launches_nothing_and_leaves_zero_gradients() -> None:
    plan = RoutingPlan.from_groups(torch.zeros(0, dtype=torch.int64), 2)
    x, weight = torch.zeros(0, 8, 4, 4).bfloat16(), torch.ones(2, 16, 8, 3, 3).bfloat16().requires_grad_()
    recorder = Recorder()
    with cuda_launch.use_launcher(recorder):
        routed_conv2d(x, weight, None, plan, padding=1, backend="cuda").sum().backward()
    assert recorder.launches == []
    assert weight.grad is not None and not weight.grad.any()


@needs_native
def test_planners_name_a_keyword_that_is_missing_or_unknown() -> None:
    facts = (90, 132, 232448)
    with pytest.raises(TypeError, match="missing keyword argument 'num_groups'"):
        native.module.cuda_routing_plan_supported(device=facts)
    with pytest.raises(TypeError, match="unknown keyword argument 'groups'"):
        native.module.cuda_routing_plan_supported(num_groups=3, groups=0, device=facts)
    with pytest.raises(TypeError, match="device: expected"):
        native.module.cuda_routing_plan_supported(num_groups=3, device=(90, 132))


@needs_native
@without_gpu
@pytest.mark.skipif(not hasattr(native.module, "cuda_launch"), reason="built without nvcc")
def test_a_launch_that_fails_names_the_kernel_and_the_shapes() -> None:
    def launch(kernel: str) -> Any:
        settings = {"grid": (1, 2, 3), "threads": 128, "shared_bytes": 99, "params": b"\0" * 8}
        return native.module.Launch(kernel=kernel, shapes="x (4, 8) bf16", **settings)

    with pytest.raises(
        RuntimeError, match=r"no kernel of that name.*kernel nothing, grid \(1, 2, 3\).*x \(4, 8\) bf16"
    ):
        native.module.cuda_launch([launch("nothing")], 0, 0)
    with pytest.raises(RuntimeError, match=r"cuda\w+ failed: cudaError.*kernel tdc_routing_plan.*x \(4, 8\) bf16"):
        native.module.cuda_launch([launch("tdc_routing_plan")], 0, 0)


@pytest.mark.parametrize(
    ("architectures", "arch", "covered"),
    [
        ("80-real 90a-real", 80, True),
        ("80-real 90a-real", 86, True),
        ("80-real 90a-real", 75, False),
        ("80-real 90a-real", 90, True),
        ("80-real 90a-real", 100, False),
        ("80-real 90a-real 100-real 100-virtual", 103, True),
        ("80-real 90a-real 100-real 100-virtual", 120, True),
        ("90a-real", 90, True),
        ("90a-real", 80, False),
        ("100-virtual", 90, False),
        ("", 90, False),
    ],
)
def test_a_build_covers_what_its_machine_code_and_its_ptx_run_on(architectures: str, arch: int, covered: bool) -> None:
    assert cuda_native.build_covers(architectures, arch) is covered


def test_the_launcher_is_native_where_the_build_covers_the_device_else_nvrtc_else_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Build:
        cuda_architectures = "80-real 90a-real"
        devices = 1
        cuda_device_count = classmethod(lambda build: build.devices)
        cuda_runtime_version = staticmethod(lambda: 13000)

    monkeypatch.setattr(native, "module", Build)
    monkeypatch.setattr(cuda_nvrtc, "unavailable", lambda arch: None)
    assert isinstance(cuda_launch.choose(90)[0], cuda_native.Native)
    assert isinstance(cuda_launch.choose(120)[0], cuda_nvrtc.Nvrtc)
    monkeypatch.setattr(cuda_nvrtc, "unavailable", lambda arch: "NVRTC needs cupy")
    launcher, reason = cuda_launch.choose(120)
    assert launcher is None
    assert reason == "the native module was built for 80-real 90a-real, the device is sm_120, and NVRTC needs cupy"
    Build.devices = 0  # torch brings a runtime of its own, which an older driver may serve
    assert "was built with CUDA 13, which the driver does not serve" in cuda_launch.choose(90)[1]
    Build.cuda_architectures = ""
    assert "was built without nvcc" in cuda_launch.choose(80)[1]


def test_choosing_a_backend_for_host_memory_imports_neither_triton_nor_cupy() -> None:
    program = """
import sys, torch
from tdc_fast import RoutingPlan, explain, routed_conv2d
plan = RoutingPlan.from_groups(torch.tensor([0]), 1)
x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 3, 1, 1)
routed_conv2d(x, weight, None, plan)
routed_conv2d(x.double(), weight.double(), None, plan)
print(explain(routed_conv2d, x, weight, None, plan))
loaded = [m for m in ("triton", "cupy", "cupy_backends") if m in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_without_triton_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = next(b for b in backends._backends if b.name == "triton")

    def missing() -> Any:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(triton, "module", missing)
    assert "pip install 'tdc_fast[gpu]'" in (triton.supports(conv_problem()) or "")
