"""The other tests of this folder again, with all kernels built under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

from tests.emulator.harness import plain_only, run_sanitized


@plain_only
def test_every_kernel_passes_under_sanitizers() -> None:
    said = run_sanitized(*sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)))
    assert " passed" in said
