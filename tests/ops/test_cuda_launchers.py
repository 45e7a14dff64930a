"""How launches reach CUDA, with a driver that only writes down what it is asked: no GPU is needed to see the calls."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tdc_fast.ops import cuda_device, cuda_native, cuda_nvrtc, native
from tests.emulator.harness import CSRC, compiler

pytestmark = pytest.mark.skipif(native.module is None, reason="the native module is not built")
DEVICE, STREAM = torch.device("cuda", 1), 0xABC0


@pytest.fixture(autouse=True)
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Device 1 of compute capability 9.0; the numbers of the devices that were made current."""
    current: list[int] = []

    def device(index: int) -> Any:
        current.append(index)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(cuda_device, "_facts", {1: (90, 132, 232448)})
    return current


class Driver:
    """The functions of cupy_backends.cuda.api.driver that are used, in its argument order."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, params_size: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.context = 7
        self._params_size = params_size

    def ctxGetCurrent(self) -> int:  # noqa: N802
        return self.context

    def moduleLoadData(self, image: bytes) -> int:  # noqa: N802
        self.calls.append(("load", image))
        return 11

    def moduleGetFunction(self, module: int, name: str) -> int:  # noqa: N802
        self.calls.append(("function", module, name))
        return 22

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:  # noqa: N802
        self.calls.append(("attribute", function, attribute, value))

    def launchKernel(self, function: int, *numbers: int) -> None:  # noqa: N802
        *sizes, stream, params, extra = numbers
        [struct] = (ctypes.c_void_p * 1).from_address(params)  # one pointer, to the struct itself
        self.calls.append(("launch", function, *sizes, stream, ctypes.string_at(struct, self._params_size), extra))


def launch(shared_bytes: int = 0, kernel: str = "tdc_routing_plan") -> Any:
    settings = {"grid": (2, 3, 4), "threads": 96, "params": bytes(range(40)), "shapes": "groups (7,)"}
    return native.module.Launch(kernel=kernel, shared_bytes=shared_bytes, **settings)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    pytest.importorskip("cupy_backends.cuda.api.driver", reason="cupy is not installed")
    from cupy_backends.cuda import api

    made = Driver(params_size=40)
    monkeypatch.setattr(api, "driver", made)
    monkeypatch.setattr(cuda_nvrtc, "cubin_of", lambda family, arch_name: f"{family} for {arch_name}".encode())
    return made


def test_nvrtc_passes_the_struct_by_value_on_torchs_stream_of_the_device(
    driver: Driver, pretended_device: list[int]
) -> None:
    cuda_nvrtc.Nvrtc().run([launch()], DEVICE)
    assert pretended_device == [1]
    assert driver.calls == [
        ("load", b"plan for sm_90a"),
        ("function", 11, "tdc_routing_plan"),
        ("launch", 22, 2, 3, 4, 96, 1, 1, 0, STREAM, bytes(range(40)), 0),
    ]


def test_nvrtc_loads_once_and_raises_the_shared_memory_limit_whenever_it_must(driver: Driver) -> None:
    """Also for 48 KB, of which the kernel's own declarations are a part."""
    launcher = cuda_nvrtc.Nvrtc()
    for shared_bytes in (0, 48 * 1024, 100_000, 100_000, 60_000, 200_000):
        launcher.run([launch(shared_bytes)], DEVICE)
    kinds = [call[0] for call in driver.calls]
    assert kinds.count("load") == kinds.count("function") == 1
    assert [call[3] for call in driver.calls if call[0] == "attribute"] == [49152, 100_000, 200_000]
    assert [call[8] for call in driver.calls if call[0] == "launch"] == [0, 49152, 100_000, 100_000, 60_000, 200_000]


def test_nvrtc_launches_from_a_thread_that_never_met_the_device(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd's is one where backward begins with our kernel: torch calls the runtime only for another device."""
    driver.context = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: setattr(driver, "context", index))
    original = driver.launchKernel
    monkeypatch.setattr(driver, "launchKernel", lambda *args: original(*args) if driver.context else pytest.fail("201"))
    cuda_nvrtc.Nvrtc().run([launch()], DEVICE)
    assert driver.calls[-1][0] == "launch"


