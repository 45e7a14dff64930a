"""All candidates of a round in one routed batch have the scores of models that were pruned one by one."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.calibration import Calibration
from tdc_fast.graphs import use_capture
from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.nn.macs import MacCounter
from tdc_fast.nn.modes import evaluating
from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning import candidates as candidates_module
from tdc_fast.pruning.costs import UnitCosts, unit_costs
from tdc_fast.pruning.scoring import DenoisingLoss
from tdc_fast.pruning.task import Task, Widths
from tests.graphs.tape import TapeCapture
from tests.pruning.narrow import narrow
from tests.pruning.tiny import RecordedDiffusion, task_of, tiny_batches, tiny_net, tiny_task


def scores_one_by_one(
    base: UNet, diffusion: Diffusion, batches: list, task: Task, widths: list[Widths], seed: int
) -> list[float]:
    """What the routed scores must be: the loss of each pruned model, built and run by itself."""
    orders = {unit.name: task.order(unit.name) for unit in task.units}
    found = []
    for candidate in widths:
        model = narrow(base, orders, candidate)
        with evaluating(model), torch.no_grad():
            losses = Calibration(model, diffusion).of(batches, task.interval, seed=seed)
            found.append(float(torch.cat([loss.double() for loss in losses]).mean()))
    return found


def extremes_and_draws(units: list[PruningUnit]) -> list[dict[str, int]]:
    """The whole base, nothing of it, every unit of one kind gone, one unit gone, and widths by chance."""
    rng = random.Random(0)
    whole = {unit.name: unit.channels for unit in units}
    without = [{**whole, **{u.name: 0 for u in units if u.kind == kind}} for kind in ("resblock", "attention")]
    single = [{**whole, units[2].name: 0}]
    draws = [{unit.name: rng.choice(unit.widths()) for unit in units} for _ in range(4)]
    return [whole, dict.fromkeys(whole, 0), *without, *single, *draws]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
def test_depth_heads_and_channels_score_as_separately_built_models_do(
    diffusion: Diffusion, scale_shift: bool, conditional: bool
) -> None:
    torch.manual_seed(0)
    base = create_unet(
        image_size=8, num_channels=32, num_res_blocks=1, num_heads=4, channel_mult="1,2", in_channels=3,
        attention_resolutions="4", use_scale_shift_norm=scale_shift, class_cond=conditional, num_classes=3, dropout=0.5,
    )  # fmt: skip
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.08)
    batches: list = [torch.randn(size, 3, 8, 8) for size in (4, 3)]
    if conditional:
        batches = [(x, {"y": torch.randint(0, 3, (len(x),))}) for x in batches]
    units = base.pruning_units()
    first = batches[0] if conditional else (batches[0], {})
    task = task_of(units, unit_costs(base, *first), 0, seed=3)
    task = dataclasses.replace(task, interval=(400, 700))
    widths = extremes_and_draws(units)
    expected = scores_one_by_one(base, diffusion, batches, task, widths, seed=5)
    scorer = DenoisingLoss(base, diffusion, batches, seed=5)
    assert scorer.score(task, widths) == pytest.approx(expected, rel=2e-5)
    assert len({round(score, 6) for score in expected}) == len(widths)  # the comparison tells candidates apart
    assert base.training and all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(("max_samples", "passes"), [(1000, [7]), (24, [2, 2, 3]), (1, [1] * 7)])
def test_large_rounds_are_scored_in_passes_that_stay_small(
    unet: UNet, diffusion: Diffusion, images: list[Tensor], unet_costs: UnitCosts, max_samples: int, passes: list[int]
) -> None:
    task = task_of(unet.pruning_units(), unet_costs, 0)
    widths = extremes_and_draws(list(task.units))[:7]
    seen: list[int] = []

    class Watched:
        def training_losses(self, model: object, x0: Tensor, t: Tensor, **rest: object) -> dict[str, Tensor]:
            seen.append(len(x0))
            return diffusion.training_losses(model, x0, t, **rest)  # type: ignore[arg-type]

    done: list[int] = []
    scorer = DenoisingLoss(unet, Watched(), images, max_samples=max_samples)
    scores = scorer.score(task, widths, done.append)
    assert scores == pytest.approx(DenoisingLoss(unet, diffusion, images).score(task, widths), rel=1e-5)
    assert done == passes and seen == [8 * count for count in passes for _ in images]
    assert max(seen) <= max(max_samples, 8)


def test_one_set_of_weights_serves_all_candidates_and_all_rounds(
    unet: UNet, diffusion: Diffusion, images: list[Tensor], unet_costs: UnitCosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    pack = candidates_module.pack_experts

    def watched(*args: object) -> object:
        packed.append(pack(*args))  # type: ignore[arg-type]
        return packed[-1]

    monkeypatch.setattr(candidates_module, "pack_experts", watched)
    task = task_of(unet.pruning_units(), unet_costs, 0)
    scorer = DenoisingLoss(unet, diffusion, images)
    for widths in (extremes_and_draws(list(task.units)), extremes_and_draws(list(task.units))[3:5]):
        scorer.score(task, widths)
    assert len(packed) == 1
    assert all(parameter.shape[0] == 1 for parameter in packed[0].model.parameters())
    scorer.score(task_of(unet.pruning_units(), unet_costs, 0, seed=1), widths)  # another group: another order
    assert len(packed) == 2


def test_candidates_share_timesteps_and_noise_which_lie_in_the_group() -> None:
    net, diffusion, batches = tiny_net(), RecordedDiffusion(), tiny_batches(2)
    task = tiny_task(60)
    full = {"layers.0": 4, "layers.1": 6}
    scores = DenoisingLoss(net, diffusion, batches).score(task, [full, {"layers.0": 0, "layers.1": 0}])
    own = [t[:8] for t in diffusion.timesteps]
    with torch.no_grad():
        whole = torch.cat([diffusion.loss(net, x, t) for x, t in zip(batches, own, strict=True)])
    assert scores[0] == pytest.approx(float(whole.mean())) and scores[1] != pytest.approx(scores[0])
    assert all(((t >= 0) & (t < 10)).all() and torch.equal(t[:8], t[8:]) for t in diffusion.timesteps)


def test_scores_from_graphs_are_those_without_them() -> None:
    task, batches = tiny_task(60), tiny_batches(2)
    rounds = [
        [{"layers.0": 4, "layers.1": 6}, {"layers.0": 0, "layers.1": 3}],
        [{"layers.0": 1, "layers.1": 0}, {"layers.0": 2, "layers.1": 5}],
        [{"layers.0": 3, "layers.1": 1}],
    ]
    plain = DenoisingLoss(tiny_net(), RecordedDiffusion(), batches)
    expected = [plain.score(task, candidates) for candidates in rounds]
    tape, scorer = TapeCapture(), DenoisingLoss(tiny_net(), RecordedDiffusion(), batches)
    with use_capture(tape):
        assert [scorer.score(task, candidates) for candidates in rounds] == expected
    assert [one.replays for one in tape.tapes] == [2]  # the second round of two candidates, at other widths


def test_what_a_candidate_costs_is_its_macs_times_the_samples(
    unet: UNet, diffusion: Diffusion, images: list[Tensor], unet_costs: UnitCosts
) -> None:
    task = task_of(unet.pruning_units(), unet_costs, 0)
    widths = extremes_and_draws(list(task.units))
    scorer = DenoisingLoss(unet, diffusion, images)
    with MacCounter() as counter:
        scorer.score(task, widths)
    assert scorer.samples == 16
    assert counter.macs == scorer.samples * sum(unet_costs.total(candidate) for candidate in widths)
