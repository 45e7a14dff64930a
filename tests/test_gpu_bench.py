"""The GPU bench runs from end to end (on the CPU, with tiny shapes), compares equal things, and judges its goals."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_conv, gpu_peers, gpu_report, profile_gpu
from bench.gpu_layers import UNETS, ConvLayer, design_layers, unet_layers
from bench.gpu_rows import Run
from bench.gpu_timing import Budget, Machine, TookTooLong, at_most


def dry_run(folder: Path, *arguments: str) -> tuple[int, dict, str]:
    code = gpu.main(["--dry-run", "--out", str(folder), "--name", "here", *arguments])
    return code, json.loads((folder / "here.json").read_text()), (folder / "here.md").read_text()


def test_a_dry_run_times_every_section_and_peer(tmp_path: Path) -> None:
    code, results, table = dry_run(tmp_path)
    assert code == 0
    rows = results["rows"]
    assert {row["section"] for row in rows} == {"unet", "conv", "group norm"}
    for row in rows:
        assert row["rounds"] >= 1 and all(value > 0 for value in row["ms"].values())
        assert {"ours", "ours, graph"} <= row["ms"].keys() or row["direction"].endswith("AdamW")
        assert row["ratios"] and row["error"] < (0.1 if row["section"] == "unet" else 0.02)
        assert set(row["absent"]) <= {"grouped_mm"}, "only im2col may refuse a shape"
    peers = {name for row in rows if row["section"] == "conv" for name in row["ratios"]}
    loops = {"loop", "loop, graph", "streams", "streams, graph", "compiled loop"}
    assert peers == loops | {"dense", "dense, graph", "grouped_mm", "full width, graph"}
    assert {(r["num_groups"], r["uneven"], r["width"], r["direction"]) for r in rows if r["section"] == "conv"} == {
        *itertools.product((4, 8, 16), (False, True), (1.0, 0.75, 0.5), gpu_conv.DIRECTIONS),
        *itertools.product((1,), (False,), (1.0, 0.75, 0.5), gpu_conv.DIRECTIONS),
    }
    for goal in results["goals"]:
        assert goal["rows"] > 0 and f"| {goal['goal']} |" in table
    assert table.count("| tiny") + table.count("| design") == len(rows)
    assert "A dry run" in table and not results["not_run"]


def test_what_there_was_no_time_for_is_counted(tmp_path: Path) -> None:
    code, results, table = dry_run(tmp_path, "--seconds", "0")
    assert code == 0 and not results["rows"]
    assert set(results["not_run"]) == {"unet", "conv", "group norm"}
    assert "not run for want of time" in table and "not measured" in table


def test_a_failing_row_is_kept_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        """As Triton's: no RuntimeError."""

    def broken(*_: object) -> dict:
        raise OutOfResources("conv_forward: out of registers")

    monkeypatch.setattr(gpu_conv, "row_of", broken)
    code, results, table = dry_run(tmp_path, "--only", "conv")
    assert code == 1 and all("out of registers" in row["failed"] for row in results["rows"])
    assert "* failed: conv" in table


def test_a_capture_of_ours_that_fails_costs_no_more_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Machine, "captured", captured)
    code, results, table = dry_run(tmp_path, "--only", "unet", "norm")
    assert code == 1 and results["rows"]
    for row in results["rows"]:
        assert row["ms"]["ours"] > 0 and row["ratios"] and not any("graph" in name for name in row["ms"])
    assert "* absent: ours, graph: RuntimeError: operation not permitted" in table


