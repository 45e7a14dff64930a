"""`python -m bench.profile_gpu LAYER`: what one operator spends its time on, from Nsight Compute (ncu).

It runs itself under ncu, without changing the clocks, and prints per kernel: time, tensor-pipe use, L2 and
device-memory throughput, registers, shared memory, occupancy, and the stalls that cost most. LAYER is "conv BATCH C_IN
C_OUT SIZE FILTER STRIDE" or "norm BATCH C SIZE GROUPS"; for example

    python -m bench.profile_gpu conv 64 128 128 32 3 1 --direction forward --backend triton --num-groups 8
    python -m bench.profile_gpu norm 64 256 32 32 --direction backward --backend cuda

With `--dry-run` the operator runs on the CPU without ncu, and a canned report is read.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.files import ROOT, whole_number
from bench.gpu import conv, norm
from bench.gpu.layers import ConvLayer, NormLayer
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Machine
from tdc_fast.atomic import write_json

# Names of metrics differ between chips: whole sections are collected, and figures are found by pattern. Where several
# metrics match a pattern the largest counts (tensor pipes have one per kind of product).
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
METRICS = {
    "time us": r"gpu__time_duration\.sum",
    "tensor pipe %": r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_(active|elapsed)",
    "SM throughput %": r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "L2 throughput %": r"lts__(throughput|t_sectors)\.avg\.pct_of_peak_sustained_elapsed",
    "L2 hits %": r"lts__t_sector_hit_rate\.pct",
    "DRAM throughput %": r"(gpu__)?dram_*throughput\.avg\.pct_of_peak_sustained_elapsed",
    "occupancy %": r"sm__warps_active\.avg\.pct_of_peak_sustained_active",
    "registers": r"launch__registers_per_thread",
    "shared bytes": r"launch__shared_mem_per_block_dynamic",
    "waves": r"launch__waves_per_multiprocessor",
}
STALL = r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_\w+)?\.ratio"


def main(arguments: list[str] | None = None) -> int:
    """Profile the layer and print the figures.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 when no kernel ran, 2 when ncu is missing or fails.
    """
    options = parse(arguments)
    if options.run or options.dry_run:
        launch(options)
        if options.run:
            return 0
    text = DRY_REPORT if options.dry_run else profiled(sys.argv[1:] if arguments is None else arguments)
    if text is None:
        return 2
    kernels = read_report(text)
    print(as_table(kernels))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {"layer": options.layer, "kernels": kernels})
    return 0 if kernels else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layer", nargs="+", help="conv B C_IN C_OUT SIZE FILTER STRIDE, or norm B C SIZE GROUPS")
    parser.add_argument("--direction", default="forward", help="forward, dgrad, wgrad; of a norm forward, backward")
    parser.add_argument("--backend", default="", help="triton or cuda (default: the fastest)")
    parser.add_argument("--num-groups", type=whole_number, default=8)
    parser.add_argument("--width", type=float, default=1.0, help="live part of the channels")
    parser.add_argument("--dense", action="store_true", help="profile cuDNN's dense convolution instead")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--dry-run", action="store_true", help="without ncu, on the CPU")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # what ncu starts
    options = parser.parse_args(arguments)
    count = {"conv": 7, "norm": 5}.get(options.layer[0])
    if count is None or len(options.layer) != count or not all(part.isdigit() for part in options.layer[1:]):
        parser.error("LAYER: conv BATCH C_IN C_OUT SIZE FILTER STRIDE, or norm BATCH C SIZE GROUPS")
    return options


def launch(options: argparse.Namespace) -> None:
    """Runs the operator twice; ncu profiles the second call, when everything is compiled."""
    machine = Machine("cpu" if options.dry_run else "cuda")
    dtype, backend = torch.bfloat16, "reference" if options.dry_run else options.backend or None
    run = BenchRun(machine, backend, dtype, 0.0, 0.0, tiny=options.dry_run)
    kind, *sizes = options.layer
    numbers = [int(size) for size in sizes]
    if kind == "conv":
        batch, c_in, c_out, size, taps, stride = numbers
        layer = ConvLayer("profile", batch, c_in, c_out, size, size, taps, stride)
        case = conv.Case(layer, options.num_groups, False, options.width, options.direction)
        problem = conv.Problem(run, case)
        call = problem.dense() if options.dense else problem.ours(backend, problem.widths())
    else:
        batch, channels, size, groups = numbers
        modulated = NormLayer("profile", batch, channels, size, size, groups, silu=True, modulated=True)
        inputs = norm.Problem(run, modulated, options.width)
        if options.dense:
            call = inputs.dense(inputs.layer_sequence(), options.direction)
        else:
            call = inputs.ours(options.direction, backend)
    call()
    machine.synchronize()
    if machine.is_cuda:
        torch.cuda.profiler.start()
    call()
    machine.synchronize()
    if machine.is_cuda:
        torch.cuda.profiler.stop()


def profiled(arguments: list[str]) -> str | None:
    """The report of ncu on this command, as CSV; None, after printing why, when ncu is missing or fails."""
    installed = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "ncu"
    ncu = shutil.which("ncu") or (str(installed) if installed.is_file() else None)
    if ncu is None:
        print("ncu (Nsight Compute) is not installed; it comes with the CUDA toolkit")
        return None
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "bench.profile_gpu", *arguments, "--run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0 or '"ID"' not in result.stdout:
        print(f"ncu failed ({result.returncode}):\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return None
    return result.stdout


def read_report(text: str) -> list[dict[str, Any]]:
    """For each kernel its name, the figures of METRICS (None if not collected), and its stalls, largest first."""
    rows = list(csv.DictReader(io.StringIO(text[text.index('"ID"') :])))
    units = next((row for row in rows if not is_kernel(row)), {})
    return [kernel_of(row, units) for row in rows if is_kernel(row)]


def is_kernel(row: dict[str, Any]) -> bool:
    """Whether this is a row of figures, not the row of units below the header."""
    return (row.get("ID") or "").strip().isdigit()


def kernel_of(row: dict[str, Any], units: dict[str, Any]) -> dict[str, Any]:
    """Name, figures and stalls of a kernel, from its row and the row of units."""
    kernel: dict[str, Any] = {"kernel": row["Kernel Name"]}
    for name, pattern in METRICS.items():
        found = [key for key in row if key and re.fullmatch(pattern, key) and _number(row[key]) is not None]
        value = max((_number(row[key]) or 0.0 for key in found), default=None)
        if name == "time us" and value is not None:
            value *= TO_MICROSECONDS.get(units.get(found[0], ""), 1.0)
        kernel[name] = value
    stalls = {match[1]: _number(row[key]) for key in row if key and (match := re.fullmatch(STALL, key))}
    known = {name: value for name, value in stalls.items() if value is not None}
    return kernel | {"stalls": dict(sorted(known.items(), key=lambda item: -item[1]))}


TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def as_table(kernels: list[dict[str, Any]]) -> str:
    """A block per kernel: name, figures, the five stalls that cost most."""
    lines: list[str] = []
    for kernel in kernels:
        lines.append(kernel["kernel"])
        for name in METRICS:
            value = kernel[name]
            lines.append(f"  {name:18} {'not known' if value is None else format(value, ',.1f')}")
        worst = list(kernel["stalls"].items())[:5]
        lines.append(
            "  stalls             " + (", ".join(f"{name} {value:.2f}" for name, value in worst) or "not known")
        )
    return "\n".join(lines) or "ncu recorded no kernel"


DRY_REPORT = """==PROF== Connected to process 1 (python)
"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active","lts__t_sector_hit_rate.pct",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","ns","%","%","%","",""
"0","kernel","12,500","1.0","50.0","80.0","0.25","1.5"
"""


if __name__ == "__main__":
    sys.exit(main())
