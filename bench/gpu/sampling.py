"""Sampling on a GPU: images per second of DDIM in 50 steps, against the forwards alone and a dense model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.gpu import unet
from bench.gpu.rows import OURS, BenchRun, measure
from bench.gpu.timing import Budget, Candidate
from tdc_fast.diffusion import create_diffusion
from tdc_fast.diffusion.sampling_loop import SamplingLoop

STEPS, TINY_STEPS = 50, 8  # at least one step per expert
FORWARDS = "forwards, graph"


def row_of(run: BenchRun, flags: dict[str, Any], batch: int) -> dict[str, Any]:
    """Time the sampling of a batch and return the fields of the row."""
    problem = unet.Problem(run, flags, batch, unet.Case("", "forward"))
    steps = TINY_STEPS if run.tiny else STEPS
    diffusion = create_diffusion(diffusion_steps=unet.NUM_TIMESTEPS, learn_sigma=flags.get("learn_sigma", False))

    def draw(model: nn.Module) -> Candidate:
        loop, shape = SamplingLoop(diffusion, model.eval(), sampler="ddim", steps=steps), tuple(problem.x.shape)
        generator = run.generator()
        return lambda: loop.draw(shape, generator=generator, device=run.machine.device)

    def forwards() -> Candidate:
        forward = run.machine.captured(lambda: problem.routed(problem.x, problem.t))
        return lambda: [forward() for _ in range(steps)]

    makers: dict[str, Callable[[], Candidate]] = {
        OURS: lambda: draw(problem.routed),
        FORWARDS: forwards,
        "dense": lambda: draw(problem.base),
    }
    result = measure(run, makers, flush=False)
    images = draw(problem.routed)()
    finite = bool(images.isfinite().all())
    return {
        "batch": batch,
        "backend": run.backend or "fastest",
        "error": 0.0 if finite else float("inf"),
        "wrong": not finite,
        "images_per_s": 1e3 * batch / result["ms"][OURS],
        **result,
    }


def run_section(run: BenchRun, name: str, flags: dict[str, Any], batch: int, budget: Budget) -> None:
    """Adds the row; it is in the dtype of the run, with weights in it too."""
    steps = TINY_STEPS if run.tiny else STEPS
    labels = {"num_groups": 8, "uneven": False, "width": 1.0, "direction": f"DDIM-{steps} of {batch} images"}
    with torch.no_grad():
        run.row("sampling", name, labels, budget, partial(row_of, run, flags, batch))