def test_a_device_that_no_longer_answers_does_not_take_the_measured_rows_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run = Run(Machine("cpu"), "reference", torch.bfloat16, 0.0, 5.0, tiny=True)
    monkeypatch.setattr(run.machine, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    run.row("conv", "layer", {}, Budget(60), lambda: {"error": 0.0})
    assert [row["error"] for row in run.rows] == [0.0]


def test_a_device_that_hangs_ends_the_run_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[object] = []
    monkeypatch.setattr(os, "_exit", log.append)
    timer = gpu.when_it_hangs(time.monotonic(), lambda: log.append("written"))
    timer.start()
    timer.join(10)
    assert log == ["written", 3] and "does not answer" in capsys.readouterr().out


def test_the_command_is_written_as_it_was_given(tmp_path: Path) -> None:
    _, results, table = dry_run(tmp_path, "--only", "norm", "--warm-processes", "0", "--seconds", "0")
    command = f"python -m bench.gpu --dry-run --out {tmp_path} --name here --only norm --warm-processes 0 --seconds 0"
    assert results["command"] == command and f"`{command}`" in table


def test_without_a_gpu_it_says_how_to_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().out


def test_the_unets_layers_are_those_of_the_published_models() -> None:
    """GMACs of all convolutions per image, which the models' published totals include."""
    for name, gmacs in (("CIFAR-10", 8.13), ("ImageNet64", 39.34)):
        convs, norms = unet_layers(name, UNETS[name], batch=64)
        assert sum(layer.uses * layer.flops() for layer in convs) / 64 / 2e9 == pytest.approx(gmacs, abs=0.01)
        assert len(set(convs)) == len(convs) and len(set(norms)) == len(norms)
        assert {(layer.filter, layer.stride) for layer in convs} == {(3, 1), (3, 2), (1, 1)}
    assert design_layers()[0].flops() == 2 * 128 * 32 * 32 * 9 * 128 * 128


def test_every_combination_is_a_case_once_and_the_goals_come_first() -> None:
    design, models = design_layers(), unet_layers("CIFAR-10", UNETS["CIFAR-10"], 64)[0]
    cases = list(gpu_conv.cases(design, models))
    assert len(set(cases)) == len(cases) == (len(design) + len(models)) * 7 * 3 * 3
    first = cases[: len(design) * 9 + len(models) * 4]
    assert all(case.num_groups == 8 and not case.uneven for case in first)
    goals = first[len(design) * 9 : len(design) * 9 + len(models) * 2]
    assert {(case.layer, case.width) for case in goals} == {*itertools.product(models, (1.0, 0.5))}
    assert {case.direction for case in goals} == {"forward"}


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("num_groups", [1, 4, 8, 16])
def test_groups_share_out_the_batch(num_groups: int, uneven: bool) -> None:
    sizes = gpu_peers.group_sizes(64, num_groups, uneven=uneven)
    assert len(sizes) == num_groups and sum(sizes) == 64
    assert sizes[0] == (32 if uneven and num_groups > 1 else 64 // num_groups)


@pytest.mark.parametrize("layer", [ConvLayer("a", 5, 8, 16, 6, 6), ConvLayer("b", 5, 8, 8, 6, 6, 3, 2)], ids=str)
def test_im2col_and_a_grouped_product_are_the_same_convolution(layer: ConvLayer) -> None:
    run = Run(Machine("cpu"), "reference", torch.bfloat16, 0.0, 5.0, tiny=True)
    problem = gpu_conv.Problem(run, gpu_conv.Case(layer, 3, True, 1.0, "forward"))
    rows = gpu_peers.grouped_matmul(problem.x, problem.weight, problem.sizes, layer.stride)()
    problem.bias.zero_()
    expected = torch.cat([call() for call in problem.segments()])
    actual = rows.view(layer.batch, *layer.out_size, layer.out_channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def row(section: str, direction: str, width: float = 1.0, **ms: float) -> dict:
    """A row of the design's size with these times; dashes in names stand for ", "."""
    times = {name.replace("_", ", "): value for name, value in ms.items()}
    ratios = {name: times["ours"] / value for name, value in times.items() if not name.startswith("ours")}
    return {
        "section": section, "layer": "x", "direction": direction, "width": width, "num_groups": 8, "uneven": False,
        "filter": 3, "stride": 1, "channels": [128, 128], "ms": times, "ratios": ratios, "wrong": False,
        "error": 0.0, "absent": {}, "of_copy": 0.9,
    }  # fmt: skip


def test_goals_are_met_or_missed_by_the_rows_they_are_about() -> None:
    rows = [
        row("unet", "forward", ours=5.0, ours_graph=3.0, dense=4.0, loop=9.0, loop_graph=5.9),
        row("unet", "training step", ours=10.0, ours_graph=10.0, dense=9.0, loop=16.0, loop_graph=15.0),
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=0.95),
        row("conv", "forward", ours=1.0, ours_graph=1.0, dense_graph=0.5) | {"stride": 2, "channels": [3, 128]},
        row("conv", "dgrad", width=0.5, ours=1.0) | {"ratios": {"full width, graph": 0.3}},
        row("group norm", "forward", ours=1.0, ours_graph=1.0),
    ]
    rows += [
        r | other for r in rows for other in ({"num_groups": 16}, {"uneven": True}) if r["section"] != "group norm"
    ]
    verdicts = {v["goal"]: v for v in gpu_report.judge(rows)}
    met = {name: (v["met"], v["rows"]) for name, v in verdicts.items()}
    cudnn = "3x3 layers, N = 8: speed of dense cuDNN, forward, both in a graph"
    assert met == {
        "UNet forward, N = 8: time / dense, both eager": (0, 1),  # 5 / 4
        "UNet forward, N = 8: in a graph / dense, eager": (1, 1),  # 3 / 4
        "UNet forward, N = 8: best loop peer / ours at best": (0, 1),  # 5.9 / 3
        "UNet training step, N = 8: best loop peer / ours": (1, 1),
        cudnn: (1, 2),
        "Convolutions at 50% widths, N = 8: cost / full width": (1, 1),
        "Group norm: bandwidth / measured copy": (1, 1),
    }
    assert verdicts[cudnn]["worst"] == 0.5
    assert [miss["value"] for miss in verdicts[cudnn]["missed"]] == [0.5]
    rows[2]["wrong"] = True
    assert next(v for v in gpu_report.judge(rows) if v["goal"].startswith("3x3"))["rows"] == 1, (
        "a wrong row is no proof"
    )


def test_a_step_that_takes_too_long_is_interrupted() -> None:
    start = time.monotonic()
    with pytest.raises(TookTooLong), at_most(0.05):
        time.sleep(5)
    assert time.monotonic() - start < 2
    time.sleep(0.06)  # and nothing strikes later


def test_tuning_writes_the_table_that_the_kernels_read(tmp_path: Path) -> None:
    """In a process of its own: Triton's interpreter has to be asked for before the kernels are imported."""
    script = (
        "import sys\n"
        "from bench import tune\n"
        "tune.GAIN = float('inf')  # every winner is noted\n"
        "assert tune.main(['--dry-run', '--out', sys.argv[1]]) == 0\n"
        "from tdc_fast.kernels import tile_shapes, wgrad_tiles\n"
        "from pathlib import Path\n"
        "tile_shapes.TUNED = Path(sys.argv[1])\n"
        "print(sorted([*tile_shapes.load_tuned('interpreter'), *wgrad_tiles.load_tuned_wgrad('interpreter')]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(
        command, cwd=gpu.ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert {key.partition(" ")[0] for key in table["tiles"]} == {"forward", "dgrad"}
    assert {key.partition(" ")[0] for key in table["wgrad"]} == {"wgrad"}
    assert result.stdout.splitlines()[-1] == str(sorted([*table["tiles"], *table["wgrad"]]))


@pytest.mark.parametrize("layer", ["conv 4 8 8 6 3 1 --direction wgrad", "norm 4 8 6 4 --direction backward"])
def test_a_profile_reads_ncus_report(layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_gpu.main([*layer.split(), "--dry-run", "--out", str(tmp_path / "figures.json")]) == 0
    (kernel,) = json.loads((tmp_path / "figures.json").read_text())["kernels"]
    assert kernel["time us"] == 12.5 and kernel["tensor pipe %"] == 50.0 and kernel["L2 throughput %"] is None
    assert list(kernel["stalls"].items()) == [("wait", 1.5), ("barrier", 0.25)]
    printed = capsys.readouterr().out
    assert "tensor pipe %      50.0" in printed and "stalls             wait 1.50, barrier 0.25" in printed


class FakeStream:
    """A stream that notes in what order it is used."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append("wait")

    def __enter__(self) -> None:
        self.log.append("enter")

    def __exit__(self, *_: object) -> None:
        self.log.append("exit")


class FakeEvent:
    """An event that reads the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def machine_with_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, list[str]]:
    """A Machine that takes the code path of a GPU on the CPU, and the log of what it asked torch.cuda for."""
    log: list[str] = []
    stream = FakeStream(log)

    class FakeGraph:
        def capture_begin(self) -> None:
            log.append("begin")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append("replay")

    for name, value in {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": lambda: FakeStream(log),
        "current_stream": lambda: stream,
        "stream": lambda s: s,
        "synchronize": lambda: log.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    machine = Machine("cpu")
    machine.is_cuda, machine._capture_stream, machine._flush = True, FakeStream(log), torch.ones(4)
    return machine, log


def test_on_a_gpu_every_candidate_starts_from_an_idle_device_and_a_flushed_cache(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu

    def call(name: str) -> None:
        log.append(f"{name} {machine._flush.any().item()}")
        machine._flush.fill_(1)

    candidates = {name: lambda name=name: call(name) for name in "ab"}
    times = machine.times(candidates, flush=True, seconds=0, least=2)
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    warm = ["a True", "b True", "synchronize"]
    first = ["synchronize", "a False", "synchronize", "b False", "synchronize"]
    second = ["synchronize", "b False", "synchronize", "a False", "synchronize"]
    assert log == [*warm, *first, *second]


def test_on_a_gpu_a_function_is_warmed_up_then_captured_once_and_replayed(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu
    replay = machine.captured(lambda: log.append("call"))
    assert log == ["wait", "enter", *["call"] * 3, "synchronize", "begin", "call", "end", "exit", "wait"]
    log.clear()
    replay()
    assert log == ["replay"]

    def fails() -> None:
        raise RuntimeError("not while capturing")

    log.clear()
    with pytest.raises(RuntimeError, match="not while capturing"):
        machine.captured(fails)


def test_on_a_gpu_a_failing_capture_ends_with_its_own_error(machine_with_a_pretended_gpu, monkeypatch) -> None:
    machine, log = machine_with_a_pretended_gpu

    def spoilt(_: object) -> None:
        log.append("end")
        raise RuntimeError("capture invalidated")

    def fails() -> None:
        if "begin" in log:
            raise RuntimeError("not while capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", spoilt)
    with pytest.raises(RuntimeError, match="not while capturing"):
        machine.captured(fails)
    assert log[-3:] == ["begin", "end", "exit"]


def test_on_a_gpu_streams_start_after_what_was_queued_and_are_joined(machine_with_a_pretended_gpu) -> None:
    machine, log = machine_with_a_pretended_gpu
    run = gpu_peers.on_streams(machine, [lambda: log.append("a"), lambda: log.append("b")])
    run()
    assert log == ["wait", "wait", "enter", "a", "exit", "enter", "b", "exit", "wait", "wait"]
