"""From a base to a width plan: budgets met by measured MACs, the rounds of a search, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast.diffusion import Diffusion
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.macs import MacCounter, measure_macs
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.agents import MostImportant, resolved_agent
from tdc_fast.pruning.budget import budget_law, budget_of
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.search import plan_pruning, prune
from tdc_fast.pruning.task import importance_tables
from tdc_fast.routing import TimestepGroups
from tests.pruning.narrow import narrow
from tests.pruning.tiny import RecordedDiffusion, TinyNet, task_of, tiny_batches, tiny_net, tiny_task

# The tiny net has units so coarse that most budgets are missed; the tests that care look at the warning.
pytestmark = pytest.mark.filterwarnings("ignore:group .. no choice of widths")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0.3, 1.0), st.integers(0, 1000))
def test_a_unets_experts_land_within_a_percent_below_every_budget(
    unet: UNet, unet_costs: UnitCosts, num_groups: int, k: float, seed: int
) -> None:
    for fraction in budget_law(num_groups, k):
        budget = budget_of(fraction, unet_costs.full())
        task = task_of(unet.pruning_units(), unet_costs, budget, seed)
        trial = search_widths(task, MostImportant())
        assert 0.99 * budget <= trial.macs <= budget
        assert trial.macs == unet_costs.total(trial.widths)


@pytest.mark.parametrize(("num_groups", "k", "importance"), [(4, 0.55, "taylor"), (3, 0.02, "magnitude")])
def test_a_plans_macs_are_those_measured_on_the_packed_experts(
    unet: UNet, diffusion: Diffusion, images: list[Tensor], num_groups: int, k: float, importance: str
) -> None:
    groups = TimestepGroups.uniform(1000, num_groups)
    found = plan_pruning(unet, groups, diffusion, images, k=k, importance=importance)
    plan = WidthPlan.from_json(found.plan.to_json())
    assert plan == found.plan
    packed = pack_experts(unet, groups, plan)
    for index, (start, _) in enumerate(groups):
        t = torch.tensor([start])
        expert = packed.expert(index)
        assert measure_macs(expert, images[0][:1], t) == plan.macs[index]
        assert 0.99 * plan.budgets[index] <= plan.macs[index] <= plan.budgets[index]
        orders = {name: unit.order for name, unit in plan.experts[index].items()}
        own = narrow(unet, orders, plan.expert_widths(index)).state_dict()
        assert all(torch.equal(value, own[name]) for name, value in expert.state_dict().items())
    assert plan.budgets == tuple(budget_of(f, found.base_macs) for f in found.fractions)
    assert found.fractions == budget_law(num_groups, k)[::-1]  # group 0 has the highest SNR
    whole = plan.experts[0]
    assert all(
        unit.width == len(unit.order) * u.atom for unit, u in zip(whole.values(), unet.pruning_units(), strict=True)
    )


def test_atoms_are_ordered_by_importance_and_the_first_ones_kept() -> None:
    net, groups = tiny_net(), TimestepGroups.uniform(100, 1)
    scores = {"layers.0": np.array([1.0, 4.0, 2.0, 4.0]), "layers.1": np.zeros(6)}
    plan = prune(net, groups, RecordedDiffusion(), tiny_batches(), k=(0.7,), importance=lambda group: scores)
    assert plan.experts[0]["layers.0"].order == (1, 3, 2, 0)
    assert plan.experts[0]["layers.1"].order == (0, 1, 2, 3, 4, 5)
    assert plan.expert_widths(0) == {"layers.0": 4, "layers.1": 2}  # 9 + 24 + 12 of 69 MACs: all that 0.7 allows


def test_pruned_groups_that_share_a_layer_order_its_atoms_by_the_mean_of_their_importances() -> None:
    net, groups = tiny_net(), TimestepGroups.uniform(100, 4)
    scores = [
        {"layers.0": np.array(row, dtype=float), "layers.1": np.arange(6.0) * (-1) ** group}
        for group, row in enumerate([[9, 9, 9, 0], [0, 1, 2, 4], [4, 4, 0, 1], [3, 2, 1, 0]])
    ]
    asked: list[int] = []

    def importance(group: int) -> dict[str, np.ndarray]:
        asked.append(group)
        return scores[group]

    layer = net.pruning_units()[0].slices[0].module
    found = plan_pruning(
        net, groups, RecordedDiffusion(), tiny_batches(), k=(1.0, 0.7, 0.7, 0.6), importance=importance,
        shared_layers=f"{layer}:3",
    )  # fmt: skip
    orders = [expert["layers.0"].order for expert in found.plan.experts]
    assert orders == [(0, 1, 2, 3), (1, 3, 0, 2), (1, 3, 0, 2), (0, 1, 2, 3)]  # group 0 keeps all, 3 is of another set
    assert found.plan.experts[1]["layers.1"].order != found.plan.experts[2]["layers.1"].order
    assert asked == [1, 2, 3]
    assert pack_experts(net, groups, found.plan, shared_layers=f"{layer}:3").shared == {layer: (0, 0, 0, 1)}


def test_a_width_is_worth_the_most_important_atoms_that_fit_in_it() -> None:
    scores = {"layers.0": np.array([1.0, 4.0, 0.0, 2.0]), "layers.1": np.zeros(6)}
    first, second = importance_tables(dataclasses.replace(tiny_task(60), importance=scores))
    assert first.widths == (0, 1, 2, 3, 4) and first.costs == (0, 6, 12, 18, 24)
    assert first.values == pytest.approx([0.0, 4.0, 6.0, 7.0, 7.0], abs=1e-4)
    assert first.values[4] > first.values[3]  # an atom without importance is still better kept than dropped
    assert second.values == pytest.approx([0.0] * 7, abs=1e-4) and sorted(second.values) == list(second.values)


def test_the_calibration_cost_is_that_of_the_forward_and_backward_passes() -> None:
    net, groups = tiny_net(), TimestepGroups.uniform(100, 4)
    found = plan_pruning(net, groups, RecordedDiffusion(), tiny_batches(3, size=8), k=0.5)
    units = 6 * 4 + 6 * 6  # per sample and forward pass; the backward pass costs twice that, less the entry's part
    backward = 2 * units - 3 * 4  # the gradient with respect to the entry's output is not needed
    assert found.calibration_macs == 3 * 3 * 8 * (9 + units + backward)  # three pruned groups, three batches of 8
    by_norm = plan_pruning(net, groups, RecordedDiffusion(), tiny_batches(), k=0.5, importance="magnitude")
    assert by_norm.calibration_macs == 0


@pytest.mark.parametrize(("num_groups", "k"), [(1, 0.3), (4, 1.0), (2, (1.0, 1.0))])
def test_nothing_is_pruned_or_calibrated_where_every_budget_is_the_base(num_groups: int, k: object) -> None:
    net, diffusion = tiny_net(), RecordedDiffusion()
    found = plan_pruning(net, TimestepGroups.uniform(100, num_groups), diffusion, tiny_batches(), k=k)  # type: ignore[arg-type]
    assert found.plan.macs == found.plan.budgets == (found.base_macs,) * num_groups
    assert all(found.plan.expert_widths(i) == {"layers.0": 4, "layers.1": 6} for i in range(num_groups))
    assert found.calibration_macs == 0 and not diffusion.timesteps


def test_each_groups_importance_comes_from_its_own_timesteps() -> None:
    diffusion = RecordedDiffusion()
    groups = TimestepGroups([0, 30, 70, 100])
    plan_pruning(tiny_net(), groups, diffusion, tiny_batches(2), k=0.6)
    seen = [(int(t.min()) // 10, int(t.max()) // 10) for t in diffusion.timesteps]
    assert seen == [(3, 6), (3, 6), (7, 9), (7, 9)]


def test_the_same_arguments_give_the_same_plan(unet: UNet, diffusion: Diffusion, images: list[Tensor]) -> None:
    groups = TimestepGroups.uniform(1000, 2)
    plans = [prune(unet, groups, diffusion, images, k=0.5, seed=1) for _ in range(2)]
    assert plans[0] == plans[1]


def test_an_endless_stream_of_batches_is_read_as_far_as_asked() -> None:
    def endless() -> Iterator[Tensor]:
        yield from itertools.cycle(tiny_batches(1))

    diffusion = RecordedDiffusion()
    prune(tiny_net(), TimestepGroups.uniform(100, 2), diffusion, endless(), k=0.5, max_batches=3)
    assert len(diffusion.timesteps) == 3


def test_units_too_coarse_for_the_window_give_the_best_below_with_a_warning_or_an_error() -> None:
    net, groups = tiny_net(channels=(4,), atom=2), TimestepGroups.uniform(100, 2)
    with pytest.warns(UserWarning, match="group 1: no choice of widths lands between .* finer units"):
        plan = prune(net, groups, RecordedDiffusion(), tiny_batches(), k=(1.0, 0.9))
    assert plan.expert_widths(1) == {"layers.0": 2} and plan.macs[1] == 9 + 12
    with pytest.raises(ValueError, match="group 1: no choice"):
        prune(net, groups, RecordedDiffusion(), tiny_batches(), k=(1.0, 0.9), strict=True)


def test_a_budget_that_no_width_reaches_is_refused_with_the_smallest_that_is_reached() -> None:
    with pytest.raises(ValueError, match=r"k: .* group 1 is allowed 6 MACs, .* 9 \(0.1304 of the base\)"):
        prune(tiny_net(), TimestepGroups.uniform(100, 2), RecordedDiffusion(), tiny_batches(), k=(1.0, 0.1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", 0.0), ("k", 1.5), ("k", (0.5, 0.5, 0.5)), ("importance", "hessian"), ("difficulty", "size"),
        ("tolerance", 1.5), ("max_batches", 0), ("rounds", 0), ("candidates", 0),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_refused_by_name(argument: str, value: object) -> None:
    arguments = {"k": 0.5, argument: value}
    with pytest.raises(ValueError, match=argument):
        prune(tiny_net(), TimestepGroups.uniform(100, 2), RecordedDiffusion(), tiny_batches(), **arguments)


def test_missing_data_and_groups_of_another_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="batches"):
        prune(tiny_net(), TimestepGroups.uniform(100, 2), RecordedDiffusion(), [], k=0.5)
    with pytest.raises(ValueError, match="groups"):
        prune(tiny_net(), TimestepGroups.uniform(50, 2), RecordedDiffusion(), tiny_batches(), k=0.5)


@pytest.mark.parametrize("agent", ["random", "greedy"])
def test_the_calibration_cost_is_what_the_passes_of_all_candidates_count(agent: str) -> None:
    net, groups, batches = tiny_net(), TimestepGroups.uniform(100, 2), tiny_batches(2, size=8)
    found = plan_pruning(
        net, groups, RecordedDiffusion(), batches, k=(1.0, 0.7), importance="magnitude", agent=agent, rounds=2,
        candidates=2,
    )  # fmt: skip
    with MacCounter() as counter:
        plan_pruning(
            net, groups, RecordedDiffusion(), batches, k=(1.0, 0.7), importance="magnitude", agent=agent, rounds=2,
            candidates=2,
        )  # fmt: skip
    everything = counter.macs - measured_without_a_search(net, groups, batches)
    assert found.calibration_macs == everything > 0
    assert [len(trials) for trials in found.trials] == [0, 4]


def measured_without_a_search(net: TinyNet, groups: TimestepGroups, batches: list[Tensor]) -> int:
    """What measuring costs and the pruned model takes; it does not depend on the widths' being found by a search."""
    with MacCounter() as counter:
        plan_pruning(net, groups, RecordedDiffusion(), batches, k=(1.0, 0.7), importance="magnitude")
    return counter.macs


