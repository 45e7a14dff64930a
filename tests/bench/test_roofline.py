"""How well the roofline predicts a measured result: each row as the layer that it timed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import roofline
from bench.files import ROOT
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.ops import native
from tdc_fast.pruning.latency import Roofline, Setting

RESULT = ROOT / "bench" / "results" / "gpu-nvidia-h200.json"


def test_the_committed_result_has_a_line_for_every_width(capsys: pytest.CaptureFixture) -> None:
    assert roofline.main([str(RESULT)]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header == "| backend | predicted | width | times | rank correlation | median error |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(line[:2] == ["triton", "Triton's tiles"] for line in cells)
    assert [line[2] for line in cells] == ["100%", "75%", "50%", "all"]
    counts = [int(line[3]) for line in cells]
    assert sum(counts[:-1]) == counts[-1]


def test_a_row_is_the_layer_that_it_timed() -> None:
    row = {"layer": "CIFAR-10: B64 3-128 32x32 3x3 /2", "width": 0.5, "filter": 3, "stride": 2}
    batch, layer = roofline.layer_of(row)
    assert (batch, str(layer)) == (64, "conv2d 3-128 (64 live) 32x32 3x3 /2")
    assert layer.out_size == (16, 16)


H200 = Device(90, 132, 232448, "NVIDIA H200")
ROW = {
    "section": "conv", "direction": "forward", "uneven": False, "wrong": False, "num_groups": 8, "width": 0.5,
    "layer": "B128 256-256 16x16 3x3", "filter": 3, "stride": 1, "backend": "triton",
    "ms": {"ours, graph": 0.03, "hopper, graph": 0.02},
}  # fmt: skip


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
def test_a_time_is_predicted_in_the_form_that_its_backend_ran_in() -> None:
    _, layer = roofline.layer_of(ROW)
    setting = Setting(H200.name, "bfloat16", 128, 8)
    on_tiles = Roofline(setting, H200).nanoseconds(layer)
    in_form = Roofline(setting, H200, is_hopper=lambda problem: True).nanoseconds(layer)
    assert in_form != on_tiles
    assert roofline.times_of(ROW, "bfloat16", H200) == [
        roofline.Time("triton", "Triton's tiles", 0.5, on_tiles, 30000),
        roofline.Time("hopper", "Hopper form", 0.5, in_form, 20000),
    ]
    five = ROW | {"filter": 5, "backend": "hopper", "ms": {"ours, graph": 0.05}}  # which the form does not serve
    assert [(time.backend, time.form) for time in roofline.times_of(five, "bfloat16", H200)] == [
        ("hopper", "Triton's tiles")
    ]
    device = {"name": H200.name, "capability": "9.0", "multiprocessors": 132}
    lines = roofline.table_of({"device": device, "dtype": "bfloat16", "rows": [ROW, ROW | {"width": 1.0}, five]})
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        [f"| {backend}", form, width, times]
        for backend, form, of_width in (
            ("triton", "Triton's tiles", {"100%": "1", "50%": "1", "all": "2"}),
            ("hopper", "Hopper form", {"100%": "1", "50%": "1", "all": "2"}),
            ("hopper", "Triton's tiles", {"50%": "1", "all": "1"}),
        )
        for width, times in of_width.items()
    ]


def test_times_of_the_hopper_form_need_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    with pytest.raises(ValueError, match="result: got .*hopper.*; expected the native module to predict them"):
        roofline.times_of(ROW, "bfloat16", H200)


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = json.loads(RESULT.read_text())
    for change, said in (({"rows": []}, "result: got"), ({"device": {"name": "CPU (dry run)"}}, "device: got 'CPU")):
        (tmp_path / "result.json").write_text(json.dumps(result | change))
        assert roofline.main([str(tmp_path / "result.json")]) == 2
        assert said in capsys.readouterr().err
