"""How well the roofline predicts a measured result: each row as the layer that it timed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import roofline
from bench.files import ROOT

RESULT = ROOT / "bench" / "results" / "gpu-nvidia-h200.json"


def test_the_committed_result_has_a_line_for_every_width(capsys: pytest.CaptureFixture) -> None:
    assert roofline.main([str(RESULT)]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header == "| width | rows | rank correlation | median error |"
    assert [line.split("|")[1].strip() for line in lines] == ["100%", "75%", "50%", "all"]
    counts = [int(line.split("|")[2]) for line in lines]
    assert sum(counts[:-1]) == counts[-1]


def test_a_row_is_the_layer_that_it_timed() -> None:
    row = {"layer": "CIFAR-10: B64 3-128 32x32 3x3 /2", "width": 0.5, "filter": 3, "stride": 2}
    batch, layer = roofline.layer_of(row)
    assert (batch, str(layer)) == (64, "conv2d 3-128 (64 live) 32x32 3x3 /2")
    assert layer.out_size == (16, 16)


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = json.loads(RESULT.read_text())
    for change, said in (({"rows": []}, "result: got"), ({"device": {"name": "CPU (dry run)"}}, "device: got 'CPU")):
        (tmp_path / "result.json").write_text(json.dumps(result | change))
        assert roofline.main([str(tmp_path / "result.json")]) == 2
        assert said in capsys.readouterr().err
