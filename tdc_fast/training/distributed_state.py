"""The weights that a process has of a stage: gathered into the checkpoint that one process writes, and back.

The experts of several processes travel as dense state dicts, one per expert, whose layout does not depend on which
experts a process has. So a run goes on with another number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tdc_fast.distributed import Team, World, world
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.training.ema import WeightAverages
from tdc_fast.training.optimization import optimizer_state
from tdc_fast.training.stored_state import MOMENTS, StoredState

Expert = Mapping[str, Tensor]


class Gathered(NamedTuple):
    """What the files of a checkpoint hold of the weights.

    Attributes:
        model: state dict of the raw weights.
        averages: state dict of the averaged weights, by rate.
        optimizer: state dict of the optimizer.
    """

    model: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]


class DistributedState(Protocol):
    """What a process has of a model that several train.

    Attributes:
        whole: the whole model, for the names and shapes in checkpoints; read in the first process alone.
    """

    whole: nn.Module

    def gathered(self, averages: WeightAverages, optimizer: torch.optim.Optimizer) -> Gathered | None:
        """The whole model's state in the first process, None in the others. All call it."""

    def scattered(self, stored: StoredState | None) -> StoredState:
        """The state of this process's model, from the whole one's, which the first process has read. All call it."""


class WholeModel:
    """Every process has all weights.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole = model

    def gathered(self, averages: WeightAverages, optimizer: torch.optim.Optimizer) -> Gathered | None:
        """See `DistributedState.gathered`; nothing is copied."""
        if not world().first:
            return None
        averaged = {rate: averages.state_dict(rate) for rate in averages.averages}
        return Gathered(self.whole.state_dict(), averaged, optimizer_state(optimizer))

    def scattered(self, stored: StoredState | None) -> StoredState:
        """See `DistributedState.scattered`."""
        return world().from_first(lambda: _present(stored), "checkpoints")


class OwnExperts:
    """A process has the experts of its team.

    Args:
        model: the process's own model, with these experts in the order of their groups.
        whole: the model with all experts, on the CPU, as it was packed; None but in the first process.
        teams: all teams.
        this: the processes.
    """

    def __init__(self, model: RoutedModel, whole: RoutedModel | None, teams: Sequence[Team], this: World) -> None:
        self._model, self._world, self._teams = model, this, teams
        self._team = next(team for team in teams if this.rank in team.ranks)
        self._mirror = copy.deepcopy(model).cpu()
        self._initial: dict[str, Tensor] = {}
        self.whole: RoutedModel = whole or self._mirror
        if whole is not None:
            self._initial = {name: value.clone() for name, value in whole.state_dict().items()}

    def gathered(self, averages: WeightAverages, optimizer: torch.optim.Optimizer) -> Gathered | None:
        """See `DistributedState.gathered`. Only what an expert has is sent: a pruned one its live channels."""
        parameters = list(self._model.parameters())
        model = self.whole_state([parameter.detach() for parameter in parameters])
        averaged = {rate: self.whole_state(values) for rate, values in averages.averages.items()}
        # A parameter that no expert of this process uses, as of a unit that none of them has, has no moments.
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        moments = {
            moment: self.whole_state(
                [s.get(moment, torch.zeros_like(p)) for s, p in zip(states, parameters, strict=True)], zero=True
            )
            for moment in MOMENTS
        }
        if model is None:
            return None
        step = next(state["step"] for state in states if state)
        numbered = {
            number: {"step": step.clone(), **{moment: _present(moments[moment])[name] for moment in MOMENTS}}
            for number, (name, _) in enumerate(self.whole.named_parameters())
        }
        settings = [{**group, "params": list(numbered)} for group in optimizer_state(optimizer)["param_groups"]]
        present = {rate: dict(_present(values)) for rate, values in averaged.items()}
        return Gathered(model, present, {"state": numbered, "param_groups": settings})

    def scattered(self, stored: StoredState | None) -> StoredState:
        """See `DistributedState.scattered`. One kind of numbers is sent at a time."""
        rates, rest = self._world.from_first(
            lambda: (list(_present(stored).averages), _present(stored).rest), "checkpoints"
        )
        model = self._scattered(None if stored is None else stored.model)
        averages = {rate: self._scattered(None if stored is None else stored.averages[rate]) for rate in rates}
        step = self._world.from_first(lambda: _present(stored).moments[0]["step"], "checkpoints")
        by_moment = {}
        for moment in MOMENTS:
            values = None
            if stored is not None:
                names = [name for name, _ in self.whole.named_parameters()]
                values = {name: stored.moments[number][moment] for number, name in enumerate(names)}
            by_moment[moment] = self._scattered(values, zero=True)
        moments = {
            number: {"step": step.clone(), **{moment: by_moment[moment][name] for moment in MOMENTS}}
            for number, (name, _) in enumerate(self._mirror.named_parameters())
        }
        return StoredState(model, averages, moments, rest)

    @torch.no_grad()
    def whole_state(self, values: Sequence[Tensor], zero: bool = False) -> dict[str, Tensor] | None:
        """A state dict of the whole model in the first process, None in the others. All call it.

        Args:
            values: of this process's parameters, in their order.
            zero: what no expert has is zero, and not the weight that it was packed with.
        """
        own: dict[int, Expert] = {}
        if self._world.rank == self._team.ranks[0]:
            for parameter, value in zip(self._mirror.parameters(), values, strict=True):
                parameter.copy_(value)
            own = {group: self._mirror.expert_state(number) for number, group in enumerate(self._team.groups)}
        everyone = self._world.to_first(own, "checkpoints")
        if not self._world.first:
            return None
        self._begin(zero)
        for experts in everyone:
            for group, state in experts.items():
                self.whole.load_expert_state(group, state)
        state = self.whole.state_dict()  # an ordered dict with the versions of the modules, as one process stores it
        state.update({name: value.clone() for name, value in state.items()})
        return state

    @torch.no_grad()
    def _scattered(self, state: Mapping[str, Tensor] | None, zero: bool = False) -> dict[str, Tensor]:
        """This process's share of a state dict of the whole model, or of values of its parameters by name."""
        self._mirror.load_state_dict(self._model.state_dict())  # for what no expert has; see `_begin`
        if zero:
            _make_zero(self._mirror)
        if state is not None:
            self._begin()
            self.whole.load_state_dict({**self._initial, **state})

        def experts_of(rank: int) -> dict[int, Expert]:
            team = next(team for team in self._teams if rank in team.ranks)
            return {group: self.whole.expert_state(group) for group in team.groups}

        experts = self._world.from_first_to_each(experts_of, "checkpoints")
        for number, group in enumerate(self._team.groups):
            self._mirror.load_expert_state(number, experts[group])
        return {name: value.clone() for name, value in self._mirror.state_dict().items()}

    def _begin(self, zero: bool = False) -> None:
        """Reset what no expert's state dict holds, such as the weights inside units of width 0."""
        self.whole.load_state_dict(self._initial)
        if zero:
            _make_zero(self.whole)


def _make_zero(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def _present(value: Any) -> Any:
    assert value is not None
    return value