def test_agents_search_with_several_rounds_and_one_shot_ones_answer_at_once() -> None:
    net, groups = tiny_net(), TimestepGroups.uniform(100, 2)
    names = [resolved_agent("auto", *rest).name for rest in ((1,), (1, "magnitude"), (2,), (2, "magnitude"))]
    assert names == ["taylor", "magnitude", "tpe", "tpe"]
    found = plan_pruning(net, groups, RecordedDiffusion(), tiny_batches(), k=(1.0, 0.7), agent="magnitude", rounds=3)
    by_magnitude = prune(net, groups, RecordedDiffusion(), tiny_batches(), k=(1.0, 0.7), importance="magnitude")
    assert found.plan == by_magnitude and [len(trials) for trials in found.trials] == [0, 1]
    with pytest.raises(ValueError, match="agent: got 'gpt'; expected one of taylor, magnitude, random"):
        plan_pruning(net, groups, RecordedDiffusion(), tiny_batches(), k=0.7, agent="gpt")
    for other in (None, MostImportant, object()):
        with pytest.raises(ValueError, match="agent: got .*an object with a name and a method propose"):
            plan_pruning(net, groups, RecordedDiffusion(), tiny_batches(), k=0.7, agent=other)


def test_the_plan_has_the_best_widths_of_the_search_in_the_order_of_importance(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    groups = TimestepGroups.uniform(1000, 2)
    found = plan_pruning(unet, groups, diffusion, images, k=0.5, agent="evolution", rounds=2, candidates=4)
    whole, tried = found.trials
    assert whole == () and len(tried) == 8
    best = min(tried, key=lambda trial: trial.score)
    assert found.plan.expert_widths(1) == best.widths and found.plan.macs[1] == best.macs
    first = prune(unet, groups, diffusion, images, k=0.5)
    assert tried[0].widths == first.expert_widths(1)  # searches begin with the one-shot answer
    orders = {name: unit.order for name, unit in found.plan.experts[1].items()}
    assert orders == {name: unit.order for name, unit in first.experts[1].items()}
