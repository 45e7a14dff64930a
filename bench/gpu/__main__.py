"""`python -m bench.gpu --out DIR`: times the operators and whole UNets on this machine's GPU against their peers.

It takes less than 9 minutes on an H200. When the time is up, it writes what it has measured and counts what it left
out. `--dry-run` runs everything on the CPU with tiny shapes and the reference backend; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.files import slug, write_results
from bench.gpu import conv, norm, unet
from bench.gpu.layers import workload
from bench.gpu.report import as_markdown, facts
from bench.gpu.rows import OURS_GRAPH, Run
from bench.gpu.timing import Budget, Machine
from bench.gpu.warming import start_warming, warm

SECTIONS = ("unet", "norm", "conv")
# Seconds, the most that each part may take. The convolutions come last and get what the others leave.
WARM_SECONDS, UNET_SECONDS, NORM_SECONDS, RESERVE_SECONDS = 75.0, 190.0, 40.0, 15.0
GRACE_SECONDS = 20.0  # past the limit; if the run still has not ended by then, a kernel hangs


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections and writes their rows.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 when a row failed or is wrong, 2 without a GPU.
    """
    options = parse(arguments)
    start = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "bench.gpu needs an NVIDIA GPU (torch.cuda.is_available() is False); --dry-run runs tiny shapes on the CPU"
        )
        return 2
    run = Run(
        machine=Machine("cpu" if options.dry_run else "cuda"),
        backend="reference" if options.dry_run else options.backend or None,
        dtype=getattr(torch, options.dtype),
        row_seconds=0.0 if options.dry_run else 0.15,
        compile_seconds=options.compile_seconds,
        tiny=options.dry_run,
    )
    work = workload(tiny=options.dry_run)
    if options.warm:
        return warm(run, work, *map(int, options.warm.split("/")))

    budget = Budget(options.seconds - RESERVE_SECONDS)
    results: dict[str, Any] = {"clocks_before": run.machine.clocks(), "ceilings": run.machine.ceilings()}
    if options.warm_processes:
        start_warming(options, budget.part(WARM_SECONDS))
    copy_rate = results["ceilings"]["copy_TBps"]
    sections = {
        "unet": lambda: unet.run_section(run, work.unets, work.batch, budget.part(UNET_SECONDS)),
        "norm": lambda: norm.run_section(run, work.norms, budget.part(NORM_SECONDS), copy_rate),
        "conv": lambda: conv.run_section(run, work.design, work.convs, budget),
    }
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])

    def finish() -> None:
        found = results | facts(run, time.monotonic() - start, command)
        name = options.name or slug(f"gpu-{found['device']['name']}")
        table = as_markdown(found)
        write_results(found, table, options.out, name)
        print(table.partition("\n## unet")[0])
        print(f"written: {options.out / name}.json and .md")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    hanging = when_it_hangs(start + options.seconds + GRACE_SECONDS, finish)
    if run.machine.is_cuda:
        hanging.start()
    try:
        with torch.no_grad():
            for name in SECTIONS:
                if name in options.only:
                    sections[name]()
    finally:  # also when stopped by a signal: write what was measured
        hanging.cancel()
        finish()
    return 1 if any("failed" in row or row["wrong"] or OURS_GRAPH in row["absent"] for row in run.rows) else 0


def when_it_hangs(end: float, finish: Callable[[], None]) -> threading.Timer:
    """A timer, not yet started, that calls `finish` at `end` and ends the process: the main thread waits in CUDA."""

    def give_up() -> None:
        try:
            print("the device does not answer; what was measured until then:", flush=True)
            finish()
        finally:
            sys.stdout.flush()
            os._exit(3)

    timer = threading.Timer(max(0.0, end - time.monotonic()), give_up)
    timer.daemon = True
    return timer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file and the Markdown table")
    parser.add_argument("--name", default="", help="file name without ending (default: from the device)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--seconds", type=float, default=500.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", default="", help="triton, cuda or reference (default: the fastest)")
    parser.add_argument("--compile-seconds", type=float, default=45.0, help="limit for one torch.compile peer")
    processes = min(8, (os.cpu_count() or 2) // 2)
    parser.add_argument(
        "--warm-processes", type=int, default=processes,
        help="processes that compile kernels into the disk cache first, 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)  # "i/n": compile the i-th of n shares and exit
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, reference backend")
    options = parser.parse_args(arguments)
    if options.dry_run:
        options.warm_processes = 0
    return options


if __name__ == "__main__":
    sys.exit(main())
