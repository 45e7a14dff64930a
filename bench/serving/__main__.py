"""`python -m bench.serving`: latency and throughput of the engine, and of what it is measured against, in real time."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.files import ROOT, device, slug, write_results
from bench.serving.contestants import MODELS, Problem
from bench.serving.loads import closed_loop, open_loop
from bench.serving.report import as_markdown, capacity_of, publish
from tdc_fast.serving import Engine, Request
from tdc_fast.serving.pauses import short_pauses

OPEN = ("engine", "request level", "dense")
"""Who gets requests at random times; a loop over experts saturates below these rates."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write a JSON and a Markdown file."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="digits", help="the network")
    parser.add_argument("--experts", type=int, default=8, help="N, the number of experts")
    parser.add_argument("--max_batch", type=int, default=32, help="images in a batch; 32 is what an engine has")
    parser.add_argument("--loads", default="0.5,0.8,0.95", help="offered load as shares of the capacity")
    parser.add_argument("--seconds", type=float, default=8.0, help="time of each open loop; closed loops take half")
    parser.add_argument("--repeats", type=int, default=5, help="how often everything is measured, taking turns")
    parser.add_argument("--overhead_steps", type=int, default=200, help="steps in which the engine's share is measured")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, or cuda with --model cifar10")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps the default of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    parser.add_argument("--name", default="", help="file name without ending")
    parser.add_argument("--publish", action="store_true", help="also update the picture and the README")
    parser.add_argument("--note", default="", help="a sentence for the table, such as what else ran on the machine")
    options = parser.parse_args(argv)
    for name in ("experts", "max_batch", "seconds", "repeats", "overhead_steps"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} takes a number above 0")
    loads = shares(options.loads)
    if not loads:
        parser.error("--loads takes numbers above 0, separated by commas")
    if options.publish and not (0.8 in loads and options.out.resolve().is_relative_to(ROOT)):
        parser.error("--publish needs 0.8 among --loads, and --out within the repository")
    if options.threads:
        torch.set_num_threads(options.threads)
    problem = Problem(options.model, options.experts, options.device, getattr(torch, options.dtype))
    began = time.monotonic()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.serving", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine_of(options.device),
        "note": options.note,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "model": options.model, "experts": options.experts, "max_batch": options.max_batch,
            "seconds": options.seconds, "repeats": options.repeats, "dtype": options.dtype,
        },
    }  # fmt: skip
    results["overhead"] = overhead(problem, steps=options.overhead_steps)
    results.update(measure(problem, options.max_batch, loads, options.seconds, options.repeats))
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    table = as_markdown(results)
    name = options.name or slug(f"serving-{options.model}-{results['machine']['name']}")
    write_results(results, table, options.out, name)
    if options.publish:
        publish(results, options.out / f"{name}.md")
    print(table)
    print(f"written: {options.out / name}.json and .md")
    return 0


def shares(text: str) -> list[float]:
    """The loads of a comma list; none if one of them is no number above 0."""
    try:
        loads = [float(load) for load in text.split(",")]
    except ValueError:
        return []
    return loads if all(0 < load < math.inf for load in loads) else []


def measure(problem: Problem, max_batch: int, loads: list[float], seconds: float, repeats: int) -> dict[str, Any]:
    """The closed loops of all contestants, and the open loops at shares of what both ways of batching can serve.

    Contestants take turns, in the opposite order in every other repeat, and get the same requests at the same times in
    each: what the machine does meanwhile falls on all of them.
    """
    makers = problem.contestants(max_batch)
    results: dict[str, Any] = {"clients": 2 * max_batch, "closed": [], "open": []}
    for repeat in range(repeats):
        for name in list(makers)[:: -1 if repeat % 2 else 1]:
            row = _run(makers[name], lambda server, seed=repeat: closed_loop(server, 2 * max_batch, seconds / 2, seed))
            results["closed"].append({"contestant": name, "repeat": repeat, **row})
            print(f"{name}: {row['images_per_second']:.1f} images/s with {2 * max_batch} clients", flush=True)
    results["capacity"] = capacity_of(results["closed"])
    if not results["capacity"]:
        raise SystemExit("error: no image was completed in the closed loops; --seconds takes a longer time")
    for repeat in range(repeats):
        for load in loads:
            rate = load * results["capacity"]
            for name in OPEN[:: -1 if repeat % 2 else 1]:
                row = _run(makers[name], lambda server, rate=rate, seed=repeat: open_loop(server, rate, seconds, seed))
                results["open"].append({"contestant": name, "load": load, "repeat": repeat, **row})
                print(f"{name} at {load:.0%}: p50 {row['p50'] * 1e3:.0f} ms, p99 {row['p99'] * 1e3:.0f} ms", flush=True)
    return results


def _run(make: Any, load: Any) -> dict[str, Any]:
    """What a load measures of a contestant, in a process that collects garbage as `tdc_fast.serve` does."""
    server = make()
    server.start()
    try:
        with short_pauses():
            began, others = time.monotonic(), seconds_of_others()
            measured = load(server)
            spent = (seconds_of_others() - others) / (time.monotonic() - began)
    finally:
        server.close(drain=False)
    return measured.to_json() | {"others": None if math.isnan(spent) else round(spent, 3)}


def seconds_of_others() -> float:
    """Processor time that other processes and other guests of the host have used since the start; NaN if unknown."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(number) for number in file.readline().split()[1:9]]
    except OSError:
        return math.nan
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()  # less idle and iowait


def overhead(problem: Problem, *, steps: int) -> dict[str, float]:
    """What the engine adds to the forward, as a share of it, in a batch of 8 that does not change, by sampler."""
    shares, images = {}, 8
    for sampler in ("ddim", "ddpm", "dpm++2m"):
        engine = problem.contestants(images)["engine"]()
        assert isinstance(engine, Engine)
        for seed in range(images):
            engine.submit(Request(seed=seed, steps=steps, sampler=sampler))
        engine.start()
        engine.close()
        statistics = engine.statistics
        shares[sampler] = round(statistics.step_seconds.total / statistics.forward_seconds - 1, 4)
    return shares


def machine_of(device: torch.device) -> dict[str, Any]:
    """Name, threads and instruction set of what computes."""
    if device.type == "cuda":
        return {"name": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    from tdc_fast._native import cpu_isa

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"name": name, "threads": torch.get_num_threads(), "instruction_set": cpu_isa()}


if __name__ == "__main__":
    sys.exit(main())
