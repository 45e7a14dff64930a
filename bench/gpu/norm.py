"""Routed group norm with scale, shift and SiLU on a GPU: time, and bandwidth against a measured copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import peers
from bench.gpu.layers import NormLayer
from bench.gpu.rows import OURS, OURS_GRAPH, BenchRun, best_of_ours, measure, relative_error
from bench.gpu.timing import Budget, Candidate
from tdc_fast import RoutingPlan, routed_group_norm
from tdc_fast.kernels.problems import NormProblem, NormTensors
from tdc_fast.nn import layers
from tdc_fast.ops.backends import explain_problem
from tdc_fast.ops.checks import norm_problem
from tdc_fast.ops.hopper import NORM_FORMS

NUM_GROUPS = 8
EPS = 1e-5
DIRECTIONS = ("forward", "backward")
WRONG = 2e-2


class Problem:
    """The tensors of a layer.

    Attributes:
        x: images (B, C, H, W), sorted, channels_last.
        dy: gradient of the output, like x.
        weight: (N, C), as is bias.
        scale: (B, C), as is shift; None where the layer has none.
        plan: the plan of even groups.
        width: live fraction of the channels, in whole normalisation groups.
        widths: live channels per group, int32 (N,); None at full width.
    """

    def __init__(self, run: BenchRun, layer: NormLayer, width: float) -> None:
        generator = run.generator()
        shape = (layer.batch, layer.channels, layer.height, layer.width)
        self.layer, self.machine = layer, run.machine
        x, dy = (run.random(*shape, generator=generator) for _ in range(2))
        self.x, self.dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        self.weight, self.bias = (run.random(NUM_GROUPS, layer.channels, generator=generator) for _ in range(2))
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        if layer.modulated:
            self.scale, self.shift = (run.random(*shape[:2], generator=generator) for _ in range(2))
        sizes = peers.group_sizes(layer.batch, NUM_GROUPS, uneven=False)
        groups = torch.arange(NUM_GROUPS).repeat_interleave(torch.tensor(sizes)).to(self.x.device)
        self.plan = RoutingPlan.from_groups(groups, NUM_GROUPS)
        per_group = layer.channels // layer.num_groups
        live = int(layer.num_groups * width) * per_group
        self.width = live / layer.channels
        whole = torch.ones(NUM_GROUPS, dtype=torch.int32, device=self.x.device)
        self.widths = None if width == 1.0 else whole * live

    def routed(self, backend: str | None) -> Tensor:
        """The routed operator's output."""
        return routed_group_norm(
            self.x, self.weight, self.bias, self.plan, num_groups=self.layer.num_groups, eps=EPS, widths=self.widths,
            scale=self.scale, shift=self.shift, activation="silu" if self.layer.silu else None, backend=backend,
        )  # fmt: skip

    def described(self, direction: str) -> NormProblem:
        """The description of the layer that the operators give to the backends."""
        op = "routed_group_norm" if direction == "forward" else f"routed_group_norm_{direction}"
        t = NormTensors(
            self.x, self.weight, self.bias, self.plan.offsets, self.plan.weight_index, self.widths, self.scale,
            self.shift,
        )  # fmt: skip
        return norm_problem(op, t, self.layer.num_groups, EPS, self.layer.silu)

    def ours(self, direction: str, backend: str | None) -> Candidate:
        """The routed operator, "forward" or "backward"."""
        if direction == "forward":
            return lambda: self.routed(backend)
        ops = torch.ops.tdc_fast
        tensors = {
            "x": self.x, "weight": self.weight, "bias": self.bias, "scale": self.scale, "shift": self.shift,
            "x2": None, "offsets": self.plan.offsets, "weight_index": self.plan.weight_index, "widths": self.widths,
        }  # fmt: skip
        settings = {"num_groups": self.layer.num_groups, "eps": EPS, "silu": self.layer.silu, "backend": backend or ""}
        _, mean, rstd, counters = ops.routed_group_norm(**tensors, **settings)
        mask = [True, True, True, self.scale is not None, self.shift is not None, False]
        backward = ops.routed_group_norm_backward
        return lambda: backward(dy=self.dy, mean=mean, rstd=rstd, counters=counters, mask=mask, **tensors, **settings)

    def dense(self, function: Callable[..., Tensor], direction: str) -> Candidate:
        """`function(x, weight, bias, scale, shift)` with one expert's weight and bias, or its gradients."""
        inputs = [self.x, self.weight[0].clone(), self.bias[0].clone(), self.scale, self.shift]
        if direction == "forward":
            return lambda: function(*inputs)
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        with torch.enable_grad():
            y = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return lambda: torch.autograd.grad(y, wanted, self.dy, retain_graph=True)

    def layer_sequence(self) -> Callable[..., Tensor]:
        """What the dense model runs: the norm in fp32, then scale, shift and SiLU one by one."""
        norm = layers.GroupNorm(self.layer.num_groups, self.layer.channels, eps=EPS, affine=False)
        silu = self.layer.silu

        def sequence(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
            y = F.group_norm(x.float(), norm.num_groups, weight.float(), bias.float(), EPS).to(x.dtype)
            if scale is not None and shift is not None:
                y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return F.silu(y) if silu else y

        return sequence

    def low_precision_sequence(self) -> Callable[..., Tensor]:
        """The same without casts to fp32; torch's kernel computes the statistics in fp32 anyway."""

        def sequence(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
            y = F.group_norm(x, self.layer.num_groups, weight, bias, EPS)
            if scale is not None and shift is not None:
                y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            return F.silu(y) if self.layer.silu else y

        return sequence

    def bytes_moved(self, direction: str) -> float:
        """The least bytes that must move: x and y once; in the backward x, dy and dx once."""
        passes = 2 if direction == "forward" else 3
        return passes * self.layer.elements * self.width * self.x.element_size()

    def error(self, backend: str | None) -> float:
        """Relative difference of the routed forward from torch's in fp32, computed expert by expert."""
        calls, sequence = self.routed(backend), self.layer_sequence()
        sizes = peers.group_sizes(self.layer.batch, NUM_GROUPS, uneven=False)
        if self.widths is not None:
            return 0.0 if not calls[:, int(self.width * self.layer.channels) :].any() else float("inf")
        parts = [
            sequence(
                self.x[s].float(), self.weight[e].float(), self.bias[e].float(),
                None if self.scale is None else self.scale[s].float(),
                None if self.shift is None else self.shift[s].float(),
            )
            for e, s in peers.segments_of(sizes)
        ]  # fmt: skip
        return relative_error(calls, torch.cat(parts))


def row_of(run: BenchRun, layer: NormLayer, direction: str, width: float, copy_rate: float) -> dict[str, Any]:
    """Time a layer and return the fields of its row; `copy_rate` is that of a measured copy in TB/s.

    `net_us` and `net_of_copy` are of our time in a graph less an empty launch.
    """
    problem = Problem(run, layer, width)
    machine = run.machine
    what = explain_problem(direction, problem.described(direction), run.backend)
    ours = problem.ours(direction, run.backend)

    def in_graph(backend: str) -> Callable[[], Candidate]:
        return lambda: machine.captured(problem.ours(direction, backend))

    makers: dict[str, Callable[[], Candidate]] = {OURS: lambda: ours, OURS_GRAPH: lambda: machine.captured(ours)}
    serving = [name for name in ("triton", "cuda", "hopper") if what.reasons.get(name, "absent") is None]
    if what.forms.get("hopper") not in NORM_FORMS:  # else its time would be that of `cuda`
        serving = [name for name in serving if name != "hopper"]
    for name in serving:
        if name != what.backend:
            makers[f"{name}, graph"] = in_graph(name)
    fp32, low = problem.layer_sequence(), problem.low_precision_sequence()
    makers["torch"] = lambda: problem.dense(fp32, direction)
    makers["torch, low precision"] = lambda: problem.dense(low, direction)
    if direction == "forward":
        makers["torch, graph"] = lambda: machine.captured(problem.dense(fp32, direction))
    result = measure(run, makers)
    best = best_of_ours(result)
    moved = problem.bytes_moved(direction)
    rate, net = moved / best / 1e9, result["ms"].get(OURS_GRAPH, best) - machine.empty_launch
    error = problem.error(run.backend)
    return {
        "uses": layer.uses,
        "backend": what.backend,
        "error": error,
        "wrong": not error <= WRONG,
        "TBps": rate,
        "of_copy": rate / copy_rate,
        "size": [layer.height, layer.width],
        "megabytes": layer.elements * problem.x.element_size() / 1e6,
        "net_us": 1e3 * net,
        "net_of_copy": moved / max(net, 1e-6) / 1e9 / copy_rate,
        **result,
    }


def run_section(run: BenchRun, norms: list[NormLayer], budget: Budget, copy_rate: float) -> None:
    """Adds rows until all are done or the budget is spent; `copy_rate` is that of a measured copy in TB/s."""
    for width in (1.0, 0.5):
        for layer in norms:
            for direction in DIRECTIONS:
                labels = {"num_groups": NUM_GROUPS, "width": width, "direction": direction}
                measured = partial(row_of, run, layer, direction, width, copy_rate)
                run.row("group norm", str(layer), labels, budget, measured)
