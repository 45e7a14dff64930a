"""``python -m bench.gpu --out DIR``: the operators and whole UNets on this machine's GPU, against their peers.

Under 9 minutes on an H200. What is done when the time is up is written, and what was left out is counted. ``--dry-run``
exercises all of it on the CPU with tiny shapes and the reference backend; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import gpu_conv, gpu_norm, gpu_unet
from bench.__main__ import ROOT, slug
from bench.gpu_layers import TINY_UNETS, UNET_BATCH, UNETS, ConvLayer, NormLayer, design_layers, unet_layers
from bench.gpu_report import as_markdown, judge
from bench.gpu_rows import OURS_GRAPH, Run
from bench.gpu_timing import Budget, Machine

SECTIONS = ("unet", "norm", "conv")
# Seconds; a section may not spend more. What others leave over goes to the convolutions, which come last.
WARM_SECONDS, UNET_SECONDS, NORM_SECONDS, RESERVE_SECONDS = 75.0, 190.0, 40.0, 15.0
GRACE_SECONDS = 20.0  # past the limit; then a kernel hangs, and what was measured is written without it


def main(arguments: list[str] | None = None) -> int:
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
    unets = TINY_UNETS if options.dry_run else UNETS
    batch = 8 if options.dry_run else UNET_BATCH
    convs, norms = layers_of(unets, batch)
    if options.dry_run:  # a layer of each kind says as much as all of them
        convs, norms = (
            one_of_each(convs, lambda c: (c.filter, c.stride)),
            one_of_each(norms, lambda n: (n.silu, n.modulated)),
        )
    design = design_layers(tiny=options.dry_run)
    if options.warm:
        return warm(run, design, convs, norms, *map(int, options.warm.split("/")))

    budget = Budget(options.seconds - RESERVE_SECONDS)
    results: dict[str, Any] = {"clocks_before": run.machine.clocks(), "ceilings": run.machine.ceilings()}
    if options.warm_processes:
        start_warming(options, budget.part(WARM_SECONDS))
    sections = {
        "unet": lambda: gpu_unet.run_section(run, unets, batch, budget.part(UNET_SECONDS)),
        "norm": lambda: gpu_norm.run_section(run, norms, budget.part(NORM_SECONDS), results["ceilings"]["copy_TBps"]),
        "conv": lambda: gpu_conv.run_section(run, design, convs, budget),
    }
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])

    def finish() -> None:
        found = results | facts(run, start, command)
        write(found, options.out, options.name or slug(f"gpu-{found['device']['name']}"))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    hanging = when_it_hangs(start + options.seconds + GRACE_SECONDS, finish)
    if run.machine.is_cuda:
        hanging.start()
    try:
        with torch.no_grad():
            for name in SECTIONS:
                if name in options.only:
                    sections[name]()
    finally:  # also when stopped from outside: what was measured is written
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


def layers_of(unets: dict[str, dict[str, Any]], batch: int) -> tuple[list[ConvLayer], list[NormLayer]]:
    """The layers of all UNets; one that several have is listed with the first."""
    convs: dict[tuple[Any, ...], ConvLayer] = {}
    norms: dict[tuple[Any, ...], NormLayer] = {}
    for name, flags in unets.items():
        for conv in unet_layers(name, flags, batch)[0]:
            convs.setdefault((conv.in_channels, conv.out_channels, conv.height, conv.filter, conv.stride), conv)
        for norm in unet_layers(name, flags, batch)[1]:
            norms.setdefault((norm.channels, norm.height, norm.width, norm.silu, norm.modulated), norm)
    return list(convs.values()), list(norms.values())


def one_of_each(layers: list[Any], kind: Callable[[Any], Any]) -> list[Any]:
    return list({kind(layer): layer for layer in reversed(layers)}.values())


def start_warming(options: argparse.Namespace, budget: Budget) -> None:
    """Compiles in parallel processes what the sections will launch, for as long as the budget says."""
    count = options.warm_processes
    command = [sys.executable, "-m", "bench.gpu", "--out", str(options.out), "--dtype", options.dtype]
    command += ["--backend", options.backend] if options.backend else []
    workers = [
        subprocess.Popen([*command, "--warm", f"{index}/{count}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        for index in range(count)
    ]
    for worker in workers:
        try:
            worker.wait(budget.left())
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()


def warm(run: Run, design: list[ConvLayer], convs: list[ConvLayer], norms: list[NormLayer], index: int, of: int) -> int:
    """Launches once what the first rows of the sections launch. Failures are left to the sections to report."""

    def model(case: gpu_unet.Case) -> None:
        problem = gpu_unet.Problem(run, UNETS[case.model], UNET_BATCH, case)
        if case.what == "forward":
            with torch.no_grad():
                gpu_unet.compiled_loop(problem)  # the longest compilation of all; Inductor too keeps it on disk
        else:
            problem.warm()

    def conv(case: gpu_conv.Case) -> None:
        problem = gpu_conv.Problem(run, case)
        problem.ours(run.backend, problem.widths())()

    def norm(layer: NormLayer) -> None:
        for direction in gpu_norm.DIRECTIONS:
            gpu_norm.Problem(run, layer, 1.0).ours(direction, run.backend)()

    cifar, imagenet = UNETS
    models = [gpu_unet.Case(cifar, "forward"), gpu_unet.Case(cifar, "training step")]
    models += [gpu_unet.Case(cifar, "training step", width=0.5), gpu_unet.Case(imagenet, "training step")]
    wanted = [case for case in gpu_conv.cases(design, convs) if case.num_groups == 8 and not case.uneven]
    jobs = [[partial(model, case) for case in models], [partial(conv, case) for case in wanted]]
    jobs.append([partial(norm, layer) for layer in norms])
    for job in (job for kind in jobs for job in kind[index::of]):
        try:
            job()
        except Exception as error:
            print(f"{job.args[0]}: {error}", file=sys.stderr)
    run.machine.synchronize()
    return 0


def facts(run: Run, start: float, command: str) -> dict[str, Any]:
    """What a reader needs beside the rows: where, when, with what, and what the rows say about the goals."""
    return {
        "date": date.today().isoformat(),
        "command": command,
        "dry_run": run.tiny,
        "dtype": str(run.dtype).removeprefix("torch."),
        "seconds": time.monotonic() - start,
        "device": run.machine.describe(),
        "versions": versions(run.machine),
        "clocks_after": run.machine.clocks(),
        "goals": judge(run.rows),
        "not_run": run.not_run,
        "rows": run.rows,
    }


def versions(machine: Machine) -> dict[str, str]:
    from tdc_fast import __version__

    found = {"tdc_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version()) if machine.is_cuda else "none"
    for package in ("triton", "cupy-cuda13x"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    found["driver"] = driver_version() if machine.is_cuda else "none"
    return found


def driver_version() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write(results: dict[str, Any], folder: Path, name: str) -> None:
    """DIR/name.json with everything, DIR/name.md with the tables; prints the goals."""
    folder.mkdir(parents=True, exist_ok=True)
    table = as_markdown(results)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    print(table.partition("\n## unet")[0])
    print(f"written: {folder / name}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
