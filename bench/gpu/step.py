"""The whole training step on a GPU: those that `tdc_fast.train` runs, against one dense model's.

Draw of timesteps and noise, forward under bf16 autocast, loss, backward, gradient norm, AdamW, moving average; weights
in fp32. Ours also has the sums of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.recipe import Recipe
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun, measure
from bench.gpu.timing import Budget, Candidate
from bench.gpu.unet import COMPILED, spread_around, torch_compiled
from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.diffusion.timestep_samplers import create_timestep_sampler
from tdc_fast.graphs import graphed
from tdc_fast.models.iddpm import UNet
from tdc_fast.runs.build import build_diffusion, build_unet, place
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.stage import Stage
from tdc_fast.training.step import TrainingStep

WHOLE = "whole training step"
NUM_GROUPS = 8
RECIPE = "improved-diffusion"
STAGE1 = "ours, stage 1, graph"


class Problem:
    """A dense base in fp32, its routed model, and a batch.

    Args:
        run: the device and dtype; the step is in bf16 autocast unless the run is in float32.
        flags: of the UNet.
        batch: images.
        width: mean width of the experts' pruning units.
        num_groups: N.
    """

    def __init__(
        self, run: BenchRun, flags: dict[str, Any], batch: int, width: float = 1.0, num_groups: int = NUM_GROUPS
    ) -> None:
        torch.manual_seed(0)
        mixed = run.dtype != torch.float32
        self.config = TrainConfig(**flags, precision="bf16" if mixed else "fp32", batch_size=batch)
        self.device, self.batch = run.machine.device, batch
        self.diffusion = build_diffusion(self.config)
        self.groups = TimestepGroups.uniform(self.config.diffusion_steps, num_groups)
        self.base = self.dense_model()
        size = self.config.image_size
        x = torch.rand(batch, 3, size, size, device=self.device) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.width = width

    def dense_model(self) -> UNet:
        """A dense UNet with new weights, ready for training."""
        return place(build_unet(self.config, 3), self.device).train()

    def routed(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """The step of stage 2: all experts in one batch."""
        widths = None
        if self.width < 1.0:
            spread = spread_around(self.width, self.groups.num_groups)
            widths = WidthPlan.uniform(self.base, self.groups.boundaries, spread)
        model = pack_experts(self.base, self.groups, widths).to(self.device).train()
        return self._step_of(model, self.groups)

    def stage1(self) -> Callable[[], tuple[Tensor, Tensor]]:
        """The step of stage 1, for the base."""
        return self._step_of(self.base, None)

    def dense(self, model: nn.Module | None = None, *, for_graph: bool = False) -> Candidate:
        """improved-diffusion's step for a dense model in plain torch; None for a new one."""
        chosen = self.dense_model() if model is None else model
        recipe = Recipe(chosen, self.diffusion, autocast=self.config.mixed_precision, for_graph=for_graph)
        return lambda: recipe.step(self.x)

    def _step_of(self, model: nn.Module, groups: TimestepGroups | None) -> Callable[[], tuple[Tensor, Tensor]]:
        n = groups.num_groups if groups else 0
        steps = self.diffusion.num_timesteps
        stage = Stage(
            name="experts" if groups else "base",
            steps=None,
            batch_size=self.batch,
            learning_rate=LearningRate(self.config.lr),
            macs_per_sample=(0,) * max(n, 1),
            group_weights=[size / steps for size in groups.sizes] if groups else None,
            loss_scale=float(max(n, 1)),
            origin={},
        )
        name = "stratified" if groups else "uniform"
        sampler = create_timestep_sampler(name, steps, groups=groups, weighting="per_group" if groups else "unbiased")
        step = TrainingStep(self.config, stage, model, self.diffusion, sampler, groups)
        prepared = {key: value.to(self.device) for key, value in sampler.prepare(self.batch).items()}
        rate, number = (torch.tensor(value, dtype=torch.float64, device=self.device) for value in (1e-4, 1.0))
        return partial(step, self.x, {}, prepared, rate, number)


def captured(run: BenchRun, step: Callable[[], tuple[Tensor, Tensor]], name: str) -> Candidate:
    """The step as `tdc_fast.train` runs it: from a graph after its first calls; on the CPU, the step itself.

    Raises:
        RuntimeError: it cannot be captured; says why.
    """
    replay = graphed(step, run.machine.device, name=name, clone=False, required=run.machine.is_cuda)
    for _ in range(3):  # two as they are, then the capture
        replay()
    return replay


def row_of(run: BenchRun, flags: dict[str, Any], batch: int, width: float) -> dict[str, Any]:
    """Time the whole step and return the fields of its row."""
    problem, machine = Problem(run, flags, batch, width), run.machine
    ours, stage1 = problem.routed(), problem.stage1()

    def compiled() -> Candidate:
        model = torch_compiled(run, problem.dense_model())
        return machine.captured(problem.dense(model, for_graph=machine.is_cuda))

    makers: dict[str, Callable[[], Candidate]] = {
        OURS: lambda: ours,
        OURS_GRAPH: lambda: captured(run, ours, "the step of stage 2"),
        STAGE1: lambda: captured(run, stage1, "the step of stage 1"),
        RECIPE: problem.dense,
        "dense, graph": lambda: machine.captured(problem.dense(for_graph=machine.is_cuda)),
    }
    if width == 1.0:
        makers[COMPILED] = compiled
    with torch.enable_grad():
        result = measure(run, makers, flush=False, compiles=(COMPILED,))
        _, losses = ours()
    finite = bool(losses.isfinite().all())
    facts = {"batch": batch, "backend": run.backend or "fastest", "error": 0.0 if finite else float("inf")}
    return {**facts, "wrong": not finite, **result}


def run_section(
    run: BenchRun, name: str, flags: dict[str, Any], cases: Sequence[tuple[int, float]], budget: Budget
) -> None:
    """Adds a row per case, a batch size and a mean width of the experts, until the budget is spent."""
    for batch, width in cases:
        labels = {"num_groups": NUM_GROUPS, "uneven": False, "width": width, "direction": WHOLE}
        run.row("training", f"{name}, B {batch}", labels, budget, partial(row_of, run, flags, batch, width))
