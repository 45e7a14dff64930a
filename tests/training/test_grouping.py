"""Groups that come from the base: measured once, written down, and part of the run's cost; and soft boundaries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tdc_fast.data.dataset import ImageDataset
from tdc_fast.grouping import TaskSimilarity
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion
from tdc_fast.runs.groups import build_groups
from tdc_fast.runs.opening import open_run
from tdc_fast.train import train
from tdc_fast.training import load_run
from tests.training.small_run import TWO_STAGES, differences, rows, small_config

MEASURED = {**TWO_STAGES, "probes": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def by_similarity(folder):
    return train(small_config(folder, "similarity", grouping="similarity", **MEASURED))


def test_groups_by_similarity_are_the_exact_division_of_what_was_measured(by_similarity):
    run = load_run(by_similarity.path)
    similarity = TaskSimilarity.load(by_similarity.path / "similarity.json")
    assert run.groups == similarity.groups(3) and run.groups.strategy == "similarity"
    assert (by_similarity.path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert run.experts().groups == run.groups


def test_what_measuring_costs_is_part_of_the_total(by_similarity):
    macs = json.loads((by_similarity.path / "macs.json").read_text())
    per_sample = macs["per_sample"]["forward_backward"]["base"]
    assert macs["phases"]["grouping"]["macs"] == 6 * 6 * per_sample  # probes x images of one batch
    assert macs["total"] == sum(phase["macs"] for phase in macs["phases"].values())


def test_a_resumed_run_keeps_its_groups(by_similarity, folder):
    before = {path: path.read_bytes() for path in by_similarity.path.rglob("*.json")}
    train(small_config(folder, "similarity", grouping="similarity", resume="latest", **MEASURED))
    assert before == {path: path.read_bytes() for path in by_similarity.path.rglob("*.json")}


def test_the_same_flags_measure_the_same_groups(by_similarity, folder):
    again = train(small_config(folder, "similarity_again", grouping="similarity", **MEASURED))
    assert differences(by_similarity.path, again.path) == []


def test_the_elbow_says_what_it_weighed(folder, capsys):
    settings = {**MEASURED, "groups": -1, "grouping": "difficulty", "difficulty": "loss", "max_groups": 4}
    run = load_run(train(small_config(folder, "elbow", **settings)).path)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("groups:"))
    assert f"the elbow is at {run.groups.num_groups};" in printed and "4:" in printed and "5:" not in printed
    assert run.experts().num_experts == run.groups.num_groups
    assert len(json.loads((run.path / "difficulty.json").read_text())["loss"]) == 6


def test_an_elbow_by_snr_is_told_once_and_not_when_a_run_is_read(folder, capsys):
    settings = {**MEASURED, "groups": -1, "grouping": "difficulty", "max_groups": 4}
    run = load_run(train(small_config(folder, "elbow_snr", **settings)).path)
    assert run.groups.strategy == "difficulty" and run.experts().num_experts == run.groups.num_groups
    assert capsys.readouterr().out.count("the elbow is at") == 1


def test_boundaries_by_hand_are_refined_where_asked(folder):
    settings = {**MEASURED, "boundaries": "0,20,40,60", "refine": 10}
    refined = load_run(train(small_config(folder, "refined", **settings)).path).groups
    assert all(abs(a - b) <= 10 for a, b in zip(refined.boundaries, (0, 20, 40, 60), strict=True))


def test_difficulty_by_snr_needs_no_base(folder):
    config = small_config(folder, grouping="difficulty", **{**MEASURED, "probes": 60})
    snr = build_diffusion(config).snr_db().clip(-20, 20)
    found = build_groups(config)
    assert found is not None and found.strategy == "difficulty"

    def scatter(groups: TimestepGroups) -> float:
        return sum(((snr[a:b] - snr[a:b].mean()) ** 2).sum() for a, b in groups)

    others = TimestepGroups.uniform(60, 3), TimestepGroups.snr(build_diffusion(config), 3)
    assert scatter(found) < min(map(scatter, others))


def test_measured_losses_rank_the_groups(folder):
    budgets = {}
    for order in ("loss", "loss-reversed"):
        run = train(small_config(folder, order, difficulty=order, **TWO_STAGES))
        plan = load_run(run.path).widths
        budgets[order] = plan.budgets
    ranks = {order: sorted(range(3), key=lambda g: shares[g]) for order, shares in budgets.items()}
    assert ranks["loss"] == list(reversed(ranks["loss-reversed"]))


def test_soft_boundaries_train_neighbours_on_shared_timesteps(folder):
    hard = train(small_config(folder, "hard", **TWO_STAGES))
    soft = train(small_config(folder, "soft", overlap=0.5, **TWO_STAGES))
    assert load_run(hard.path).groups == load_run(soft.path).groups  # sampling has hard boundaries
    assert rows(hard.path / "experts" / "progress.csv") != rows(soft.path / "experts" / "progress.csv")
    state = torch.load(soft.path / "experts" / "state000010.pt", weights_only=True)
    assert state["samples_per_group"].tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"groups": -1}, "groups"),
        ({"groups": -2}, "groups"),
        ({"groups": -1, "grouping": "similarity", "budgets": "0.5,1"}, "budgets"),
        ({"groups": 3, "overlap": 1.5}, "overlap"),
        ({"groups": 3, "refine": 5}, "refine"),
        ({"overlap": 0.5}, "overlap"),
        ({"groups": 3, "probes": 0}, "probes"),
    ],
)
def test_settings_that_do_not_fit_are_named(folder, changes, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        small_config(folder, stage1_steps=1, stage2_steps=1, **changes)


def test_groups_of_another_run_are_refused(by_similarity, folder):
    run = open_run(
        small_config(folder, "foreign", grouping="similarity", **MEASURED),
        ImageDataset.from_array(np.zeros((1, 8, 8, 1), np.uint8)),
    )
    TimestepGroups.uniform(60, 4).save(run.path / "groups.json")
    with pytest.raises(ValueError, match="groups.json"):
        train(small_config(folder, "foreign", grouping="similarity", resume="latest", **MEASURED))
