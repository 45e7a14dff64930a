"""The package as a whole: what importing costs, what a build switch does, what stays out of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import tdc_fast

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = [
    "triton",
    "cupy",
    "matplotlib",
    "tensorboard",
    "torchmetrics",
    "sklearn",
    "PIL",
    "tyro",
    "tqdm",
    "optuna",
    "openai",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "diffusers",
    "accelerate",
]


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout


def test_import_pulls_in_no_optional_package():
    """Whatever torch itself loads is torch's; nothing may come on top."""
    code = "import sys, torch; before = set(sys.modules); import tdc_fast; print(*(set(sys.modules) - before))"
    loaded = {module.partition(".")[0] for module in run_python(code).split()}
    assert loaded.isdisjoint(OPTIONAL)


def test_import_loads_no_submodule_until_a_name_is_used():
    code = "import sys, tdc_fast; print(sorted(m for m in sys.modules if m.startswith('tdc_fast.')))"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("name", tdc_fast.__all__)
def test_every_public_name_resolves(name):
    assert getattr(tdc_fast, name).__name__ == name


def test_calls_and_their_repetition_do_not_import_torchs_compiler():
    code = """
import sys, torch
from tdc_fast import RoutingPlan, routed_linear
plan = RoutingPlan.from_groups([0, 1], 2)
x, weight = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4, 4).requires_grad_()
for _ in range(3):
    routed_linear(x, weight, None, plan).sum().backward()
print("torch._dynamo" in sys.modules)
"""
    assert run_python(code).strip() == "False"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'routed_conv3d'"):
        _ = tdc_fast.routed_conv3d


def test_triton_kernels_install_below_the_package():
    assert importlib_origin("tdc_fast.kernels").endswith(os.path.join("kernels", "__init__.py"))


def test_cuda_sources_install_below_the_package():
    """NVRTC compiles them on a machine that has a GPU and no nvcc."""
    folder = Path(importlib_origin("tdc_fast.cuda_sources")).parent
    shipped = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"families.def", "device.cuh", "conv/images.cuh", "conv/params.h", "plan/kernels.h"} <= shipped


def test_the_sources_of_the_extension_are_package_data():
    """They are compiled on the machine that uses them, so a wheel must have them all."""
    folder = ROOT / "tdc_fast" / "ops"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {path for pattern in settings["package-data"]["tdc_fast.ops"] for path in folder.glob(pattern)}
    assert shipped == set((folder / "host_sources").iterdir()) and folder / "host_sources" / "host.cpp" in shipped


def importlib_origin(name: str) -> str:
    return run_python(f"import importlib.util as u; print(u.find_spec({name!r}).origin)").strip()


def cmake(tmp_path: Path, *flags: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Configures (builds nothing) without the Python module, so that only the switches are under test."""
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    for variable in ("CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        if path is not None:
            environment.pop(variable, None)
    command = [
        shutil.which("cmake") or "cmake",
        f"-S{ROOT}",
        f"-B{tmp_path}/build",
        "-DTDC_FAST_BUILD_PYTHON=OFF",
    ]
    return subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_cmake
def test_build_switch_rejects_an_unknown_mode(tmp_path):
    result = cmake(tmp_path, "-DTDC_FAST_BUILD=gpu")
    assert result.returncode != 0
    assert "TDC_FAST_BUILD: got 'gpu'" in result.stderr


@needs_cmake
def test_build_switch_cuda_without_a_compiler_fails_with_the_reason(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "make", "sh", "uname", "nm", "strip"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    result = cmake(tmp_path, "-DTDC_FAST_BUILD=cuda", "-DCMAKE_CUDA_COMPILER=NOTFOUND", path=str(tools))
    assert result.returncode != 0
    assert "no CUDA compiler was found" in " ".join(result.stderr.split())


@needs_cmake
def test_build_switch_cpu_leaves_cuda_out_even_with_nvcc(tmp_path):
    result = cmake(tmp_path, "-DTDC_FAST_BUILD=cpu")
    assert result.returncode == 0, result.stderr
    assert "CUDA architectures ''" in result.stdout


@needs_cmake
@needs_nvcc
def test_build_switch_cuda_needs_a_compiler_and_no_gpu(tmp_path):
    """What it builds is looked at in tests/compile_only/test_cuda.py."""
    result = cmake(tmp_path, "-DTDC_FAST_BUILD=cuda")
    assert result.returncode == 0, result.stderr
    assert "80-real;90a-real" in result.stdout and "-virtual" in result.stdout


def test_the_native_module_says_what_it_was_built_with():
    from tdc_fast import _native

    assert _native.cpu_isa() in ("avx512", "avx2", "portable")
    if _native.cuda_architectures:
        assert _native.cuda_runtime_version() >= 12000
        assert _native.cuda_device_count() >= torch.cuda.device_count()  # torch may be a CPU build
    else:
        assert not hasattr(_native, "cuda_device_count") and not hasattr(_native, "cuda_launch")


def test_setup_rejects_an_unknown_build_switch():
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", os.devnull],
        cwd=ROOT,
        env={**os.environ, "TDC_FAST_BUILD": "yes"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "TDC_FAST_BUILD: got 'yes'" in result.stderr


def test_build_requirements_hold_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]", text, re.M)
    assert requires is not None
    assert "torch" not in requires[1]
