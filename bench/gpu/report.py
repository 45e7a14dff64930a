"""What the GPU bench writes: the facts of a run, and Markdown with its tables and its goals, met or missed."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib import metadata
from typing import Any

import torch

from bench.files import ROOT, markdown_rows
from bench.gpu import conv, growth
from bench.gpu.goals import judge
from bench.gpu.layers import Workload
from bench.gpu.rows import BenchRun, Row, row_name
from bench.gpu.timing import Machine
from tdc_fast import __version__
from tdc_fast.ops.measured import KERNEL_VERSIONS

RATES = ("images_per_s", "TFLOPps", "TBps", "of_copy", "net_of_copy", "net_us")
WHOLE_RATES = ("images_per_s", "TFLOPps")  # shown without decimals


def facts(run: BenchRun, work: Workload, seconds: float, command: str) -> dict[str, Any]:
    """The rows of a run and what a reader needs to know with them: date, command, device, versions, goals.

    `kernels` are the KERNEL_VERSIONS that were measured.
    """
    rows = run.rows + conv.sums(run.rows, work.convs_of, run.machine.empty_launch)
    return {
        "date": date.today().isoformat(),
        "command": command,
        "dry_run": run.tiny,
        "dtype": str(run.dtype).removeprefix("torch."),
        "seconds": seconds,
        "device": run.machine.describe(),
        "versions": versions(run.machine),
        "kernels": dict(KERNEL_VERSIONS),
        "clocks_after": run.machine.clocks(),
        "goals": judge(rows),
        "not_run": run.not_run,
        "rows": rows,
    }


def versions(machine: Machine) -> dict[str, str]:
    """Versions of the software that the measurements depend on; "none" for what is not installed."""
    found = {
        "tdc_fast": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version()) if machine.is_cuda else "none"
    for package in ("triton", "cupy-cuda13x"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    found["driver"] = driver_version() if machine.is_cuda else "none"
    return found


def commit() -> str:
    """The commit of the checkout, with "+" after it if files have changed since; "unknown" outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        name, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name + ("+" if changes else "")


def driver_version() -> str:
    """Version of the NVIDIA driver, "unknown" when nvidia-smi does not tell."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def as_markdown(results: dict[str, Any]) -> str:
    """The Markdown file: conditions, goals, and a table per section."""
    device, versions = results["device"], results["versions"]
    ceilings = results["ceilings"]
    lines = [
        f"# Throughput on {device['name']}, {results['dtype']}",
        "",
        f"{results['date']}, commit {versions['commit']}, `{results['command']}`, {results['seconds']:.0f} s; "
        f"torch {versions['torch']}, CUDA {versions['cuda']}, cuDNN {versions['cudnn']}, triton {versions['triton']}, "
        f"driver {versions['driver']}.",
        f"Measured ceilings: copy {ceilings['copy_TBps']:.2f} TB/s, bf16 matrix product "
        f"{ceilings['matmul_TFLOPps']:.0f} TFLOP/s, empty launch {1e3 * ceilings['empty_launch_ms']:.1f} us. "
        f"Clocks before: {_clocks(results['clocks_before'])}; after: {_clocks(results['clocks_after'])}.",
        "",
        "Medians in milliseconds over interleaved rounds. `x` columns are ours / peer, medians of per-round quotients: "
        "below 1, ours is faster. A peer in a CUDA graph is compared with ours in a graph. The L2 is flushed before "
        "every timed layer. From sums of convolutions, `net_of_copy` and `net_us` an empty launch is subtracted, for "
        "each layer. The loop peers get their samples sorted and their segments' bounds for free; *dense* is one "
        "expert over the whole batch, *compiled dense* the same under torch.compile. Rows of tdc_fast.train have "
        "milliseconds per step of a real run. In the goals, ours and the loop are the faster of eager and in a graph.",
    ]
    if results["dry_run"]:
        lines += ["", "**A dry run: tiny shapes on the CPU. Its numbers mean nothing.**"]
    lines += ["", "## Goals", "", *_goal_table(results["goals"])]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"* failed: {row['section']}, {row_name(row)}: {row['failed']}")
        elif row["wrong"]:
            lines.append(f"* **wrong result** (relative error {row['error']:.2g}): {row['section']}, {row_name(row)}")
    for section, count in results["not_run"].items():
        lines.append(f"* not run, no time left: {count} rows of {section}")
    rows = [row for row in results["rows"] if row["section"] == "growth" and "failed" not in row]
    if rows:
        lines += ["", "## growth with N and B, in a CUDA graph", "", *growth.table(rows), *_absent(rows)]
    for section in ("unet", "training", "sampling", conv.SUMS, "conv", "group norm"):
        rows = [row for row in results["rows"] if row["section"] == section and "failed" not in row]
        for source in dict.fromkeys(row.get("source", "") for row in rows):
            part = [row for row in rows if row.get("source", "") == source]
            lines += ["", f"## {section} {source}".rstrip(), "", *_table(part)]
    return "\n".join(lines) + "\n"


def _clocks(clocks: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in clocks.items()) or "not known"


def _goal_table(verdicts: list[dict[str, Any]]) -> list[str]:
    rows = []
    for v in verdicts:
        verdict = "not measured" if not v["rows"] else "met" if v["met"] == v["rows"] else "missed"
        if v["failed"]:  # "met" by the others would be no proof
            verdict = f"{verdict if verdict == 'missed' else 'open'}, {v['failed']} failed"
        numbers = ["" if v[key] is None else f"{v[key]:.2f}" for key in ("median", "worst")]
        rows.append([v["goal"], v["limit"], verdict, f"{v['met']} of {v['rows']}", *numbers])
    lines = [*markdown_rows(["goal", "limit", "", "met by", "median", "worst"], rows), ""]
    for v in verdicts:
        lines += [f"* misses '{v['goal']}' with {miss['value']:.2f}: {miss['row']}" for miss in v["missed"]]
    return lines


def _table(rows: list[Row]) -> list[str]:
    """A table with a column for every candidate that occurs in a row."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    rates = [key for key in RATES if any(key in row for row in rows)]
    header = ["case", "backend", *rates, *(f"{n} ms" for n in names), *(f"x {p}" for p in peers)]
    lines = []
    for row in rows:
        cells = [
            row_name(row),
            str(row["backend"]),
            *(_cell(row, key, 0 if key in WHOLE_RATES else 2) for key in rates),
        ]
        cells += [_cell(row["ms"], name, 4) for name in names]
        lines.append(cells + [_cell(row["ratios"], name, 2) for name in peers])
    return [*markdown_rows(header, lines), *_absent(rows)]


def _absent(rows: list[Row]) -> list[str]:
    """A line for every candidate that could not be made or timed, and why."""
    absent = {f"{name}: {reason}" for row in rows for name, reason in row["absent"].items()}
    return ([""] if absent else []) + [f"* absent: {text}" for text in sorted(absent)]


def _cell(values: dict[str, Any], key: str, digits: int) -> str:
    return f"{values[key]:.{digits}f}" if key in values else ""
