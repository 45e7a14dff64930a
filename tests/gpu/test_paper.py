"""The study of one's own images on a GPU: in bf16, from graphs, measured where it was trained."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.paper.sizing import Pace, Paces
from tdc_fast.runs.loading import load_run
from tests.bench import small_study

pytestmark = pytest.mark.gpu


def test_the_study_of_images_trains_in_bf16_from_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = small_study.options_in(tmp_path, "cuda", num_channels=32, batch_size=32)
    paces = {key: Pace(0.01, 1.0) for key in small_study.TRAINED}
    small_study.run(options, Paces(Pace(0.01, 1.0), paces, 1.0, 1.0, 1.0))
    assert [record.message for record in caplog.records if record.name == "tdc_fast.graphs"] == []
    assert (tmp_path / "out" / "report.html").is_file()
    for key in small_study.TRAINED:
        run = load_run(tmp_path / "out" / "runs" / "seed0" / key)
        assert run.config.precision == "bf16" and run.config.device == "cuda"
        stage = run.path / ("experts" if run.config.groups else "")
        rows = list(csv.DictReader((stage / "progress.csv").read_text().splitlines()))
        assert float(rows[-1]["wall_mfu"]) > 0
