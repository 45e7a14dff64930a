"""The GPU bench runs from end to end on the CPU, with tiny shapes, and keeps what it measured whatever fails."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import conv, step, train_run, unet
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Budget, Machine

SECTIONS = {"unet", "training", "sampling", "growth", "conv", "group norm"}


def dry_run(folder: Path, *arguments: str) -> tuple[int, dict, str]:
    code = command.main(["--dry-run", "--out", str(folder), "--name", "here", *arguments])
    return code, json.loads((folder / "here.json").read_text()), (folder / "here.md").read_text()


def test_a_dry_run_times_every_section_and_peer(tmp_path: Path) -> None:
    code, results, table = dry_run(tmp_path, "--seconds", "3600")  # whatever else the machine does
    assert code == 0
    rows = results["rows"]
    assert {row["section"] for row in rows} == SECTIONS | {conv.SUMS}
    sums = {row["direction"] for row in rows if row["section"] == conv.SUMS}
    assert sums == set(conv.DIRECTIONS) and "## conv, sums tiny" in table
    for row in rows:
        if row["section"] == conv.SUMS:
            continue
        assert row["rounds"] >= 1 and all(value > 0 for value in row["ms"].values())
        alone = row["section"] == "sampling" or row["direction"] == train_run.RUN
        assert {"ours"} if alone else {"ours", "ours, graph"} <= row["ms"].keys()
        assert row["ratios"] and row["error"] < (0.1 if row["section"] in ("unet", "growth") else 0.02)
        assert set(row["absent"]) <= {"grouped_mm"}, "only im2col may refuse a shape"
    peers = {name for row in rows if row["section"] == "conv" for name in row["ratios"]}
    loops = {"loop", "loop, graph", "streams", "streams, graph", "compiled loop"}
    assert peers == loops | {"dense", "dense, graph", "grouped_mm", "full width, graph"}
    widths = [(width, False) for width in conv.WIDTHS]
    found = {
        (r["num_groups"], r["uneven"], (r["width"], r.get("mixed", False)), r["direction"])
        for r in rows
        if r["section"] == "conv"
    }
    assert found == {
        *itertools.product((8,), (False, True), [*widths, (0.625, True)], conv.DIRECTIONS),
        *itertools.product((4, 16), (False, True), widths[:3], conv.DIRECTIONS),
        *itertools.product((1,), (False,), widths[:3], conv.DIRECTIONS),
    }
    first = [row for row in rows if row["section"] in ("unet", "training", "sampling")][:5]
    assert [row["direction"] for row in first] == [
        "forward", "training step", step.WHOLE, train_run.RUN, "DDIM-8 of 8 images",
    ], "what 300 seconds give"  # fmt: skip
    assert {unet.COMPILED, unet.OURS_COMPILED} <= first[0]["ms"].keys() & first[1]["ms"].keys()
    assert {unet.COMPILED, step.RECIPE, step.STAGE1} <= first[2]["ms"].keys()
    assert {train_run.STAGE1, train_run.CAPTURED, step.RECIPE} <= first[3]["ms"].keys()
    growing = [row for row in rows if row["section"] == "growth"]
    assert {(row["num_groups"], row["batch"]) for row in growing} == {(1, 8), (8, 8), (8, 4)}
    for goal in results["goals"]:
        of_public_sizes = any(words in goal["goal"] for words in ("64 experts", "sum of its convolutions", "MB"))
        assert (goal["rows"] > 0) != of_public_sizes and f"| {goal['goal']} |" in table
    assert table.count("| tiny") + table.count("| design") == len(rows) - len(growing)
    assert table.count("| forward | 8 |") == 2 and table.count("| training step | 4 |") == 1  # by N and B
    assert "A dry run" in table and not results["not_run"]


def test_warming_launches_what_the_rows_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for share in ("0/9", "4/9"):  # of every kind of launch, the whole step among them
        assert command.main(["--dry-run", "--out", str(tmp_path), "--warm", share]) == 0
    assert capsys.readouterr().err == ""  # where failures are printed


def test_what_there_was_no_time_for_is_counted(tmp_path: Path) -> None:
    code, results, table = dry_run(tmp_path, "--seconds", "0")
    assert code == 0 and not results["rows"]
    assert set(results["not_run"]) == SECTIONS
    assert "not run, no time left" in table and "not measured" in table


def test_a_failing_row_is_kept_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        """As Triton's: no RuntimeError."""

    def broken(*_: object) -> dict:
        raise OutOfResources("conv_forward: out of registers")

    monkeypatch.setattr(conv, "row_of", broken)
    code, results, table = dry_run(tmp_path, "--only", "conv")
    assert code == 1 and all("out of registers" in row["failed"] for row in results["rows"])
    assert "* failed: conv" in table


def test_a_capture_of_ours_that_fails_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Machine, "captured", captured)
    code, results, table = dry_run(tmp_path, "--only", "norm")
    assert code == 1 and results["rows"]
    for row in results["rows"]:
        assert row["ms"]["ours"] > 0 and row["ratios"] and not any("graph" in name for name in row["ms"])
    assert "* absent: ours, graph: RuntimeError: operation not permitted" in table


def test_a_device_that_no_longer_answers_does_not_take_the_measured_rows_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run = BenchRun(Machine("cpu"), "reference", torch.bfloat16, 0.0, 5.0, tiny=True)
    monkeypatch.setattr(run.machine, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    run.row("conv", "layer", {}, Budget(60), lambda: {"error": 0.0})
    assert [row["error"] for row in run.rows] == [0.0]


def test_a_device_that_hangs_ends_the_run_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[object] = []
    monkeypatch.setattr(os, "_exit", log.append)
    run, ended = BenchRun(Machine("cpu"), "reference", torch.bfloat16, 0.0, 5.0, tiny=True), threading.Event()

    def give_up() -> None:
        command.when_it_hangs(run, lambda: log.append("written"))
        ended.set()

    run.row_limit, run.give_up = 0.01, give_up
    run.row("conv", "a layer", {"direction": "dgrad"}, Budget(60), lambda: {"hung": ended.wait(30)})
    assert log == ["written", 3]
    said = capsys.readouterr().out
    assert "the device does not answer in: conv, a layer, {'direction': 'dgrad'}; what was measured" in said
    run.row_limit = 0.1
    run.row("conv", "one that ends", {}, Budget(60), dict)
    time.sleep(0.2)
    assert log == ["written", 3]
    assert run.under_way == ""


def test_the_command_is_written_as_it_was_given(tmp_path: Path) -> None:
    _, results, table = dry_run(tmp_path, "--only", "norm", "--warm-processes", "0", "--seconds", "0")
    command = f"python -m bench.gpu --dry-run --out {tmp_path} --name here --only norm --warm-processes 0 --seconds 0"
    assert results["command"] == command and f"`{command}`" in table


def test_without_a_gpu_it_says_how_to_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().out
