"""`python -m bench.serving`: latency and throughput of the engine, and of what it is measured against, in real time."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.files import ROOT, slug, write_results
from bench.serving.contestants import MODELS, Problem
from bench.serving.loads import closed_loop, open_loop
from bench.serving.report import as_markdown, draw_picture
from tdc_fast.serving import Engine, Request

OPEN = ("engine", "request level", "dense")
"""Who gets requests at random times; a loop over experts saturates below these rates."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write a JSON and a Markdown file."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="digits", help="the network")
    parser.add_argument("--experts", type=int, default=8, help="N, the number of experts")
    parser.add_argument("--max_batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--loads", default="0.5,0.8,0.95", help="offered load as shares of the capacity")
    parser.add_argument("--seconds", type=float, default=24.0, help="time of each open loop; closed loops take half")
    parser.add_argument("--overhead_steps", type=int, default=200, help="steps in which the engine's share is measured")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda with --model cifar10")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps the default of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    parser.add_argument("--name", default="", help="file name without ending")
    parser.add_argument("--picture", type=Path, help="also draw latency against load into this .svg file")
    parser.add_argument("--note", default="", help="a sentence for the table, such as what else ran on the machine")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    problem = Problem(options.model, options.experts, device, getattr(torch, options.dtype))
    loads = [float(load) for load in options.loads.split(",")]
    began = time.monotonic()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "bench.serving", *(sys.argv[1:] if argv is None else argv)]),
        "machine": _machine(device),
        "note": options.note,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {
            "model": options.model, "experts": options.experts, "max_batch": options.max_batch,
            "seconds": options.seconds, "dtype": options.dtype,
        },
    }  # fmt: skip
    results["overhead"] = overhead(problem, steps=options.overhead_steps)
    results.update(measure(problem, options.max_batch, loads, options.seconds))
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    table = as_markdown(results)
    name = options.name or slug(f"serving-{options.model}-{results['machine']['name']}")
    write_results(results, table, options.out, name)
    if options.picture:
        draw_picture(results, options.picture)
    print(table)
    print(f"written: {options.out / name}.json and .md")
    return 0


def measure(problem: Problem, max_batch: int, loads: list[float], seconds: float) -> dict[str, Any]:
    """The closed loops of all contestants, and the open loops at shares of what both ways of batching can serve."""
    makers = problem.contestants(max_batch)
    closed, opened = {}, []
    for name, make in makers.items():
        closed[name] = _run(make, lambda server: closed_loop(server, 2 * max_batch, seconds / 2)).to_json()
        print(f"{name}: {closed[name]['images_per_second']:.1f} images/s with {2 * max_batch} clients", flush=True)
    capacity = min(closed[name]["images_per_second"] for name in ("engine", "request level"))
    for load in loads:
        for name in OPEN:
            row = _run(makers[name], lambda server, load=load: open_loop(server, load * capacity, seconds))
            opened.append({"contestant": name, "load": load, **row.to_json()})
            print(f"{name} at {load:.0%}: p50 {row.p50 * 1e3:.0f} ms, p99 {row.p99 * 1e3:.0f} ms", flush=True)
    return {"clients": 2 * max_batch, "closed": closed, "capacity": capacity, "open": opened}


def _run(make: Any, load: Any) -> Any:
    server = make()
    server.start()
    try:
        return load(server)
    finally:
        server.close(drain=False)


def overhead(problem: Problem, *, steps: int, images: int = 8) -> dict[str, float]:
    """What the engine adds to the forward, as a share of it, in a batch of 8 that does not change, by sampler."""
    shares = {}
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


def _machine(device: torch.device) -> dict[str, Any]:
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
