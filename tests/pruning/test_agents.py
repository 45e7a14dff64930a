"""What each agent proposes, and that it is seen to use what it is given."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from tdc_fast.models.iddpm import UNet
from tdc_fast.pruning.agents import AGENTS, Evolution, Greedy, make_agent
from tdc_fast.pruning.agents.starts import rescaled, starting_proposals
from tdc_fast.pruning.budget import budget_of
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.memory import Memory
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.task import Answer, Proposal, Task, Trial, as_key
from tests.pruning.tiny import task_of

SEARCHING = sorted(set(AGENTS) - {"taylor", "magnitude", "llm"})


@pytest.fixture
def task(unet: UNet, unet_costs: UnitCosts) -> Task:
    return task_of(unet.pruning_units(), unet_costs, budget_of(0.6, unet_costs.full()))


def trial(task: Task, widths: dict[str, int], score: float, group: int = 0, place: int = 0) -> Trial:
    return Trial(widths, task.costs.total(widths), score, dict(widths), group=group, candidate=place)


class Hidden:
    """A scorer with a secret: the loss is the distance from widths that nobody is told of."""

    samples = 1

    def __init__(self, task: Task) -> None:
        rng = np.random.default_rng(5)
        wish = {unit.name: int(rng.choice(unit.widths())) for unit in task.units}
        self.secret = task.project(wish).widths
        self.channels = {unit.name: unit.channels for unit in task.units}

    def loss(self, widths: dict[str, int]) -> float:
        return sum(abs(widths[name] - best) / self.channels[name] for name, best in self.secret.items())

    def score(self, task: Task, candidates: list[dict[str, int]], advance: object = None) -> list[float]:
        return [1.0 + self.loss(widths) for widths in candidates]


@pytest.mark.parametrize("agent", ["evolution", "tpe", "greedy"])
def test_searching_with_a_memory_finds_what_searching_without_one_does_not(agent: str, task: Task) -> None:
    scorer = Hidden(task)

    def found(use_memory: bool) -> float:
        scores = []
        for seed in range(2):
            best = search_widths(
                dataclasses.replace(task, seed=seed), make_agent(agent), scorer, rounds=5, candidates=5,
                use_memory=use_memory,
            )  # fmt: skip
            scores.append(best.score - 1.0)
        return float(np.mean(scores))

    assert found(True) < 0.85 * found(False)


@pytest.mark.parametrize("agent", SEARCHING)
def test_proposals_are_as_many_as_asked_complete_and_new(agent: str, task: Task) -> None:
    widths = [task.most_important().widths, task.project(dict.fromkeys(task.costs.tables, 8)).widths]
    seen = tuple(trial(task, w, 1.0 + place, place=place) for place, w in enumerate(widths))
    for memory, number in (((), 0), (seen, 1)):
        proposals = make_agent(agent).propose(dataclasses.replace(task, memory=memory, round=number), 5)
        assert len(proposals) == 5
        keys = {as_key(task.units, task.project(proposal.widths).widths) for proposal in proposals}
        assert len(keys) == 5 and not keys & {as_key(task.units, known.widths) for known in memory}
        assert all(proposal.reason for proposal in proposals)


def test_a_first_round_begins_with_the_most_important_and_the_best_of_earlier_groups(task: Task) -> None:
    rich = {unit.name: unit.channels for unit in task.units}
    flat = {unit.name: 0 if unit.kind == "attention" else unit.channels for unit in task.units}
    earlier = (trial(task, rich, 2.0, 0), trial(task, flat, 1.0, 0, 1), trial(task, rich, 3.0, 1))
    proposals = starting_proposals(dataclasses.replace(task, group=2, earlier=earlier), 6)
    assert proposals[0].widths == task.most_important().widths
    assert [proposal.reason[:20] for proposal in proposals[1:3]] == ["the best of group 1,", "the best of group 0,"]
    later = starting_proposals(dataclasses.replace(task, group=2, round=1), 6)
    assert task.most_important().widths not in [proposal.widths for proposal in later]


def test_widths_of_another_budget_are_scaled_before_they_are_moved(task: Task) -> None:
    rich = {unit.name: unit.channels for unit in task.units}
    scaled = rescaled(task, trial(task, rich, 1.0))
    shares = {scaled[unit.name] / unit.channels for unit in task.units if unit.channels == 16 and unit.step == 8}
    assert len(shares) == 1
    assert abs(task.costs.total(scaled) / task.budget - 1) < 0.25


def test_greedy_cuts_where_loss_per_mac_is_least(task: Task) -> None:
    cheap = task.units[0].name
    measured = {unit.name: {width: (unit.channels - width) * 1.0 for width in unit.widths()} for unit in task.units}
    measured[cheap] = dict.fromkeys(measured[cheap], 0.0)
    (first,) = Greedy().propose(dataclasses.replace(task, measured=measured), 1)
    assert first.widths[cheap] == 0
    steps = {unit.name: unit for unit in task.units}
    rates = {name: task.costs.tables[name][unit.channels] / unit.channels for name, unit in steps.items()}
    dearest = max((name for name in rates if name != cheap), key=lambda name: rates[name])
    assert first.widths[dearest] < steps[dearest].channels  # most MACs saved per unit of loss


def test_evolution_keeps_what_its_parents_share(task: Task) -> None:
    parents = tuple(trial(task, task.most_important().widths, 1.0, place=place) for place in range(3))
    children = Evolution().propose(dataclasses.replace(task, memory=parents, round=1), 8)
    shared = task.most_important().widths
    kept = [sum(child.widths[name] == width for name, width in shared.items()) / len(shared) for child in children]
    assert 0.5 < np.mean(kept) < 1.0


def test_tpe_without_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'tdc_fast\[search\]'"):
        make_agent("tpe")


def test_llm_without_openai_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'tdc_fast\[llm\]'"):
        make_agent("llm", model="any")


def test_any_object_with_the_method_is_an_agent(task: Task) -> None:
    class Quarter:
        name = "quarter"

        def propose(self, task: Task, count: int) -> Answer:
            widths = {unit.name: unit.channels // 4 for unit in task.units}
            return Answer((Proposal(widths, "a quarter of everything"),), notes=("done",))

    memory = Memory()
    best = search_widths(task, Quarter(), Hidden(task), memory=memory)
    assert best.agent == "quarter" and best.moved and best.macs <= task.budget
    assert memory.rounds[0, 0].notes == ("done",)
