"""Builds `tdc_fast._native` with CMake. Metadata lives in pyproject.toml.

`TDC_FAST_BUILD=auto|cpu|cuda` (default auto) says whether CUDA code is built; no GPU is ever asked for.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda")


class CMakeBuild(build_ext):
    """Configures from scratch each time: a cache from an isolated build refers to tools that were deleted."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build the extension module."""
        mode = os.environ.get("TDC_FAST_BUILD", "auto")
        if mode not in MODES:
            raise SystemExit(f"TDC_FAST_BUILD: got {mode!r}; expected one of {', '.join(MODES)}")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (Path(self.build_temp) / "cmake").resolve()
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            _tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DTDC_FAST_BUILD={mode}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={_pybind11_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]
        if ninja := shutil.which("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _run("configure", configure)
        # Two compilers at once at most by default: nvcc and the AVX-512 sources take about 1 GB each.
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(min(2, os.cpu_count() or 1)))
        _run("build", [_tool("cmake"), "--build", str(build), "--target", "_native", "--parallel", jobs])
        if not module.exists():
            raise SystemExit(f"the build ended without {module}")


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is not on PATH: pip install {name}, or let pip's build isolation bring it")
    return path


def _pybind11_cmake_dir() -> str:
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit("pybind11 is not installed: pip install pybind11, or let pip's build isolation bring it")
    import pybind11

    return pybind11.get_cmake_dir()


def _run(step: str, command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"CMake's {step} step failed (see above): {' '.join(command)}")


setup(
    packages=[*find_packages(include=["tdc_fast", "tdc_fast.*"]), "tdc_fast.kernels", "tdc_fast.cuda_sources"],
    package_dir={"tdc_fast.kernels": "kernels", "tdc_fast.cuda_sources": "csrc/cuda"},
    ext_modules=[Extension("tdc_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
