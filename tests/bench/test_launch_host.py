"""The bench of host time runs without a GPU and sets every operator, remembered, beside torch's."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from bench import launch_host
from tdc_fast.ops import eager
from tdc_fast.ops.replay import Replayed

ROW = re.compile(r"^(\w+), (\w+) +" + r" +".join([r"(-?[\d.]+) +(-?[\d.]+)x"] * 3) + "$", re.MULTILINE)


@pytest.mark.slow
def test_every_operator_has_a_row_beside_torchs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host_extension: None
) -> None:
    for name, value in {"BATCH": 8, "GROUPS": 2, "CHANNELS": 32, "SIZE": 4, "CALLS": 2}.items():
        monkeypatch.setattr(launch_host, name, value)
    runs: list[object] = []
    measured = launch_host.measured

    def noted(*arguments: object) -> dict[str, dict[str, float]]:
        table = measured(*arguments)  # type: ignore[arg-type]
        runs.extend(seen.run for seen in eager.seen())
        return table

    monkeypatch.setattr(launch_host, "measured", noted)
    assert launch_host.main(["--rounds", "2"]) == 0
    rows = ROW.findall(capsys.readouterr().out)
    assert [(operator, peer) for operator, peer, *_ in rows] == [
        (operator, peer) for operator in ("conv2d", "group_norm", "linear") for peer in ("torch", "triton", "cuda")
    ]
    assert all(float(row[2]) > 0 for row in rows)
    assert {row[3] for row in rows if row[1] == "torch"} == {"1.00"}
    assert runs and all(isinstance(run, Replayed) and not run.never_repeats for run in runs)
