"""Tensor maps reach the driver's encoder as described, once per address and shape; a stand-in for it answers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.harness import ROOT, compiler

# Writes what it is asked into the 128 bytes of the encoding: 12 numbers, the boxes, and how often it was called.
DRIVER = r"""
#include <cstdint>
#include <cstring>
extern "C" int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                                      const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                                      int interleave, int swizzle, int promotion, int fill) {
  static uint32_t calls = 0;
  if (sizes[0] == 72) return 1;
  const uint32_t numbers[32] = {++calls, uint32_t(type), rank, uint32_t(uintptr_t(address)), uint32_t(sizes[0]),
                                uint32_t(sizes[3]), uint32_t(strides[0]), uint32_t(strides[2]), box[0], box[3],
                                steps[0], steps[3], uint32_t(interleave), uint32_t(swizzle), uint32_t(promotion),
                                uint32_t(fill)};
  std::memcpy(map, numbers, sizeof(numbers));
  return 0;
}
"""
ASK = """
import struct, sys
from tdc_fast import _native
def described(address, channels=64, half=0):
    sizes, box = (channels, 8, 9, 10, 1), (64, 4, 5, 6, 1)
    return struct.pack("=5Q10I2i5Q", address, 128, 256, 512, 0, *sizes, *box, 4, half, *[0] * 5)
def launch(*maps, at=None):
    settings = {"kernel": "k", "grid": (1, 1, 1), "threads": 32, "shared_bytes": 0, "shapes": "x (1,)"}
    params = b"".join(maps) + b"the rest"
    return _native.Launch(params=params, tensor_maps=at or [128 * i for i in range(len(maps))], **settings)
try:
    both = launch(described(4096), described(8192, half=1))
    for made in (both, launch(described(4096)), launch(described(4096, 128))):
        print(made.encoded_params().hex())
    launch(described(4096, 72)).encoded_params()
except RuntimeError as error:
    print(error)
"""


def asked(folder: Path) -> list[str]:
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    result = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_driver_encodes_each_address_and_shape_once(tmp_path: Path) -> None:
    source = tmp_path / "driver.cpp"
    source.write_text(DRIVER)
    subprocess.run([compiler(), "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    *encoded, error = asked(tmp_path)
    both, again, wider = (bytes.fromhex(line) for line in encoded)

    def numbers(params: bytes, at: int) -> tuple[int, ...]:
        return struct.unpack_from("=16I", params, at)

    # bfloat16 is 9, float16 6; no interleave, 128-byte swizzle (3), L2 promotion of 128 bytes (2), zeros outside.
    assert numbers(both, 0) == (1, 9, 4, 4096, 64, 10, 128, 512, 64, 6, 1, 1, 0, 3, 2, 0)
    assert numbers(both, 128) == (2, 6, 4, 8192, 64, 10, 128, 512, 64, 6, 1, 1, 0, 3, 2, 0)
    assert both[256:] == b"the rest"
    assert again[:128] == both[:128]
    assert numbers(wider, 0)[:5] == (3, 9, 4, 4096, 128)
    assert error == "cuTensorMapEncodeTiled failed: error 1; kernel k, for x (1,)"


def test_a_machine_without_a_driver_is_told_so(tmp_path: Path) -> None:
    if any(Path(folder, "libcuda.so.1").exists() for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64")):
        pytest.skip("this machine has a driver")
    assert asked(tmp_path) == ["no driver with cuTensorMapEncodeTiled (CUDA 12.0 or newer); kernel k, for x (1,)"]
