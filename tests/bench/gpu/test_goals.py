"""Goals of the GPU bench: which rows they are about, and when they are met."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.gpu import step, train_run
from bench.gpu.conv import SUMS
from bench.gpu.goals import judge
from bench.gpu.report import _goal_table
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun
from bench.gpu.sampling import FORWARDS
from bench.gpu.timing import Machine
from bench.gpu.train_run import CAPTURED, RUN, STAGE1
from bench.gpu.unet import COMPILED

LABELS = ("section", "layer", "direction", "width", "num_groups", "uneven")  # all that a row has that failed
CONFIG = SimpleNamespace(mixed_precision=None)


def row(section: str, direction: str, width: float = 1.0, **ms: float) -> dict:
    """A row of the design's size with these times; underscores in names stand for ", "."""
    times = {name.replace("_", ", "): value for name, value in ms.items()}
    ratios = {name: times["ours"] / value for name, value in times.items() if not name.startswith("ours")}
    return {
        "section": section, "layer": "x", "direction": direction, "width": width, "num_groups": 8, "uneven": False,
        "filter": 3, "stride": 1, "channels": [128, 128], "ms": times, "ratios": ratios, "wrong": False,
        "error": 0.0, "absent": {}, "source": "design", "megabytes": 1.0, "size": [16, 16],
    }  # fmt: skip


def test_goals_are_met_or_missed_by_the_rows_they_are_about() -> None:
    rows = [
        row("unet", "forward", ours=5.0, ours_graph=3.0, dense=4.0, loop=9.0, loop_graph=5.9, **{COMPILED: 4.0}),
        row("unet", "training step", ours=10.0, ours_graph=10.0, dense=9.0, loop=16.0, loop_graph=15.0),
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=1.05),
        row("conv", "wgrad", ours=1.0, ours_graph=1.0, dense_graph=0.95),
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=0.5) | {"stride": 2, "channels": [3, 128]},
        row("conv", "dgrad", width=0.5, ours=1.0) | {"ratios": {"full width, graph": 0.3}},
        row("conv", "dgrad", width=0.75, ours=1.0) | {"ratios": {"full width, graph": 0.63}},
        row("conv", "dgrad", width=0.5, ours=1.0) | {"ratios": {"full width, graph": 0.6}, "source": "CIFAR-10"},
        *(
            row("group norm", direction) | {"megabytes": megabytes, "net_of_copy": of_copy, "size": [32, 32]}
            for direction in ("forward", "backward")
            for megabytes, of_copy in ((33.6, 0.74), (32.0, 0.76), (16.8, 0.61), (8.4, 0.51), (4.2, 0.1))
        ),
        row("group norm", "forward") | {"megabytes": 0.5, "net_us": 2.9, "size": [4, 4]},
        row("group norm", "backward") | {"megabytes": 2.1, "net_us": 3.2, "size": [8, 8]},
        row(SUMS, "forward", ours_graph=1.8) | {"source": "CIFAR-10"},
        row(SUMS, "wgrad", ours_graph=7.6) | {"source": "ImageNet64"},
    ]
    run = row("training", RUN, **{OURS: 31.6, STAGE1: 25.0, CAPTURED: 30.0})
    rows.append(run | {"steps_per_s": {name: 1e3 / ms for name, ms in run["ms"].items()}})
    rows.append(row("sampling", "DDIM-50 of 64 images", **{OURS: 108.0, FORWARDS: 100.0}))
    rows += [
        r | other for r in rows for other in ({"num_groups": 16}, {"uneven": True}) if r["section"] in ("unet", "conv")
    ]
    verdicts = {v["goal"]: v for v in judge(rows)}
    met = {name: (v["met"], v["rows"]) for name, v in verdicts.items()}
    cudnn = "3x3 layers, N = 8: speed of dense cuDNN, forward, both in a graph"
    assert met == {
        "UNet forward, N = 8, graphs: time / compiled dense": (1, 1),  # 3 / 4
        "UNet forward, N = 8, graphs: the same, further goal": (0, 1),
        "UNet training step, N = 8, graphs: time / compiled dense": (0, 0),
        "tdc_fast.train, stage 2: time / captured step": (0, 1),  # 31.6 / 30
        "tdc_fast.train, stage 2: steps per second (H200)": (1, 1),  # 1000 / 31.6
        "tdc_fast.train, stage 1: steps per second (H200)": (0, 1),  # 1000 / 25
        "Sampling, DDIM-50: time / 50 captured forwards": (1, 1),
        "UNet forward, N = 8: time / dense, both eager": (0, 1),  # 5 / 4
        "UNet forward, N = 8: in a graph / dense, eager": (1, 1),  # 3 / 4
        "UNet forward, N = 8: best loop peer / ours at best": (0, 1),  # 5.9 / 3
        "UNet training step, N = 8: best loop peer / ours": (1, 1),
        cudnn: (1, 2),
        cudnn.replace("forward", "dgrad"): (0, 0),
        cudnn.replace("forward", "wgrad"): (0, 1),
        "Large convolutions at 50% widths, N = 8: cost / full width": (1, 1),
        "Large convolutions at 75% widths, N = 8: cost / full width": (0, 1),
        "UNet forward at 50% widths, graphs: (time / full width) / share of MACs": (0, 0),
        "Convolutions, half of the batch in one of 8 groups: time / even groups": (3, 3),
        "UNet, 64 experts: time / 8 experts, graphs": (0, 0),
        **{name: (0, 0) for name in verdicts if "sum of its convolutions" in name},
        "CIFAR-10, sum of its convolutions, forward: ms less an empty launch each (H200)": (1, 1),
        "ImageNet64, sum of its convolutions, wgrad: ms less an empty launch each (H200)": (0, 1),
        "Group norm forward, 32 MB and more: bandwidth less an empty launch / copy": (1, 2),
        "Group norm forward, 8 to 32 MB: bandwidth less an empty launch / copy": (1, 2),
        "Group norm backward, 32 MB and more: bandwidth less an empty launch / copy": (2, 2),
        "Group norm backward, 8 to 32 MB: bandwidth less an empty launch / copy": (2, 2),
        "Group norm, 4x4 to 8x8: microseconds less an empty launch (H200)": (1, 2),
    }
    assert verdicts[cudnn]["worst"] == 0.5
    assert [miss["value"] for miss in verdicts[cudnn]["missed"]] == [0.5]
    rows[2]["wrong"] = True
    assert next(v for v in judge(rows) if v["goal"].startswith("3x3"))["rows"] == 1, "a wrong row is no proof"


