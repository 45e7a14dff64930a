"""Profiling reads the report of Nsight Compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import profile_gpu


@pytest.mark.parametrize("layer", ["conv 4 8 8 6 3 1 --direction wgrad", "norm 4 8 6 4 --direction backward"])
def test_a_profile_reads_ncus_report(layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_gpu.main([*layer.split(), "--dry-run", "--out", str(tmp_path / "figures.json")]) == 0
    (kernel,) = json.loads((tmp_path / "figures.json").read_text())["kernels"]
    assert kernel["time us"] == 12.5 and kernel["tensor pipe %"] == 50.0 and kernel["L2 throughput %"] is None
    assert list(kernel["stalls"].items()) == [("wait", 1.5), ("barrier", 0.25)]
    printed = capsys.readouterr().out
    assert "tensor pipe %      50.0" in printed and "stalls             wait 1.50, barrier 0.25" in printed