def test_nvrtc_names_kernel_and_shapes_when_a_call_fails(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("CUDA_ERROR_INVALID_VALUE: invalid argument")

    monkeypatch.setattr(driver, "launchKernel", refuse)
    expected = (
        r"cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE.*tdc_routing_plan, grid \(2, 3, 4\).*groups \(7,\).*earlier"
    )
    with pytest.raises(RuntimeError, match=expected):
        cuda_nvrtc.Nvrtc().run([launch()], DEVICE)
    with pytest.raises(RuntimeError, match="no kernel of that name in the sources: kernel nothing"):
        cuda_nvrtc.Nvrtc().run([launch(kernel="nothing")], DEVICE)


def test_native_launches_on_torchs_stream_of_the_device(
    monkeypatch: pytest.MonkeyPatch, pretended_device: list[int]
) -> None:
    calls: list[Any] = []
    build = SimpleNamespace(cuda_launch=lambda *arguments: calls.append(arguments))
    made = launch()
    monkeypatch.setattr(native, "module", build)
    cuda_native.Native().run([made], DEVICE)
    assert calls == [([made], 1, STREAM)]
    assert pretended_device == [1]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    cuda_native.Native().run([made], DEVICE)
    assert calls == [([made], 1, STREAM)] * 2
    assert pretended_device == [1]  # which is the current one already
    assert cuda_native.Native().device_facts(DEVICE) == (90, 132, 232448)


RUNTIME = r"""
#pragma once
typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct dim3 { unsigned x, y, z; dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
cudaError_t cudaSetDevice(int);
cudaError_t cudaFuncSetAttribute(const void*, int, int);
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, unsigned long, cudaStream_t);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
"""
PROGRAM = r"""
#include "cuda/launch/registry.h"
#include "cuda_runtime_api.h"
#include <cstdio>
#include <stdexcept>

static int device = -1, last_error = 0;
static unsigned allowed[2] = {48 * 1024 - 16, 48 * 1024 - 16};  // of a kernel that declares 16 bytes itself

cudaError_t failing(bool wrong) { return wrong ? last_error = 1 : cudaSuccess; }
cudaError_t cudaSetDevice(int index) { return device = index, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  if (bytes <= 200000) std::printf("allow %d on %d\n", bytes, device), allowed[device] = bytes;
  return failing(bytes > 200000);
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, unsigned long bytes, cudaStream_t) {
  return failing(bytes > allowed[device]);
}
cudaError_t cudaGetLastError() { const int error = last_error; return last_error = 0, error; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
const tdc::KernelTable& tdc::kernel_table() {
  static const KernelTable table = {{"kernel", &device}};
  return table;
}

int main() {
  const unsigned launches[][2] = {{0, 0}, {0, 49152}, {0, 49152}, {0, 300000}, {0, 49152}, {1, 60000}, {0, 60000}};
  for (const auto& [on, bytes] : launches) {
    try {
      tdc::cuda_launch({{"kernel", {1, 1, 1}, 32, bytes, {}, "x"}}, static_cast<int>(on), 0);
      std::printf("%u bytes on %u\n", bytes, on);
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
  }
}
"""


def test_native_asks_for_shared_memory_and_blames_no_launch_for_the_one_before(tmp_path: Path) -> None:
    """The host code as it is, with a runtime that remembers errors until asked, as CUDA's does."""
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    launch = CSRC / "cuda" / "launch"
    sources = [str(launch / "launch.cpp"), str(launch / "tensor_maps.cpp"), str(tmp_path / "program.cpp")]
    command = [compiler(), "-std=c++17", f"-I{tmp_path}", f"-I{CSRC}", *sources, "-o", str(tmp_path / "program")]
    subprocess.run(command, check=True, timeout=300)
    said = subprocess.run([tmp_path / "program"], check=True, timeout=60, capture_output=True, text=True).stdout
    lines = said.splitlines()
    assert re.match(
        r"cudaFuncSetAttribute.* failed: cudaErrorInvalidValue.*kernel kernel.*300000.*earlier", lines.pop(4)
    )
    assert lines == [
        *("0 bytes on 0", "allow 49152 on 0", "49152 bytes on 0", "49152 bytes on 0"),
        *("49152 bytes on 0", "allow 60000 on 1", "60000 bytes on 1", "allow 60000 on 0", "60000 bytes on 0"),
    ]
