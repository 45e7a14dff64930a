"""`python -m bench.gpu --out DIR`: times the operators and whole UNets on this machine's GPU against their peers.

It takes less than 9 minutes on an H200. Rows come in the order of their importance: the first 300 seconds give the UNet
against a compiled dense model, the whole training step, a real run of `tdc_fast.train` and sampling; then how the time
grows with experts and batch, other UNets, and single layers. When the time is up, it writes what it has measured and
counts what it left out. `--dry-run` runs everything on the CPU with tiny shapes and the reference backend; its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.files import seconds, share, slug, write_results
from bench.gpu import conv, growth, norm, sampling, step, train_run, unet
from bench.gpu.layers import Workload, workload
from bench.gpu.report import as_markdown, facts
from bench.gpu.rows import OURS_GRAPH, BenchRun
from bench.gpu.timing import Budget, Machine
from bench.gpu.warming import start_warming, warm
from tdc_fast.ops.backends import ENVIRONMENT, available_backends

SECTIONS = ("unet", "training", "sampling", "growth", "norm", "conv")
# Seconds, the most that each part may take. The convolutions come last and get what the others leave.
WARM_SECONDS, HEADLINE_SECONDS, STEP_SECONDS, SAMPLING_SECONDS, RESERVE_SECONDS = 60.0, 90.0, 35.0, 20.0, 15.0
GROWTH_SECONDS, UNET_SECONDS, NORM_SECONDS = 60.0, 60.0, 40.0
TRAIN_SECONDS = 60.0  # of the real run
GRACE_SECONDS = 20.0  # past the limit; if the run still has not ended by then, a kernel hangs
ROW_SECONDS = 180.0  # that no row takes, less the real run: compilers included


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
    run = BenchRun(
        machine=Machine("cpu" if options.dry_run else "cuda"),
        backend="reference" if options.dry_run else options.backend or None,
        dtype=getattr(torch, options.dtype),
        row_seconds=0.0 if options.dry_run else 0.15,
        compile_seconds=options.compile_seconds,
        tiny=options.dry_run,
    )
    work = workload(tiny=options.dry_run)
    if options.warm:
        with requested(options.backend):
            return warm(run, work, *options.warm)

    budget = Budget(options.seconds - RESERVE_SECONDS)
    results: dict[str, Any] = {"clocks_before": run.machine.clocks(), "ceilings": run.machine.ceilings()}
    if options.warm_processes:
        start_warming(options, budget.part(WARM_SECONDS))
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])

    def finish() -> None:
        found = results | facts(run, work, time.monotonic() - start, command)
        name = options.name or slug(f"gpu-{found['device']['name']}")
        table = as_markdown(found)
        write_results(found, table, options.out, name)
        print(table.partition("\n## unet")[0])
        print(f"written: {options.out / name}.json and .md")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    give_up = partial(when_it_hangs, run, finish)
    hanging = threading.Timer(max(0.0, start + options.seconds + GRACE_SECONDS - time.monotonic()), give_up)
    hanging.daemon = True
    if run.machine.is_cuda:
        hanging.start()
        run.row_limit, run.give_up = ROW_SECONDS + options.train_seconds, give_up
    try:
        with torch.no_grad(), requested(options.backend):
            for name, section in sections_of(options, run, work, budget, results["ceilings"]["copy_TBps"]):
                if name in options.only:
                    section()
    finally:  # also when stopped by a signal: write what was measured
        hanging.cancel()
        finish()
    return 1 if any("failed" in row or row["wrong"] or OURS_GRAPH in row["absent"] for row in run.rows) else 0


def sections_of(
    options: argparse.Namespace, run: BenchRun, work: Workload, budget: Budget, copy_rate: float
) -> list[tuple[str, Callable[[], None]]]:
    """What is timed, the most important first, as names for --only and functions; a section has several parts.

    Args:
        options: the command line.
        run: takes the rows.
        work: the UNets and layers.
        budget: the time for everything.
        copy_rate: that of a measured copy in TB/s.
    """
    name, flags = next(iter(work.unets.items()))
    batch, small = work.batch, options.dry_run
    first_step, other_steps = [(batch, 1.0)], [(batch, 0.75)] if small else [(2 * batch, 1.0), (batch, 0.75)]
    others = unet.others(work.unets)
    if small:
        others = [unet.Case(name, "forward"), *others[:1]]

    def headline() -> None:
        unet.run_section(run, work.unets, batch, unet.headline(name), budget.part(HEADLINE_SECONDS))

    def train() -> None:
        train_run.run_section(run, name, flags, batch, options.train_seconds, options.images, budget)

    return [
        ("unet", headline),
        ("training", lambda: step.run_section(run, name, flags, first_step, budget.part(STEP_SECONDS))),
        ("training", train),
        ("sampling", lambda: sampling.run_section(run, name, flags, batch, budget.part(SAMPLING_SECONDS))),
        ("growth", lambda: growth.run_section(run, name, flags, budget.part(GROWTH_SECONDS))),
        ("training", lambda: step.run_section(run, name, flags, other_steps, budget.part(STEP_SECONDS))),
        ("unet", lambda: unet.run_section(run, work.unets, batch, others, budget.part(UNET_SECONDS))),
        ("norm", lambda: norm.run_section(run, work.norms, budget.part(NORM_SECONDS), copy_rate)),
        ("conv", lambda: conv.run_section(run, work.design, work.convs, budget)),
    ]


@contextmanager
def requested(backend: str) -> Iterator[None]:
    """Within the block, whole models run on this backend, also in processes that are started; "" for the fastest."""
    if not backend:
        yield
        return
    with patch.dict(os.environ, {ENVIRONMENT: backend}):
        yield


def when_it_hangs(run: BenchRun, finish: Callable[[], None]) -> None:
    """Names the row under way, calls `finish` and ends the process, from another thread: the main one waits in CUDA."""
    try:
        print(f"the device does not answer in: {run.under_way}; what was measured until then:", flush=True)
        finish()
    finally:
        sys.stdout.flush()
        os._exit(3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file and the Markdown table")
    parser.add_argument("--name", default="", help="file name without ending (default: from the device)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--seconds", type=seconds, default=500.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", default="", help="triton, cuda, hopper or reference (default: the fastest)")
    parser.add_argument("--compile-seconds", type=seconds, default=45.0, help="limit for one torch.compile peer")
    parser.add_argument(
        "--train-seconds", type=seconds, default=TRAIN_SECONDS, help="of a run of tdc_fast.train (default: %(default)s)"
    )
    parser.add_argument("--images", type=Path, help=".npz of uint8 images (arr_0) that run trains on (default: noise)")
    processes = min(8, (os.cpu_count() or 2) // 2)
    parser.add_argument(
        "--warm-processes", type=int, default=processes,
        help="processes that compile kernels into the disk cache first, 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--warm", type=share, help=argparse.SUPPRESS)  # compile a share of the kernels and exit
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, reference backend")
    options = parser.parse_args(arguments)
    # All that would fail minutes later, or row by row.
    if options.backend and options.backend not in available_backends():
        parser.error(f"--backend takes one of {', '.join(available_backends())}, not {options.backend!r}")
    if options.images and not options.images.is_file():
        parser.error(f"--images: there is no file {options.images}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {options.out} cannot be made: {error.strerror}")
    if options.dry_run:
        options.warm_processes, options.train_seconds = 0, 0.5
    return options


if __name__ == "__main__":
    sys.exit(main())
