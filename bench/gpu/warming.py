"""Compiling kernels into the disk cache before anything is timed, in several processes at once."""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

import torch

from bench.files import ROOT
from bench.gpu import conv, growth, norm, step, unet
from bench.gpu.layers import NormLayer, Workload
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Budget


def start_warming(options: argparse.Namespace, budget: Budget) -> None:
    """Starts `options.warm_processes` processes that compile, and stops them when the budget is spent."""
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


def warm(run: BenchRun, work: Workload, index: int, count: int) -> int:
    """Launches once what the first rows of each section launch; the sections report failures.

    Args:
        run: the device, backend and dtype.
        work: the layers and UNets of the bench.
        index: which share of the launches is this process's.
        count: number of shares.

    Returns:
        The exit code, 0.
    """

    def model(case: unet.Case) -> None:
        unet.Problem(run, work.unets[case.model], work.batch, case).warm()

    def compilation(case: unet.Case, batch: int, routed: bool) -> None:  # the longest; Inductor caches it on disk
        problem = unet.Problem(run, work.unets[case.model], batch, case)
        with torch.set_grad_enabled(case.what != "forward"):
            unet.compiled(problem, problem.routed if routed else problem.base)

    def whole_step(batch: int) -> None:
        problem = step.Problem(run, work.unets[first], batch)
        with torch.enable_grad():
            problem.routed()()
            problem.stage1()()
            problem.dense(unet.torch_compiled(run, problem.dense_model()))()

    def convolution(case: conv.Case) -> None:
        problem = conv.Problem(run, case)
        problem.ours(run.backend, problem.widths())()

    def group_norm(layer: NormLayer) -> None:
        for direction in norm.DIRECTIONS:
            norm.Problem(run, layer, 1.0).ours(direction, run.backend)()

    first, *rest = work.unets
    backward, forward = unet.Case(first, "training step"), unet.Case(first, "forward")
    models = [backward, unet.Case(first, "training step", width=0.5)]
    models += [unet.Case(name, "training step") for name in rest]
    compiled = [
        partial(compilation, case, work.batch, routed) for case in (backward, forward) for routed in (False, True)
    ]
    compiled.append(partial(whole_step, work.batch))
    compiled += [partial(compilation, forward, batch, False) for batch in growth.BATCHES]
    convs = [case for case in conv.cases(work.design, work.convs) if case.num_groups == 8 and not case.uneven]
    jobs = [compiled, [partial(model, case) for case in models], [partial(convolution, case) for case in convs]]
    jobs.append([partial(group_norm, layer) for layer in work.norms])
    for job in (job for kind in jobs for job in kind[index::count]):
        try:
            job()
        except Exception as error:
            print(f"{job.args[0]}: {error}", file=sys.stderr)
    run.machine.synchronize()
    return 0
