"""The tests of the CPU kernels, once more for each instruction set of this processor besides its best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdc_fast.ops import native

FILES = [Path(__file__).with_name(f"test_{name}.py") for name in ("conv", "group_norm", "batch_invariance")]

pytestmark = pytest.mark.skipif(native.module is None, reason="the native module is not built")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_passes(isa: str) -> None:
    if native.module.cpu_isa() == isa:
        pytest.skip("the set that this process runs on")
    environment = dict(os.environ, TDC_FAST_CPU_ISA=isa)
    probe = [sys.executable, "-c", "from tdc_fast import _native; _native.cpu_isa()"]
    if subprocess.run(probe, env=environment, capture_output=True).returncode != 0:
        pytest.skip(f"this processor or build has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, FILES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
