"""The tests of the Hopper form again, with kernels built under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

from tests.emulator.harness import plain_only, run_sanitized


@plain_only
def test_kernels_pass_under_sanitizers() -> None:
    said = run_sanitized(
        *sorted(path for path in Path(__file__).parent.glob("test_*hopper*.py") if path != Path(__file__))
    )
    assert " passed" in said
