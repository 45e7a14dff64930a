"""From a base to a width plan: budgets met by measured MACs, the rounds of a search, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdc_fast.diffusion import Diffusion, create_diffusion
from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.nn.packing import pack_experts
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.agents import DenoisingLoss, MostImportant, Task, Widths, importance_tables
from tdc_fast.pruning.budget import budget_law, budget_macs
from tdc_fast.pruning.macs import UnitCosts, measure_macs, unit_costs
from tdc_fast.pruning.narrow import narrow
from tdc_fast.pruning.search import plan_pruning, project, prune, search_widths
from tdc_fast.routing import TimestepGroups
from tests.pruning.tiny import RecordedDiffusion, tiny_batches, tiny_net

# The tiny net has units so coarse that most budgets are missed; the tests that care look at the warning.
pytestmark = pytest.mark.filterwarnings("ignore:group .. no choice of widths")


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, num_heads=2, channel_mult="1,2", in_channels=1,
        attention_resolutions="4",
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return create_diffusion(noise_schedule="cosine")


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def unet_costs(unet: UNet, images: list[Tensor]) -> UnitCosts:
    return unit_costs(unet, images[0])


def task_of(units: Sequence, costs: UnitCosts, budget: int, seed: int = 0) -> Task:
    rng = np.random.default_rng(seed)
    scores = {unit.name: rng.exponential(size=unit.num_atoms) for unit in units}
    return Task(0, (0, 10), tuple(units), costs, budget, 0.01, scores)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0.3, 1.0), st.integers(0, 1000))
def test_a_unets_experts_land_within_a_percent_below_every_budget(
    unet: UNet, unet_costs: UnitCosts, num_groups: int, k: float, seed: int
) -> None:
    for fraction in budget_law(num_groups, k):
        budget = budget_macs(fraction, unet_costs.full())
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
    assert plan.budgets == tuple(budget_macs(f, found.base_macs) for f in found.fractions)
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


def test_a_width_is_worth_the_most_important_atoms_that_fit_in_it() -> None:
    scores = {"layers.0": np.array([1.0, 4.0, 0.0, 2.0]), "layers.1": np.zeros(6)}
    first, second = importance_tables(dataclasses.replace(tiny_task(60), importance=scores))
    assert first.widths == (0, 1, 2, 3, 4) and first.macs == (0, 6, 12, 18, 24)
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
    groups = TimestepGroups.from_boundaries([0, 30, 70, 100])
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
        ("tolerance", 1.5), ("max_batches", 0), ("rounds", 0), ("rounds", 2),
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


def tiny_task(budget: int) -> Task:
    net = tiny_net()
    return task_of(net.pruning_units(), unit_costs(net, tiny_batches()[0]), budget)


def test_a_proposal_is_moved_to_the_nearest_widths_within_the_budget() -> None:
    task = tiny_task(9 + 6 * 5)
    assert project(task, {"layers.0": 2, "layers.1": 3}).widths == {"layers.0": 2, "layers.1": 3}
    near = project(task, {"layers.0": 4, "layers.1": 3}, weights={"layers.0": 9.0}).widths
    assert near == {"layers.0": 4, "layers.1": 1}
    near = project(task, {"layers.0": 4, "layers.1": 3}, weights={"layers.1": 9.0}).widths
    assert near == {"layers.0": 2, "layers.1": 3}
    low = project(task, {"layers.0": 0, "layers.1": 0})
    assert low.reached and low.macs == task.budget


@settings(max_examples=40, deadline=None)
@given(st.data(), st.floats(0.25, 1.0))
def test_any_proposal_can_be_moved_onto_a_unets_budget(
    unet: UNet, unet_costs: UnitCosts, data: st.DataObject, share: float
) -> None:
    task = task_of(unet.pruning_units(), unet_costs, budget_macs(share, unet_costs.full()))
    proposal = {unit.name: data.draw(st.integers(0, unit.channels)) for unit in task.units}
    solution = project(task, proposal)
    assert solution.reached
    if unet_costs.full() == task.budget or not all(proposal[u.name] in u.widths() for u in task.units):
        return
    if solution.floor <= unet_costs.total(proposal) <= task.budget:
        assert solution.widths == proposal


@pytest.mark.parametrize("proposal", [{"layers.0": 1}, {"layers.0": 1, "layers.1": 7}, {"layers.0": -1, "layers.1": 1}])
def test_a_proposal_of_other_units_or_impossible_widths_is_refused(proposal: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="proposal"):
        project(tiny_task(40), proposal)


class Script:
    """Proposes from a list, and notes how long the memory was each time."""

    def __init__(self, *proposals: Widths) -> None:
        self.proposals, self.lengths = list(proposals), []

    def propose(self, task: Task) -> Widths:
        self.lengths.append(len(task.memory))
        return self.proposals[len(task.memory) % len(self.proposals)]


class Narrowest:
    """Prefers a narrow first layer, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, task: Task, candidates: Sequence[Widths]) -> list[float]:
        self.calls += 1
        return [float(widths["layers.0"]) - 2 for widths in candidates]


def test_the_best_scored_trial_of_all_rounds_wins_and_the_memory_holds_them_all() -> None:
    task = tiny_task(9 + 6 * 6)
    script = Script({"layers.0": 3, "layers.1": 3}, {"layers.0": 1, "layers.1": 5}, {"layers.0": 4, "layers.1": 2})
    scorer = Narrowest()
    best = search_widths(task, script, scorer, rounds=5)
    assert best.widths == {"layers.0": 1, "layers.1": 5} and best.score == -1.0
    assert [trial.widths["layers.0"] for trial in task.memory] == [3, 1, 4, 3, 1]
    assert script.lengths == [0, 1, 2, 3, 4]
    assert scorer.calls == 3  # what was scored before is remembered


def test_the_denoising_score_is_the_loss_of_the_narrowed_model_on_the_groups_timesteps() -> None:
    net, diffusion, batches = tiny_net(), RecordedDiffusion(), tiny_batches(2)
    task = tiny_task(60)
    full = {"layers.0": 4, "layers.1": 6}
    scores = DenoisingLoss(net, diffusion, batches).score(task, [full, {"layers.0": 0, "layers.1": 0}])
    with torch.no_grad():
        whole = torch.cat([diffusion.loss(net, x, t) for x, t in zip(batches, diffusion.timesteps[:2], strict=True)])
    assert scores[0] == pytest.approx(float(whole.mean())) and scores[1] != pytest.approx(scores[0])
    assert all(((t >= 0) & (t < 10)).all() for t in diffusion.timesteps)
    assert torch.equal(diffusion.timesteps[0], diffusion.timesteps[2])  # candidates share their draws


def test_scoring_counts_as_calibration() -> None:
    net, groups, batches = tiny_net(), TimestepGroups.uniform(100, 2), tiny_batches(1, size=8)
    diffusion = RecordedDiffusion()
    found = plan_pruning(
        net, groups, diffusion, batches, k=(1.0, 0.7), importance="magnitude",
        scorer=DenoisingLoss(net, diffusion, batches), rounds=2,
    )  # fmt: skip
    assert found.calibration_macs == 8 * found.plan.macs[1]  # the second round proposes the same, scored once
    assert [len(trials) for trials in found.trials] == [0, 2]
