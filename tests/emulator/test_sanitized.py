"""The tests of this folder again, with kernels built under the address and undefined-behaviour sanitizers; those of the
Hopper form are in test_sanitized_hopper.py."""

from __future__ import annotations

from pathlib import Path

from tests.emulator.harness import plain_only, run_sanitized


@plain_only
def test_kernels_pass_under_sanitizers() -> None:
    every = sorted(Path(__file__).parent.glob("test_*.py"))
    said = run_sanitized(*(path for path in every if "hopper" not in path.name and path != Path(__file__)))
    assert " passed" in said
