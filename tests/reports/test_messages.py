"""What a training run says: its plan, a line per phase and per row with the time left, and what to do next."""

from __future__ import annotations

import csv
import re
import sys

import numpy as np

from tdc_fast import train
from tdc_fast.figures import new_figure
from tdc_fast.progress import Progress
from tdc_fast.pruning.plots import _robust_limits
from tdc_fast.training.messages import _short
from tdc_fast.training.telemetry import ProgressLog
from tests.training.small_run import TWO_STAGES, flags, small_config


def test_training_says_its_plan_its_phases_its_cost_and_what_to_do_next(tmp_path, capsys):
    config = small_config(tmp_path, **{**TWO_STAGES, "baseline_steps": 20})
    assert train.main(flags(config)) == 0
    run, said = tmp_path / "run", capsys.readouterr().out.splitlines()
    plan = said[: [line.startswith("base step") for line in said].index(True)]
    assert plan[0] == f"run directory: {run}"
    assert any(line.startswith("data:    20 images of ") and line.endswith("8x8x1") for line in plan)
    assert any(re.fullmatch(r"model:   [\d.]+ k parameters, [\d.]+ M MACs per image", line) for line in plan)
    assert "stage 1: 10 steps of 6 images" in plan
    assert "stage 2: 10 steps of 6 images over all experts" in plan
    assert any(line == "groups: 3 (uniform), boundaries 0, 20, 40, 60" for line in said)
    assert (
        sum(bool(re.match(r"widths: [\d.]+%, [\d.]+%, [\d.]+% of the base's MACs \(budgets ", line)) for line in said)
        == 1
    )
    assert sum(bool(re.match(r"cost:   stage1 .*, [\d.]+ of the baseline's$", line)) for line in said) == 1
    after = said[said.index(f"finished: {run}") :]
    assert f"pictures: {run / 'widths.png'}" in after and (run / "widths.png").is_file()
    for command in ("sample --run", "nll --run", "evaluate"):
        assert any(line.startswith(f"    python -m tdc_fast.{command} {run}") for line in after)


def test_rows_off_a_terminal_are_one_line_each_with_the_time_left(tmp_path, capsys):
    assert train.main(flags(small_config(tmp_path, lr_anneal_steps=9))) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("base step")]
    assert [re.match(r"base step (\d of 9 \(\d+%\)), loss [\d.]+, ", line).group(1) for line in said] == [
        "3 of 9 (33%)", "6 of 9 (67%)", "9 of 9 (100%)",
    ]  # fmt: skip
    assert [line.endswith(" left") for line in said] == [True, True, False]
    assert not any("mse" in line for line in said)


def test_rows_are_printed_wherever_the_output_goes_to_a_file_or_a_pipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # as in `train ... | tee log`
    for name, to_terminal in (("piped", False), ("shown", True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda to_terminal=to_terminal: to_terminal, raising=False)
        assert train.main(flags(small_config(tmp_path, name, lr_anneal_steps=3, progress="auto"))) == 0
        with Progress("drawing", 2, unit="image") as progress:
            progress.update(2)
        said = capsys.readouterr()
        assert ("base step 3 of 3" in said.out) is ("drawing: 100%" in said.out) is not to_terminal
        assert ("training base: 100%" in said.err) is ("image/s" in said.err) is to_terminal


def test_the_log_leaves_out_an_mse_that_repeats_the_loss_and_the_csv_has_everything(tmp_path, capsys):
    log = ProgressLog(tmp_path, 0)
    log.row({"step": 1, "loss": 0.5, "loss_q0": 0.25, "mse": 0.5, "mse_q0": 0.125, "vb": 0.5})
    log.close()
    assert capsys.readouterr().out == "step 1, loss 0.5, vb 0.5\n"
    text = (tmp_path / "log.txt").read_text()
    assert "| mse_q0 " in text and "| vb " in text and "| mse " not in text
    with open(tmp_path / "progress.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["mse"] == "0.5" and row["mse_q0"] == "0.125"


def test_a_picture_of_a_search_counts_the_points_that_it_cuts_off():
    figure, axes = new_figure(2, 2)
    scores = np.array([1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08, 1.09, 9.0])
    assert _robust_limits(axes[0, 0], scores) == int((scores > axes[0, 0].get_ylim()[1]).sum()) == 1
    assert _robust_limits(axes[0, 0], scores[:-1]) == 0


def test_large_numbers_are_short():
    assert [_short(n) for n in (7, 1234, 5_000_000, 2.5e12)] == ["7", "1.234 k", "5 M", "2.5 T"]
