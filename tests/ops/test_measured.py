"""The fastest backend, from the times that were measured on a device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import backend_times
from bench.files import ROOT
from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.problems import ConvProblem, NormProblem
from tdc_fast.ops import backends, measured

BF16, GPU = torch.bfloat16, torch.device("cuda")
NORM = NormProblem("routed_group_norm", GPU, BF16, 64, 64, 64, 256, 32, 1e-5, True, 8, 8)
CONV = ConvProblem("routed_conv2d", GPU, BF16, 64, 32, 32, 128, 128, (3, 3), (1, 1), (1, 1), 32, 32, 8, 8)
VERSIONS = measured.KERNEL_VERSIONS
RESULT = ROOT / "bench" / "results" / "gpu-nvidia-h200.json"


class StandIn:
    """A backend that serves everything."""

    def __init__(self, name: str, fuses: tuple[str, ...] = ("x2",)) -> None:
        self.name, self.fuses = name, fuses

    def supports(self, problem: Any) -> None:
        return None


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Problems on a GPU are on an H200, where Triton and CUDA serve everything, with the kernels that were measured."""
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(measured, "KERNEL_VERSIONS", dict.fromkeys(VERSIONS, 1))
    monkeypatch.setattr(backends, "_backends", [StandIn("triton"), StandIn("cuda"), StandIn("reference")])
    backends.forget()
    measured.load_times.cache_clear()
    yield
    backends.forget()
    measured.load_times.cache_clear()


def chosen(problem: Any) -> str:
    return backends.select(problem, "").name


def test_on_a_measured_device_the_fastest_is_the_one_that_was_measured(h200: None) -> None:
    """From bench/results/gpu-nvidia-h200.md: norm forward at 64x64 0.322 ms in CUDA, 0.204 in Triton, and so on."""
    backward = replace(NORM, op="routed_group_norm_backward")
    assert chosen(NORM) == "triton"
    assert chosen(backward) == "cuda"  # 0.305 against 0.378
    assert chosen(replace(NORM, height=32, width=32)) == "cuda"  # 0.041 against 0.059
    assert chosen(replace(NORM, height=4, width=4)) == "triton"  # 0.0101 against 0.0074
    assert chosen(CONV) == "triton"
    assert chosen(replace(CONV, in_channels=3)) == "cuda"  # 0.0577 against 0.0621
    wgrad = replace(CONV, op="routed_conv2d_wgrad", in_channels=256, filter=(1, 1), padding=(0, 0))
    assert chosen(wgrad) == "cuda"  # 0.0571 against 0.0689


