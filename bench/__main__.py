"""`python -m bench`: runs the suites and writes a JSON file and a Markdown table of medians and ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from bench.files import ROOT, markdown_rows, slug, write_results

SETTINGS = ("TDC_FAST_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "TDC_FAST_BENCH_ROUNDS")


def main() -> int:
    """Run the suites, write the two files and return the exit code: that of pytest if it fails, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    parser.add_argument("--only", default="", help="pytest -k expression: the cases to run (default: all)")
    parser.add_argument("--name", default="", help="file name without ending (default: from the processor)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "-q",
            f"--benchmark-json={raw}",
            "--benchmark-quiet",
        ]
        code = subprocess.run([*command, "-k", options.only], cwd=ROOT).returncode
        if code != 0:
            return code
        results = summarise(json.loads(raw.read_text()), options.only)
    machine = results["machine"]
    name = options.name or slug(f"cpu-{machine['processor']}-{machine['instruction_set']}")
    table = as_markdown(results)
    write_results(results, table, options.out, name)
    print(table)
    print(f"written: {options.out / name}.json and .md")
    return 0


def summarise(raw: dict, only: str = "") -> dict:
    """The machine, the versions, and medians and ratios per case, from pytest-benchmark's JSON."""
    from tdc_fast._native import cpu_isa

    rows = [
        {
            "suite": Path(bench["fullname"].partition("::")[0]).stem.removeprefix("test_"),
            "test": bench["name"].partition("[")[0].removeprefix("test_").replace("_", " "),
            "case": bench["param"] or "",
            "rounds": bench["stats"]["rounds"],
            **bench["extra_info"],
        }
        for bench in raw["benchmarks"]
    ]
    machine = {
        "processor": raw["machine_info"].get("cpu", {}).get("brand_raw") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu_isa(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "date": date.today().isoformat(),
        "command": " ".join([*settings, f"python -m bench --only '{only}'" if only else "make bench"]),
        "machine": machine,
        "versions": versions,
        "rows": rows,
    }


def as_markdown(results: dict) -> str:
    """The Markdown file: conditions, and a table per test."""
    machine = results["machine"]
    lines = [
        f"# Throughput on {machine['processor']}, {machine['threads']} threads",
        "",
        f"{results['date']}, `{results['command']}`; kernels: {machine['instruction_set']}; "
        f"torch {results['versions']['torch']} ({machine['torch_instruction_set']}), "
        f"Python {results['versions']['python']}.",
        "",
        "Medians in milliseconds; `x` columns are ours / peer, the median over interleaved rounds: below 1 is faster.",
    ]
    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        for test in dict.fromkeys(r["test"] for r in results["rows"] if r["suite"] == suite):
            rows = [r for r in results["rows"] if (r["suite"], r["test"]) == (suite, test)]
            peers = list(rows[0]["peers_ms"])
            header = ["case", "ours ms", *(f"{p} ms" for p in peers), *(f"x {p}" for p in peers)]
            cells = []
            for r in rows:
                times = [f"{r['peers_ms'][p]:.3f}" for p in peers]
                ratios = [f"{r['ratios'][p]:.2f}" for p in peers]
                cells.append([str(r["case"]), f"{r['ours_ms']:.3f}", *times, *ratios])
            lines += ["", f"## {suite}: {test}", "", *markdown_rows(header, cells)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
