"""The whole UNet on a GPU, routed over N experts: forward and training step, against one dense model and the loop.

The routed model gets the mixed batch unsorted, so its time includes plan, sort and unsort; the loop gets its samples
sorted, with the segments' bounds known. The baseline is one dense model under torch.compile in a CUDA graph. A
training step here is forward, loss and backward with weights in the dtype of the run; step.py has the whole one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import channels_last
from bench.gpu import peers
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun, measure, relative_error
from bench.gpu.timing import Budget, Candidate
from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.macs import measure_macs

NUM_TIMESTEPS = 1000
COMPILED, OURS_COMPILED = "compiled dense, graph", "ours compiled, graph"
COMPILED_LOOP = "compiled loop"
WRONG = 1e-1  # relative error of a whole bf16 network above which its row is reported as wrong


@dataclass(frozen=True)
class Case:
    """What one row times.

    Attributes:
        model: the UNet's name.
        what: "forward" or "training step".
        num_groups: N.
        uneven: half of the batch is in group 0.
        width: mean width of the experts' pruning units, 1.0 for whole experts.
        headline: time compiled models too.
    """

    model: str
    what: str
    num_groups: int = 8
    uneven: bool = False
    width: float = 1.0
    headline: bool = False


class Problem:
    """A dense base, its routed model, its experts one by one, and a batch that spans all groups.

    Attributes:
        base: the dense model.
        routed: the routed model.
        full: the routed model at full width.
        segments: expert and samples of every group, in the sorted batch.
        x: the mixed batch; also t and target.
        sorted_x: the sorted batch; also sorted_t and sorted_target.
        order: indices of the sorted batch that give the mixed one.
    """

    def __init__(self, run: BenchRun, flags: dict[str, Any], batch: int, case: Case) -> None:
        torch.manual_seed(0)
        device, n = run.machine.device, case.num_groups
        self.run, self.case = run, case
        base = create_unet(**flags)
        for parameter in base.parameters():  # zero-initialised layers would hide errors and run on zeros
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        self.base = channels_last(base.to(device, run.dtype))
        self.groups = TimestepGroups.uniform(NUM_TIMESTEPS, n)
        widths = None
        if case.width < 1.0:
            widths = WidthPlan.uniform(self.base, self.groups.boundaries, spread_around(case.width, n))
        self.routed = pack_experts(self.base, self.groups, widths)
        with torch.no_grad():
            for parameter in self.routed.parameters():  # with equal experts a wrong route would give no error
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        self.full = self.routed if widths is None else pack_experts(self.base, self.groups)
        sizes = peers.group_sizes(batch, n, uneven=case.uneven)
        self.segments = peers.segments_of(sizes)
        ids = torch.arange(n).repeat_interleave(torch.tensor(sizes))
        starts = torch.tensor(self.groups.boundaries[:-1])
        self.sorted_t = (starts[ids] + torch.arange(batch) % min(self.groups.sizes)).to(device)
        generator = run.generator()
        shape = (batch, base.in_channels, flags["image_size"], flags["image_size"])
        x, target = (run.random(*shape, generator=generator) for _ in range(2))
        if base.out_channels != base.in_channels:
            target = target.repeat(1, base.out_channels // base.in_channels, 1, 1)
        self.sorted_x, self.sorted_target = (t.contiguous(memory_format=torch.channels_last) for t in (x, target))
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).to(device)
        self.x, self.t, self.target = self.sorted_x[order], self.sorted_t[order], self.sorted_target[order]
        self.order = order

    @cached_property
    def experts(self) -> nn.ModuleList:
        """The routed model's experts as dense models."""
        return nn.ModuleList(channels_last(self.routed.expert(i)) for i in range(self.case.num_groups))

    def calls_of(self, model: nn.Module) -> Candidate:
        """The forward or training step of a model over the mixed batch."""
        return self.step_of(model) if self.case.what == "training step" else lambda: model(self.x, self.t)

    def forwards(self, function: Callable[..., Tensor] | None = None) -> list[Callable[[], Tensor]]:
        """One call of `function(expert, x, t)` per expert, over its own samples; None calls the expert itself."""
        call = function or (lambda expert, x, t: expert(x, t))
        return [partial(call, self.experts[e], self.sorted_x[s], self.sorted_t[s]) for e, s in self.segments]

    def steps(self) -> list[Callable[[], None]]:
        """Forward, loss and gradients of one expert after the other, each over its own samples."""
        batch = self.x.shape[0]

        def step(expert: nn.Module, samples: slice) -> None:
            clear(expert.parameters())
            y = expert(self.sorted_x[samples], self.sorted_t[samples])
            share = (samples.stop - samples.start) / batch
            (nn.functional.mse_loss(y, self.sorted_target[samples]) * share).backward()

        return [partial(step, self.experts[e], s) for e, s in self.segments]

    def step_of(self, model: nn.Module) -> Callable[[], None]:
        """Forward, loss and gradients of a model over the mixed batch."""
        parameters = list(model.parameters())

        def step() -> None:
            clear(parameters)
            nn.functional.mse_loss(model(self.x, self.t), self.target).backward()

        return step

    def warm(self) -> None:
        """Run one training step and one forward of the routed model, so that all its kernels are compiled."""
        with torch.enable_grad():
            self.step_of(self.routed)()
        with torch.no_grad():
            self.routed(self.x, self.t)

    def share_of_macs(self) -> float:
        """MACs of the experts, each over as many samples, over those of the base."""
        x, t = self.x[:1], self.t[:1]
        of_experts = [measure_macs(expert, x, t) for expert in self.experts]
        return statistics.mean(of_experts) / measure_macs(self.base, x, t)

    def error(self) -> float:
        """Relative difference of the routed forward from the loop's."""
        with torch.no_grad():
            expected = torch.cat([call() for call in self.forwards()])[self.order]
            return relative_error(self.routed(self.x, self.t), expected)


