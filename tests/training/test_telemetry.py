"""Rows: means per quartile and per group, and a progress.csv that is only ever appended to."""

from __future__ import annotations

import json

import pytest
import torch

from tdc_fast.training.telemetry import ProgressLog, RunningMeans

CPU = torch.device("cpu")


def test_means_are_over_all_samples_since_the_last_row_per_quartile_and_group():
    means = RunningMeans(2, CPU)
    means.add({"loss": torch.tensor([1.0, 2.0])}, torch.tensor([0, 3]), torch.tensor([0, 1]))
    means.add({"loss": torch.tensor([3.0])}, torch.tensor([0]), torch.tensor([0]))
    means.add_gradient_norm(torch.tensor(4.0))
    means.add_gradient_norm(torch.tensor(8.0))
    row = means.take()
    assert row["grad_norm"] == 6.0
    assert [row[f"loss{s}"] for s in ("", "_q0", "_q1", "_q2", "_q3", "_g0", "_g1")] == [
        2.0,
        2.0,
        None,
        None,
        2.0,
        2.0,
        2.0,
    ]
    assert means.take()["loss"] is None


def test_group_weights_undo_stratified_drawing():
    means = RunningMeans(2, CPU, group_weights=[0.9, 0.1])
    means.add({"loss": torch.tensor([1.0, 11.0])}, torch.tensor([0, 3]), torch.tensor([0, 1]))
    assert means.take()["loss"] == pytest.approx(0.9 * 1 + 0.1 * 11)


def test_means_continue_from_their_state():
    one, other = RunningMeans(1, CPU), RunningMeans(1, CPU)
    batch = ({"loss": torch.tensor([0.1, 0.7])}, torch.tensor([1, 2]), torch.tensor([0, 0]))
    one.add(*batch)
    other.load_state_dict(one.state_dict())
    for means in (one, other):
        means.add(*batch)
    assert one.take() == other.take()


def log_rows(directory, step, values, **options):
    log = ProgressLog(directory, step, quiet=True, **options)
    for value in values:
        log.row({"step": value, "loss": value / 2, "vb": None})
    log.sync()
    log.close()


def test_a_new_log_has_a_header_and_one_line_per_row(tmp_path):
    log_rows(tmp_path, 0, [10, 20])
    assert (tmp_path / "progress.csv").read_text() == "step,loss,vb\n10,5.0,\n20,10.0,\n"


def test_a_resumed_log_drops_rows_after_the_checkpoint_and_half_rows_and_keeps_the_rest(tmp_path):
    log_rows(tmp_path, 0, [10, 20, 30])
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("40,2")  # the process died here
    log_rows(tmp_path, 20, [30])
    assert (tmp_path / "progress.csv").read_text() == "step,loss,vb\n10,5.0,\n20,10.0,\n30,15.0,\n"
    assert "resumed at step 20" in (tmp_path / "log.txt").read_text()


def test_columns_that_first_appear_later_are_added_to_the_file(tmp_path):
    log_rows(tmp_path, 0, [10, 20])
    log = ProgressLog(tmp_path, 20)
    for step in (30, 40):
        log.row({"step": step, "vb": 2.0, "mfu": 0.5})
    log.row({"step": 50, "loss": 1.0, "lr": 0.1})
    log.close()
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    assert header == "step,loss,vb,mfu,lr"
    assert rows == ["10,5.0,,,", "20,10.0,,,", "30,,2.0,0.5,", "40,,2.0,0.5,", "50,1.0,,,0.1"]
    ProgressLog(tmp_path, 30).close()
    assert (tmp_path / "progress.csv").read_text().splitlines() == [header, *rows[:3]]


@pytest.mark.parametrize("content", [b"step,loss\nten,5.0\n", b"loss\n5.0\n", b"\xff\xfe\n"])
def test_a_damaged_log_is_refused_by_name_when_a_run_goes_on(tmp_path, content):
    (tmp_path / "progress.csv").write_bytes(content)
    with pytest.raises(ValueError, match="run_dir: got '.*progress.csv'; expected .*move it away"):
        ProgressLog(tmp_path, 10)
    assert (tmp_path / "progress.csv").read_bytes() == content


def test_openai_log_format_chooses_what_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,json")
    log = ProgressLog(tmp_path, 0)
    log.row({"step": 1, "loss": 0.25})
    log.close()
    assert capsys.readouterr().out == "step 1, loss 0.25\n"
    assert json.loads((tmp_path / "progress.json").read_text()) == {"step": 1, "loss": 0.25}
    assert not (tmp_path / "progress.csv").exists()
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,xml")
    with pytest.raises(ValueError, match="OPENAI_LOG_FORMAT"):
        ProgressLog(tmp_path, 0)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(tmp_path, 0, [3, 6], tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.5), (6, 3.0)]
