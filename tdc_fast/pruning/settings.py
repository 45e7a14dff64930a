"""The settings of a pruning search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tdc_fast.errors import invalid
from tdc_fast.nn.inference import DTYPES
from tdc_fast.pruning.importance import Importance
from tdc_fast.pruning.latency.layers import LatencyModel, Layer

IMPORTANCES = ("taylor", "magnitude")
BUDGETS_IN = ("macs", "latency")


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """What decides the outcome of a search, apart from model, groups, data, agent and scorer.

    Attributes:
        k: 0 < k <= 1 of the budget law, or for each group its share of the base's cost.
        importance: "taylor" (on the group's own timesteps, in units of loss across all units), "magnitude" (of the
            weights, balanced by the units' MACs), or a function from the group's index to {unit: (atoms,)}. It decides
            which atoms of a unit are kept first, whichever agent chooses the widths.
        difficulty: "snr", "snr-reversed", or one number per group, such as losses; see
            `difficulty_order`.
        tolerance: share of a budget that may stay unused.
        max_batches: calibration batches that are read.
        rounds: rounds of proposing and scoring in each group.
        candidates: candidates per round.
        use_memory: whether the agent sees what was tried before.
        max_samples: samples that one pass of the default scorer may hold.
        strict: raise instead of warn where the units are too coarse to land within the tolerance.
        seed: seed of everything that is drawn.
        dtype: what the base and its candidates compute in where importance and the default scorer's losses are
            measured: torch.float32, torch.bfloat16 or torch.float16.
        shared_layers: layers that groups share in the packed model, as `pack_experts` takes them. Pruned groups that
            share a layer of a unit order its atoms alike, by the mean of their importances.
        k_name: what errors call `k`, such as the flag that it came from.
        budget_in: what budgets count, "macs", or "latency": the time that `latency` estimates.
        latency: estimates the time of layers (`LatencyTable`, `Roofline`), for budgets in time; with budgets in MACs
            the plan only records it. None estimates nothing.
        width_step: steps the widths of convolutions by a multiple of this many channels wherever the unit allows, or
            by what a function of the narrowed layer gives, such as `Roofline.step`; never finer than the units' own.

    Raises:
        ValueError: naming a setting that is impossible. Those that need the groups are checked by the search.
    """

    k: float | Sequence[float]
    importance: str | Callable[[int], Importance] = "taylor"
    difficulty: str | Sequence[float] = "snr"
    tolerance: float = 0.01
    max_batches: int = 8
    rounds: int = 1
    candidates: int = 8
    use_memory: bool = True
    max_samples: int = 1024
    strict: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    shared_layers: str | Sequence[str] = ""
    k_name: str = "k"
    budget_in: str = "macs"
    latency: LatencyModel | None = None
    width_step: int | Callable[[Layer], int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.importance, str) and self.importance not in IMPORTANCES:
            raise invalid("importance", self.importance, f"one of {IMPORTANCES}, or a function of the group's index")
        if self.dtype not in DTYPES:
            raise invalid("dtype", self.dtype, "torch.float32, torch.bfloat16 or torch.float16")
        if self.budget_in not in BUDGETS_IN:
            raise invalid("budget_in", self.budget_in, f"one of {BUDGETS_IN}")
        if self.budget_in == "latency" and self.latency is None:
            raise invalid("latency", None, "a model of the time of layers, such as a LatencyTable or a Roofline")
        if not callable(self.width_step) and self.width_step < 1:
            raise invalid("width_step", self.width_step, "at least 1 channel, or a function of a layer")
        if self.max_batches < 1:
            raise invalid("max_batches", self.max_batches, "at least 1")