def test_without_times_near_the_problem_the_usual_order_holds(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for far in (
        replace(NORM, batch=256), replace(NORM, channels=32), replace(NORM, dtype=torch.float32),
        replace(NORM, height=256, width=256), replace(NORM, batch=0),
    ):  # fmt: skip
        assert measured.times_near(far) is None and chosen(far) == "cuda"
    image = replace(CONV, in_channels=3)
    assert chosen(replace(image, num_groups=64)) == chosen(replace(image, stride=(2, 1))) == "triton"
    assert chosen(replace(image, filter=(5, 5))) == "triton"
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA A100")
    assert chosen(NORM) == "cuda" and chosen(image) == "triton"


def test_times_of_kernels_that_changed_since_do_not_count(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is of the first norm kernels, of which CUDA's took 0.322 ms where Triton's took 0.204."""
    assert chosen(NORM) == "triton"
    monkeypatch.setattr(measured, "KERNEL_VERSIONS", VERSIONS)
    measured.load_times.cache_clear()
    for norm in (NORM, replace(NORM, op="routed_group_norm_backward"), replace(NORM, height=4, width=4)):
        assert measured.times_near(norm) is None and chosen(norm) == "cuda"
    # Bias gradients had launches of their own.
    wgrad = replace(CONV, op="routed_conv2d_wgrad", in_channels=256, filter=(1, 1), padding=(0, 0))
    assert measured.times_near(wgrad) is None and chosen(wgrad) == "triton"
    # Image channels have kernels of their own since; the other convolutions count.
    for conv in (CONV, replace(CONV, op="routed_conv2d_dgrad")):
        assert measured.times_near(conv) is not None
        for few in (replace(conv, in_channels=3), replace(conv, out_channels=6)):
            assert measured.times_near(few) is None


def test_the_nearest_row_counts_and_rows_of_one_shape_by_their_mean(tmp_path: Path, h200: None, monkeypatch) -> None:
    row = {"op": "routed_group_norm", "dtype": "bfloat16", "batch": 64, "pixels": 4096}
    rows = [
        {**row, "channels": 256, "ms": {"cuda": 1.0, "triton": 2.0}},
        {**row, "channels": 256, "ms": {"cuda": 4.0, "triton": 1.0}},
        {**row, "channels": 384, "ms": {"cuda": 1.0, "triton": 0.985}},  # less than 2 percent: noise
    ]
    table = {"kernels": measured.KERNEL_VERSIONS, "date": "today", "rows": rows}
    (tmp_path / "nvidia_h200.backends.json").write_text(json.dumps(table))
    monkeypatch.setattr(tile_shapes, "TUNED", tmp_path)
    measured.load_times.cache_clear()
    times = measured.times_near(replace(NORM, channels=288))
    assert times is not None and times.ms == {"cuda": 2.5, "triton": 1.5}
    assert times.order(("cpu", "cuda", "triton", "reference")) == ("cpu", "triton", "cuda", "reference")
    assert chosen(replace(NORM, channels=384)) == "cuda"
    measured.load_times.cache_clear()


def test_a_backend_that_copies_first_is_not_faster_for_its_kernel(h200: None, monkeypatch) -> None:
    """The times are those of one input."""
    two = replace(NORM, x2_channels=128)
    assert chosen(two) == "triton"
    copying = [StandIn("triton", fuses=()), StandIn("cuda"), StandIn("reference")]
    monkeypatch.setattr(backends, "_backends", copying)
    assert chosen(two) == "cuda" and chosen(NORM) == "triton"
    said = backends.explain_problem("routed_group_norm", two)  # that Triton's kernel is faster did not decide
    assert said.backend == "cuda" and said.because == "the fastest that supports the call, in the usual order"


def test_an_upsampled_image_takes_the_usual_order(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends have ways of their own for it, which the time of a convolution of the larger image is not that of."""
    everything = [StandIn(name, ("x2", "upsample")) for name in ("triton", "cuda", "reference")]
    monkeypatch.setattr(backends, "_backends", everything)
    image = replace(CONV, in_channels=3)
    small = replace(image, height=16, width=16, upsample=2)
    assert chosen(image) == "cuda" and chosen(small) == "triton"
    assert measured.times_near(replace(CONV, x2_channels=64)) == measured.times_near(CONV) is not None


def test_times_of_a_form_that_does_not_serve_two_inputs_do_not_count(tmp_path: Path, h200: None, monkeypatch) -> None:
    class Forms(StandIn):
        def form(self, problem: Any) -> str:
            return "portable" if problem.fused else "special"

    row = {"op": "routed_conv2d", "dtype": "bfloat16", "filter": 3, "stride": 1, "batch": 64, "pixels": 1024}
    row |= {"in_channels": 128, "out_channels": 128, "num_groups": 8, "ms": {"hopper": 1.0, "triton": 2.0, "cuda": 1.5}}
    table = {"kernels": measured.KERNEL_VERSIONS, "date": "today", "rows": [row]}
    (tmp_path / "nvidia_h200.backends.json").write_text(json.dumps(table))
    monkeypatch.setattr(tile_shapes, "TUNED", tmp_path)
    monkeypatch.setattr(backends, "_backends", [StandIn("triton"), StandIn("cuda"), Forms("hopper")])
    measured.load_times.cache_clear()
    assert chosen(CONV) == "hopper" and chosen(replace(CONV, x2_channels=64)) == "cuda"
    measured.load_times.cache_clear()


def test_explain_names_every_shape_whose_times_were_averaged(h200: None) -> None:
    between = replace(NORM, height=16, width=32)  # as far from 16x16 as from 32x32
    assert (
        "at 64 images of 1024 pixels, 256 channels and 64 images of 256 pixels, 256 channels, on average: "
        in backends.explain_problem("routed_group_norm", between).because
    )


def test_explain_says_what_decided(h200: None) -> None:
    times = backends.explain_problem("routed_group_norm", NORM)
    assert times.because == (
        "the fastest that supports the call, measured on NVIDIA H200, 2026-11-26, at 64 images of 4096 pixels, 256 "
        "channels: triton 0.2039 ms, cuda 0.3224 ms"
    )
    assert list(times.reasons) == ["triton", "cuda", "reference"]
    far = backends.explain_problem("routed_group_norm", replace(NORM, batch=256))
    assert far.because == "the fastest that supports the call, in the usual order"
    named = backends.explain_problem("routed_group_norm", NORM, "cuda")
    assert named.backend == "cuda" and named.because == "backend='cuda'"


def test_the_committed_table_is_the_one_of_the_committed_result(tmp_path: Path) -> None:
    assert backend_times.main([str(RESULT), "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.iterdir()
    assert written.read_text() == (ROOT / "kernels" / "tuned" / written.name).read_text()


def test_a_result_says_which_kernels_it_measured() -> None:
    """The table says the same, whatever the kernels are by then; the first results, which do not say, had the first."""
    old = json.loads(RESULT.read_text())
    assert set(backend_times.table_of(old)["kernels"].values()) == {1}
    assert backend_times.table_of({**old, "kernels": {"routed_conv2d": 7}})["kernels"] == {"routed_conv2d": 7}
    assert set(backend_times.OPERATORS.values()) == {key.partition(",")[0] for key in VERSIONS}


def test_a_dry_run_gives_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "dry.json"
    result.write_text(json.dumps({**json.loads(RESULT.read_text()), "dry_run": True}))
    assert backend_times.main([str(result), "--out", str(tmp_path)]) == 2
    assert "error: result: got 'a dry run'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dry.json"]
