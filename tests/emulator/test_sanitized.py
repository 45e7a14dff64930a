"""Every test file of this folder again, with all kernels built under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulator.harness import plain_only, run_sanitized

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))


@plain_only
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_passes_under_sanitizers(path: Path) -> None:
    run_sanitized(path)
