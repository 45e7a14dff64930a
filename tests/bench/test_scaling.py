"""The times on paper: the formula gives back what was measured, and the page shows what it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import scaling
from bench.scaling import Network, StepTimes, all_reduce, stage1, stage2

MEASURED = Network(parameters=52_546_000, macs=8_387_000_000)
TIMES = StepTimes.of(MEASURED, MEASURED)


def test_the_formula_gives_back_the_measured_steps():
    assert TIMES.computing(64, 8) == pytest.approx(26.6)
    assert TIMES.computing(128, 8) == pytest.approx(38.5)
    assert TIMES.computing(64, 0) == pytest.approx(17.956)


def test_a_ring_sends_nothing_alone_and_nearly_twice_the_gradients_among_many():
    assert all_reduce(10**9, 1) == 0
    assert all_reduce(10**9, 8) == pytest.approx(7 / 4 * 4e9 / 450e9 * 1e3)
    assert all_reduce(10**9, 64) == pytest.approx(63 / 32 * 4e9 / 50e9 * 1e3)


def test_what_is_sent_counts_only_where_the_backward_does_not_hide_it():
    few, many = (stage1(TIMES, MEASURED, images * 64, 64) for images in (2, 64))
    assert few.exposed > 0 and many.exposed == 0 and few.megabytes == many.megabytes
    assert few.milliseconds == pytest.approx(TIMES.computing(2) + few.exposed)


def test_stage_2_sends_nothing_up_to_a_gpu_for_each_expert():
    for gpus in (1, 8, 10):
        assert stage2(TIMES, MEASURED, 128, gpus, 10).megabytes == 0
    assert stage2(TIMES, MEASURED, 128, 8, 10).milliseconds == pytest.approx(TIMES.computing(25.6, 2))
    assert stage2(TIMES, MEASURED, 128, 20, 10).megabytes == pytest.approx(4 * MEASURED.parameters / 1e6)


def test_the_page_shows_these_tables():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for per_gpu in (0, 64):
        assert scaling.table(per_gpu, ["cifar10"]) in page
