"""Samples per second and the share of the matrix rate: their arithmetic, and where progress shows them."""

from __future__ import annotations

import csv

import pytest
import torch

from tdc_fast.distributed.world import World, as_world
from tdc_fast.train import train
from tdc_fast.training import throughput
from tdc_fast.training.throughput import Throughput, matrix_rate, throughput_on
from tests.training.small_run import small_config


def test_the_rates_are_those_since_the_last_row(monkeypatch):
    now = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    rates = Throughput(matrix_rate=1000.0)
    rates.start(100, 5000)
    assert rates.columns(140, 5500) == {"wall_samples_per_second": 20.0, "wall_mfu": 0.5}  # 2 * 500 MACs in 2 s
    assert rates.columns(150, 5500) == {"wall_samples_per_second": 2.5, "wall_mfu": 0.0}


def test_the_matrix_rate_is_measured_once_and_draws_from_no_generator_of_torch():
    before = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32, 48)
    assert 1e6 < rate < 1e15 and matrix_rate(torch.device("cpu"), torch.float32, 48) == rate
    assert torch.equal(torch.get_rng_state(), before)
    assert throughput_on(torch.device("cpu"), torch.float32) is None


def test_the_samples_of_several_processes_are_measured_by_the_rate_of_all_their_devices(monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: 1000.0)
    with as_world(World(rank=0, size=4)):
        rates = throughput_on(torch.device("cuda", 0), torch.bfloat16)
    rates.start(0, 0)
    assert rates.columns(40, 2000) == {"wall_samples_per_second": 20.0, "wall_mfu": 0.5}  # 2 * 2000 MACs in 2 s


@pytest.mark.parametrize("measured", [True, False])
def test_progress_shows_the_rates_where_they_are_measured(tmp_path, monkeypatch, capsys, measured):
    if measured:
        monkeypatch.setattr("tdc_fast.training.loop.throughput_on", lambda device, dtype: Throughput(1e9))
    run = train(small_config(tmp_path, lr_anneal_steps=3))
    with open(run.path / "progress.csv", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert ("wall_mfu" in row) == measured
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base step 3"))
    assert ("samples/s, MFU " in printed) == measured
    if measured:
        assert float(row["wall_samples_per_second"]) > 0 and float(row["wall_mfu"]) > 0


@pytest.mark.gpu
def test_the_matrix_rate_of_a_gpu_is_one_of_gpus():
    assert 1e13 < matrix_rate(torch.device("cuda", 0), torch.bfloat16) < 1e16