def spread_around(width: float, num_groups: int) -> list[float]:
    """A width per expert, alternately 0.25 below and above this mean: equal widths would need no width arguments."""
    return [width + (0.25 if g % 2 else -0.25) * (num_groups > 1) for g in range(num_groups)]


def clear(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients."""
    for parameter in parameters:
        parameter.grad = None


def candidates(p: Problem) -> dict[str, Callable[[], Candidate]]:
    """Functions that make ours and its peers, by name; those that compile come last."""
    machine = p.run.machine
    ours, dense, full = (p.calls_of(model) for model in (p.routed, p.base, p.full))
    calls: list[Callable[[], Any]] = list(p.forwards() if p.case.what == "forward" else p.steps())
    makers: dict[str, Callable[[], Candidate]] = {OURS: lambda: ours, OURS_GRAPH: lambda: machine.captured(ours)}
    makers |= {"dense": lambda: dense, "dense, graph": lambda: machine.captured(dense)}
    if p.full is not p.routed:
        makers |= {"full width": lambda: full, "full width, graph": lambda: machine.captured(full)}
    makers |= peers.loop_peers(machine, calls)
    if p.case.headline:
        makers |= {COMPILED: lambda: compiled(p, p.base), OURS_COMPILED: lambda: compiled(p, p.routed)}
    elif p.case.what == "forward" and p.case == Case(p.case.model, "forward"):
        makers[COMPILED_LOOP] = lambda: compiled_loop(p)
    return makers


def torch_compiled(run: BenchRun, model: nn.Module) -> nn.Module:
    """The model under torch.compile, forgetting what was compiled before; a dry run does not compile."""
    if not run.machine.is_cuda:
        return model
    torch._dynamo.reset()
    fast: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return fast


def compiled(p: Problem, model: nn.Module) -> Candidate:
    """The forward or training step of a compiled model, in a CUDA graph of its own."""
    return p.run.machine.captured(p.calls_of(torch_compiled(p.run, model)))


def compiled_loop(p: Problem) -> Candidate:
    """Every expert through one compiled function; segments of equal size share one compiled graph."""
    torch._dynamo.reset()
    backend = "inductor" if p.run.machine.is_cuda else "eager"
    fast = torch.compile(lambda expert, x, t: expert(x, t), backend=backend)
    calls = peers.sequence(p.forwards(fast))
    calls()
    return calls


def row_of(run: BenchRun, flags: dict[str, Any], batch: int, case: Case) -> dict[str, Any]:
    """Time a case and return the fields of its row."""
    problem = Problem(run, flags, batch, case)
    makers = candidates(problem)
    error = problem.error()  # before training changes the weights
    with torch.set_grad_enabled(case.what != "forward"):
        result = measure(run, makers, flush=False, compiles=(COMPILED, OURS_COMPILED, COMPILED_LOOP))
    if case.width < 1.0:
        result["share_of_macs"] = problem.share_of_macs()
    return {"batch": batch, "backend": run.backend or "fastest", "error": error, "wrong": not error <= WRONG, **result}


def headline(model: str) -> list[Case]:
    """The two rows that the goals are about, with all peers."""
    return [Case(model, what, headline=True) for what in ("forward", "training step")]


def others(models: Iterable[str]) -> list[Case]:
    """Pruned experts, the other UNets, uneven groups."""
    first, *rest = models
    result = [Case(first, "forward", width=0.5), Case(first, "training step", width=0.5)]
    result += [Case(name, what) for name in rest for what in ("forward", "training step")]
    result += [Case(first, "forward", uneven=True), Case(first, "training step", uneven=True)]
    return [*result, Case(first, "forward", width=0.75)]


def run_section(
    run: BenchRun, unets: dict[str, dict[str, Any]], batch: int, wanted: list[Case], budget: Budget
) -> None:
    """Adds rows until all are done or the budget is spent."""
    torch.backends.cudnn.benchmark = True
    for case in wanted:
        labels = {
            "num_groups": case.num_groups, "uneven": case.uneven, "width": case.width, "direction": case.what,
        }  # fmt: skip
        run.row("unet", case.model, labels, budget, partial(row_of, run, unets[case.model], batch, case))