def test_a_row_is_compared_with_its_like_of_even_groups_or_eight_experts() -> None:
    rows = [
        row("conv", "dgrad", ours=1.0, ours_graph=1.0),
        row("conv", "dgrad", ours=1.0, ours_graph=1.2) | {"uneven": True},
        row("conv", "wgrad", ours=1.0, ours_graph=2.0) | {"uneven": True},  # whose like was not measured
        row("growth", "forward", ours_graph=4.0),
        row("growth", "forward", ours_graph=4.2) | {"num_groups": 64},
        row("growth", "training step", ours_graph=4.0),
        row("growth", "training step", ours_graph=4.8) | {"num_groups": 64},
        row("unet", "forward", width=0.5, ours=1.0) | {"ratios": {"full width, graph": 0.375}, "share_of_macs": 0.3125},
    ]
    found = {v["goal"]: (v["met"], v["rows"], v["worst"]) for v in judge(rows)}
    assert found["Convolutions, half of the batch in one of 8 groups: time / even groups"] == (0, 1, 1.2)
    assert found["UNet, 64 experts: time / 8 experts, graphs"] == (1, 2, 1.2)
    assert found["UNet forward at 50% widths, graphs: (time / full width) / share of MACs"] == (0, 1, 1.2)


def test_a_goal_is_open_while_a_row_that_it_is_about_failed() -> None:
    rows = [
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=1.05),
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=1.05) | {"wrong": True},
        {key: row("conv", "forward")[key] for key in LABELS} | {"failed": "RuntimeError: no"},
        {key: row("conv", "dgrad")[key] for key in LABELS} | {"failed": "RuntimeError: no"},
        row("conv", "wgrad", ours=1.0, ours_graph=1.0, dense_graph=0.9),
        {key: row("conv", "wgrad", width=0.5)[key] for key in LABELS} | {"failed": "RuntimeError: no"},
    ]
    verdicts = judge(rows)
    of_cudnn = [(v["met"], v["rows"], v["failed"]) for v in verdicts if v["goal"].startswith("3x3")]
    assert of_cudnn == [(1, 1, 2), (0, 0, 1), (0, 1, 0)]
    lines = [line for line in _goal_table(verdicts) if line.startswith("| 3x3")]
    assert [line.split(" | ")[2] for line in lines] == ["open, 2 failed", "open, 1 failed", "missed"]


@pytest.mark.parametrize("other", [{"width": 0.75}, {"wrong": True}, {"batch": 128}])
def test_a_run_is_compared_with_the_captured_step_of_whole_experts(
    other: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run and the recipe are made up; the rest is the function that makes the row."""
    run = BenchRun(Machine("cpu"), "reference", torch.bfloat16, 0.0, 0.0, tiny=True)
    step_row = row("training", step.WHOLE, ours=40.0, ours_graph=25.0) | {"batch": 64}
    failed = {key: step_row[key] for key in LABELS} | {"failed": "RuntimeError: no"}
    run.rows += [failed, step_row | other | {"ms": {OURS_GRAPH: 1.0}}, step_row]
    monkeypatch.setattr(train_run, "train", lambda *_, **__: None)
    monkeypatch.setattr(train_run, "ms_per_step", lambda log: 25.0 if "base" in log.parts else 26.0)
    monkeypatch.setattr(train_run.step, "Problem", lambda *_: SimpleNamespace(base=0, diffusion=0, config=CONFIG))
    monkeypatch.setattr(train_run, "Recipe", lambda *_, **__: SimpleNamespace(steps_per_second=lambda *_, **__: 10.0))
    found = train_run.row_of(run, {"image_size": 8}, 64, 60.0, None)
    assert found["ms"] == {OURS: 26.0, STAGE1: 25.0, step.RECIPE: 100.0, CAPTURED: 25.0}
    assert found["ratios"] == {step.RECIPE: 0.26, CAPTURED: 1.04}
    assert found["steps_per_s"][OURS] == 1000 / 26 and found["steps_per_s"][STAGE1] == 40.0
