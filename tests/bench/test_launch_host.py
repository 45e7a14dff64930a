"""The bench of host time runs without a GPU and sets every operator, remembered, beside torch's."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

pytest.importorskip("triton")

from bench import launch_host
from tdc_fast.ops import call_cache
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
        runs.extend(call.run for call in call_cache.cached_calls())
        return table

    monkeypatch.setattr(launch_host, "measured", noted)
    assert launch_host.main(["--rounds", "2"]) == 0
    out = capsys.readouterr().out
    rows = ROW.findall(out)
    assert [(operator, peer) for operator, peer, *_ in rows] == [
        (operator, peer) for operator in ("conv2d", "group_norm", "linear") for peer in ("torch", "triton", "cuda")
    ]
    assert all(float(row[2]) > 0 for row in rows)
    assert {row[3] for row in rows if row[1] == "torch"} == {"1.00"}
    assert runs and all(isinstance(run, Replayed) and not run.never_repeats for run in runs)
    replays = re.findall(r"^replay of a graph, (\w+) modules: ([\d.]+)$", out, re.MULTILINE)
    assert [modules for modules, _ in replays] == ["537", "no"] and all(float(time) > 0 for _, time in replays)


def test_a_replay_is_one_and_reads_the_mode_of_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the bench would time the function that runs without a graph."""
    replayed, signatures = [], []
    graphed = import_module("tdc_fast.graphs.graphed")  # the package has a function of this name
    key_of = graphed._key
    monkeypatch.setattr(launch_host.NoGraph, "replay", lambda self: replayed.append(1))
    monkeypatch.setattr(graphed, "_key", lambda *args: signatures.append(len(args[-1])) or key_of(*args))
    launch_host.replays(1)
    assert len(replayed) == 2 * (1 + launch_host.CALLS - 2)  # both warm up twice
    assert set(signatures) == {537, 0}
