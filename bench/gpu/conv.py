"""Routed convolution on a GPU, layer by layer: forward, dgrad and wgrad against cuDNN and loops of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import peers
from bench.gpu.layers import ConvLayer
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun, Row, best_of_ours, measure, relative_error
from bench.gpu.timing import Budget, Candidate
from tdc_fast import RoutingPlan, routed_conv2d
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.ops.backends import explain_problem
from tdc_fast.ops.checks import conv_problem
from tdc_fast.ops.hopper import HOPPER_FORM

DIRECTIONS = ("forward", "dgrad", "wgrad")
NUM_GROUPS = (8, 1, 4, 16)
FIRST_WIDTHS = (1.0, 0.5, 0.75)  # those that goals are about
WIDTHS = (*FIRST_WIDTHS, 0.25, 0.625)
MIXED = (1.0, 0.75, 0.5, 0.25)  # of the groups in turn
SUMS = "conv, sums"  # the section of their rows
SUMMED = {OURS_GRAPH, "dense, graph"}
WRONG = 2e-2  # relative error above which a row is reported as wrong; bf16 rounding alone gives about 4e-3


@dataclass(frozen=True)
class Case:
    """What one row times.

    Attributes:
        layer: the convolution.
        num_groups: N.
        uneven: half of the batch is in group 0.
        width: live fraction of the channels.
        direction: "forward", "dgrad" or "wgrad".
        mixed: the groups have the widths of MIXED, of which `width` is the mean.
    """

    layer: ConvLayer
    num_groups: int
    uneven: bool
    width: float
    direction: str
    mixed: bool = False

    @property
    def widths(self) -> list[float]:
        """The live fraction of each group."""
        return [MIXED[g % len(MIXED)] if self.mixed else self.width for g in range(self.num_groups)]


def cases(design: list[ConvLayer], models: list[ConvLayer]) -> Iterator[Case]:
    """Every combination of layer, groups, width and direction; those that the goals are about come first."""
    for layer in design:
        yield from (Case(layer, 8, False, width, d) for width in FIRST_WIDTHS for d in DIRECTIONS)
    for width, directions in ((1.0, DIRECTIONS[:1]), (0.5, DIRECTIONS[:1]), (1.0, DIRECTIONS[1:])):
        for layer in models:
            yield from (Case(layer, 8, False, width, d) for d in directions)
    for source in (design, models):
        for num_groups in NUM_GROUPS:
            for uneven in (False, True) if num_groups > 1 else (False,):
                widths = [(width, False) for width in (WIDTHS if num_groups == 8 else FIRST_WIDTHS)]
                widths += [(sum(MIXED) / len(MIXED), True)] if num_groups == 8 else []
                for width, mixed in widths:
                    for direction in DIRECTIONS:
                        for layer in source:
                            case = Case(layer, num_groups, uneven, width, direction, mixed)
                            if not _earlier(case, in_design=source is design):
                                yield case


def _earlier(case: Case, *, in_design: bool) -> bool:
    """Whether this case is among the first ones."""
    if case.num_groups != 8 or case.uneven or case.width not in FIRST_WIDTHS:
        return False
    return in_design or case.width == 1.0 or (case.width == 0.5 and case.direction == "forward")


class Problem:
    """The tensors of a case.

    Attributes:
        x: images (B, C_in, H, W), sorted, channels_last.
        dy: gradient of the output (B, C_out, OH, OW), sorted, channels_last.
        weight: (N, C_out, C_in, R, R), in memory [N, C_out, R, R, C_in].
        bias: (N, C_out).
        sizes: samples per group.
        plan: the plan of these groups.
        live: live input and output channels of each group.
    """

    def __init__(self, run: BenchRun, case: Case) -> None:
        layer, n = case.layer, case.num_groups
        generator = run.generator()
        taps = layer.filter
        self.run, self.case, self.layer = run, case, layer
        self.settings: dict[str, Any] = {"stride": layer.stride, "padding": taps // 2}
        fan_in = layer.in_channels * taps * taps
        x = run.random(layer.batch, layer.in_channels, layer.height, layer.width, generator=generator)
        dy = run.random(layer.batch, layer.out_channels, *layer.out_size, generator=generator)
        self.x, self.dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        weight = run.random(
            n, layer.out_channels, taps, taps, layer.in_channels, scale=fan_in**-0.5, generator=generator
        )
        self.weight = weight.permute(0, 1, 4, 2, 3)
        self.bias = run.random(n, layer.out_channels, generator=generator)
        self.sizes = peers.group_sizes(layer.batch, n, uneven=case.uneven)
        groups = torch.arange(n).repeat_interleave(torch.tensor(self.sizes)).to(run.machine.device)
        self.plan = RoutingPlan.from_groups(groups, n)
        sides = (layer.in_channels, layer.out_channels)
        self.live = [tuple(live_channels(channels, width) for channels in sides) for width in case.widths]
        for group, samples in peers.segments_of(self.sizes):
            live_in, live_out = self.live[group]
            self.x[samples, live_in:] = 0  # as routed operators leave them
            self.dy[samples, live_out:] = 0

    def widths(self) -> dict[str, Any]:
        """The operator's arguments in_widths and out_widths (N,); none at full width."""
        if self.case.width == 1.0:
            return {}
        live = torch.tensor(self.live, dtype=torch.int32, device=self.x.device)
        return {"in_widths": live[:, 0].contiguous(), "out_widths": live[:, 1].contiguous()}

    def flops(self) -> float:
        """FLOPs of the live channels."""
        shares = zip(self.live, self.sizes, strict=True)
        return sum(self.layer.flops(*live) * size for live, size in shares) / self.layer.batch

    def tensors(self) -> ConvTensors:
        """The tensors as the backends take them, without widths."""
        plan = self.plan
        return ConvTensors(self.x, self.weight, plan.offsets, plan.tiles, plan.weight_index, bias=self.bias)

    def described(self) -> ConvProblem:
        """The description of this case that the operators give to the backends."""
        direction = self.case.direction
        op = "routed_conv2d" if direction == "forward" else f"routed_conv2d_{direction}"
        stride, padding = ((value, value) for value in self.settings.values())
        return conv_problem(op, self.tensors(), stride, padding)

    def ours(self, backend: str | None, widths: dict[str, Any]) -> Candidate:
        """The routed operator in the direction of the case."""
        if self.case.direction == "forward":
            return lambda: routed_conv2d(
                self.x, self.weight, self.bias, self.plan, **self.settings, **widths, backend=backend
            )
        pair = {name: [value, value] for name, value in self.settings.items()}
        routing = {
            "offsets": self.plan.offsets, "tiles": self.plan.tiles, "weight_index": self.plan.weight_index,
            "in_widths": widths.get("in_widths"), "out_widths": widths.get("out_widths"),
            "upsample": 1, "backend": backend or "", **pair,
        }  # fmt: skip
        if self.case.direction == "dgrad":
            op, size = torch.ops.tdc_fast.routed_conv2d_dgrad, [self.layer.height, self.layer.width]
            return lambda: op(
                dy=self.dy, weight=self.weight, image_size=size, x2_channels=0, dead_zeros=True, **routing
            )
        wgrad, mask = torch.ops.tdc_fast.routed_conv2d_wgrad, [True, True, False]
        del routing["tiles"]
        return lambda: wgrad(dy=self.dy, x=self.x, x2=None, weight=self.weight, mask=mask, **routing)

    def conv(self, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
        """The cuDNN call for these tensors, in the direction of the case."""
        stride, padding = [self.layer.stride] * 2, [self.settings["padding"]] * 2
        if self.case.direction == "forward":
            return lambda: F.conv2d(x, weight, bias, stride, padding)
        mask = [True, False, False] if self.case.direction == "dgrad" else [False, True, True]
        backward = torch.ops.aten.convolution_backward
        sizes = [weight.shape[0]]
        return lambda: backward(dy, x, weight, sizes, stride, padding, [1, 1], False, [0, 0], 1, mask)

    def dense(self) -> Callable[[], Any]:
        """One expert's full-width convolution over the whole batch."""
        weight = self.weight[0].contiguous(memory_format=torch.channels_last)
        return self.conv(self.x, self.dy, weight, self.bias[0])

    def segments(self) -> list[Callable[[], Any]]:
        """One cuDNN call per expert with only its live channels: the loop's experts are physically smaller models."""
        calls = []
        for expert, samples in peers.segments_of(self.sizes):
            live_in, live_out = self.live[expert]
            parts = self.x[samples, :live_in], self.dy[samples, :live_out], self.weight[expert, :live_out, :live_in]
            x, dy, weight = (part.contiguous(memory_format=torch.channels_last) for part in parts)
            calls.append(self.conv(x, dy, weight, self.bias[expert, :live_out].contiguous()))
        return calls

    def error(self, ours: Any) -> float:
        """Relative difference of a result (for wgrad: of its dweight) from the loop's, zeros past the widths."""
        expected = torch.zeros_like(ours)
        for (expert, samples), call in zip(peers.segments_of(self.sizes), self.segments(), strict=True):
            part, (live_in, live_out) = call(), self.live[expert]
            if self.case.direction == "wgrad":
                expected[expert, :live_out, :live_in] = part[1]
            elif self.case.direction == "forward":
                expected[samples, :live_out] = part
            else:
                expected[samples, :live_in] = part[0]
        return relative_error(ours, expected)


def live_channels(channels: int, width: float) -> int:
    """Live channels at a width: a multiple of 8; all of fewer than 16 (image channels), which are never pruned."""
    if width == 1.0 or channels < 16:
        return channels
    return max(8, int(channels * width) // 8 * 8)


def explained(problem: Problem, backend: str | None) -> tuple[str | None, list[str]]:
    """The backend that the operator runs on, and the other GPU backends that support it."""
    what = explain_problem(problem.case.direction, problem.described(), backend)
    serving = [name for name in ("triton", "cuda", "hopper") if what.reasons.get(name, "absent") is None]
    if not what.forms.get("hopper", "").startswith(HOPPER_FORM):  # else its time would be that of `cuda`
        serving = [name for name in serving if name != "hopper"]
    return what.backend, [name for name in serving if name != what.backend]


def row_of(run: BenchRun, case: Case) -> dict[str, Any]:
    """Time a case and return the fields of its row."""
    problem = Problem(run, case)
    machine, widths = run.machine, problem.widths()
    chosen, others = explained(problem, run.backend)
    ours = problem.ours(run.backend, widths)

    def in_graph(backend: str | None, widths: dict[str, Any]) -> Callable[[], Candidate]:
        return lambda: machine.captured(problem.ours(backend, widths))

    makers: dict[str, Callable[[], Candidate]] = {OURS: lambda: ours, OURS_GRAPH: lambda: machine.captured(ours)}
    makers |= {f"{name}, graph": in_graph(name, widths) for name in others}
    if widths:
        makers["full width, graph"] = in_graph(run.backend, {})
    dense = problem.dense()
    makers |= {"dense": lambda: dense, "dense, graph": lambda: machine.captured(dense)}
    makers |= peers.loop_peers(machine, problem.segments())
    headline = case.layer.source == "design" and case.num_groups == 8 and not case.uneven and case.width == 1.0
    if case.direction == "forward" and case.width == 1.0:
        makers["grouped_mm"] = lambda: peers.grouped_matmul(problem.x, problem.weight, problem.sizes, case.layer.stride)
        if headline:
            makers["compiled loop"] = lambda: peers.compiled(machine, peers.sequence(problem.segments()))
    result = measure(run, makers, compiles=("compiled loop",))
    outcome = ours()
    error = problem.error(outcome if case.direction == "forward" else outcome[0])
    flops = problem.flops()
    best = best_of_ours(result)
    return {
        "source": case.layer.source,
        "shape": case.layer.shape,
        "uses": case.layer.uses,
        "filter": case.layer.filter,
        "stride": case.layer.stride,
        "channels": [case.layer.in_channels, case.layer.out_channels],
        "backend": chosen,
        "error": error,
        "wrong": not error <= WRONG,
        "TFLOPps": flops / best / 1e9,
        **result,
    }


def run_section(run: BenchRun, design: list[ConvLayer], models: list[ConvLayer], budget: Budget) -> None:
    """Adds rows in order of importance until all are done or the budget is spent."""
    torch.backends.cudnn.benchmark = True
    for case in cases(design, models):
        labels = {
            "num_groups": case.num_groups,
            "uneven": case.uneven,
            "width": case.width,
            "direction": case.direction,
        }
        labels |= {"mixed": True} if case.mixed else {}
        run.row("conv", str(case.layer), labels, budget, partial(row_of, run, case))


def sums(rows: list[Row], convs_of: dict[str, list[ConvLayer]], empty_launch: float) -> list[Row]:
    """For each UNet and direction a row with the time of all its convolutions, less an empty launch for each.

    Args:
        rows: those of the layers; of the sums, N = 8 even groups at full width count.
        convs_of: the distinct convolutions of each UNet, by its name.
        empty_launch: milliseconds.

    Returns:
        No row where a layer was not measured, or is wrong.
    """
    times: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["section"] != "conv" or "failed" in row or row["wrong"]:
            continue
        if (row["num_groups"], row["uneven"], row["width"]) == (8, False, 1.0) and row["ms"].keys() >= SUMMED:
            times[row["shape"], row["direction"]] = row["ms"]
    found = []
    for name, layers in convs_of.items():
        for direction in DIRECTIONS:
            parts = [(layer.uses, times.get((layer.shape, direction))) for layer in layers]
            if all(ms for _, ms in parts):
                total = {
                    peer: sum(uses * (ms[peer] - empty_launch) for uses, ms in parts if ms) for peer in sorted(SUMMED)
                }
                found.append({
                    "section": SUMS, "source": name, "layer": f"{name}: all convolutions", "direction": direction,
                    "num_groups": 8, "uneven": False, "width": 1.0, "backend": "", "ms": total, "absent": {},
                    "ratios": {"dense, graph": total[OURS_GRAPH] / total["dense, graph"]}, "error": 0.0, "wrong": False,
                })  # fmt: skip
    return found
