"""Stage 2 on several processes: each trains its own experts, and no gradient leaves it.

Experts are divided by their measured MACs (`tdc_fast.distributed.place_experts`). Only where there are more processes
than experts do several train one expert, each on a part of its samples, and add up its gradients. Experts that share
layers stay together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from tdc_fast.diffusion.loss_slope import MAX_FACTOR, LossSlopeSampler
from tdc_fast.diffusion.timestep_samplers import TimestepSampler
from tdc_fast.distributed import GradientSum, Team, on_all, place_experts, world
from tdc_fast.errors import invalid
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.sharing import groups_together, shared_rows
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training import cost
from tdc_fast.training.distributed_state import OwnExperts
from tdc_fast.training.ema import WeightAverages
from tdc_fast.training.portion import Portion, Shard, subset
from tdc_fast.training.stage import Stage


@dataclass(frozen=True)
class OwnStage:
    """Stage 2 as one process sees it.

    Attributes:
        model: the experts of this process.
        stage: the stage with the settings of these experts.
        shard: their samples.
        state: how their weights become those of all experts.
    """

    model: RoutedModel
    stage: Stage
    shard: Shard
    state: OwnExperts

    @property
    def place(self) -> tuple[Shard, OwnExperts]:
        """What a `StageLoop` needs to know of it."""
        return self.shard, self.state

    def with_all_experts(self, averages: WeightAverages, rate: str) -> RoutedModel:
        """In the first process the model of all experts with the averages of a rate as its weights, else its own's."""
        device = next(self.model.parameters()).device
        averaged = self.state.whole_state(averages.averages[rate])
        if averaged is None:
            self.model.load_state_dict(averages.state_dict(rate))
            return self.model
        self.state.whole.load_state_dict(averaged)
        return self.state.whole.to(device)


def take_own_experts(
    config: TrainConfig, base: nn.Module, whole: RoutedModel, widths: WidthPlan | None, stage: Stage
) -> OwnStage:
    """Divide the experts among all processes and set up this one's.

    Args:
        config: the options of the run.
        base: what the experts start from, on its device.
        whole: all experts.
        widths: their widths; None for whole experts.
        stage: the stage of all experts.

    Raises:
        ValueError: a step would give a process no sample.
    """
    this, groups = world(), whole.groups
    shares = cost.stage2_shares(config, groups.num_groups)
    costs = [share * macs for share, macs in zip(shares, stage.macs_per_sample, strict=True)]
    sets = groups_together(shared_rows(base, config.shared_layers, groups.num_groups), groups.num_groups)
    teams = place_experts(costs, sets, this.size)
    _refuse_idle_processes(config, stage.batch_size, shares, teams)
    team = next(team for team in teams if this.rank in team.ranks)
    model = pack_own(base, groups, widths, config.shared_layers, team.groups)
    device = next(model.parameters()).device
    state = OwnExperts(model, copy.deepcopy(whole).cpu() if this.first else None, teams, this)
    portion = Portion(stage.batch_size, team.ranks.index(this.rank), len(team.ranks), team.groups)
    group, gradients = None, None
    for other in teams:  # all processes make all groups
        if len(other.ranks) > 1:
            made = this.team(other.ranks, device)
            if other is team:
                group, gradients = made, GradientSum(list(model.parameters()), made, this)
    own = replace(
        stage,
        rate_factors=subset(stage.rate_factors, team.groups),
        ema_lengths=subset(stage.ema_lengths, team.groups),
    )
    print(describe_teams(teams, costs))
    return OwnStage(model, own, Shard(portion, this, device, gradients, group, groups.num_groups), state)


def pack_own(
    base: nn.Module, groups: TimestepGroups, widths: WidthPlan | None, shared_layers: str, own: Sequence[int]
) -> RoutedModel:
    """Some of the experts in one model, which is told the expert of each sample: its groups are no intervals.

    Args:
        base: what the experts start from.
        groups: all groups.
        widths: the widths of all experts.
        shared_layers: as `pack_experts` takes it.
        own: the groups of the experts, ascending.
    """
    # Any intervals will do: the boundaries are only what the two parts that are packed must agree on.
    numbered = TimestepGroups([*range(len(own)), groups.num_timesteps], "own")
    if widths is not None:
        widths = replace(
            widths,
            boundaries=numbered.boundaries,
            experts=tuple(widths.experts[group] for group in own),
            macs=tuple(widths.macs[group] for group in own if widths.macs),
            budgets=tuple(widths.budgets[group] for group in own if widths.budgets),
        )
    device = next(base.parameters()).device
    return pack_experts(base, numbered, widths, shared_layers=shared_layers).to(device)


def adapt_sampler(sampler: TimestepSampler) -> None:
    """Let a sampler whose shares follow the losses add up what all processes have measured."""
    if isinstance(sampler, LossSlopeSampler):
        sampler.total = world().sum


def describe_teams(teams: Sequence[Team], costs: Sequence[float]) -> str:
    """Which process trains which experts, and how evenly the work is divided, in one line."""
    total = sum(costs)
    parts = []
    for team in teams:
        ranks = f"process {team.ranks[0]}" if len(team.ranks) == 1 else f"processes {', '.join(map(str, team.ranks))}"
        share = sum(costs[group] for group in team.groups) / total / len(team.ranks)
        parts.append(f"{ranks}: {', '.join(map(str, team.groups))} ({share:.1%} of the MACs each)")
    return "experts by process: " + "; ".join(parts)


def _refuse_idle_processes(config: TrainConfig, batch: int, shares: Sequence[float], teams: Sequence[Team]) -> None:
    """ValueError unless every step has a sample for each process."""
    least = 1 / MAX_FACTOR if config.stage2_slope_windows else 1.0
    for team in teams:
        # A group is never a whole sample away from its share, so it has at least the whole samples below it.
        samples = sum(int(batch * least * shares[group] + 1e-9) for group in team.groups)
        if samples < len(team.ranks):
            name = "stage2_batch" if config.stage2_batch else "batch_size"
            of_all = f"experts {', '.join(map(str, team.groups))} on {len(team.ranks)} processes"
            remedy = f"more, or fewer processes: a step must have a sample for each process ({of_all})"
            raise on_all(invalid(name, batch, remedy))
