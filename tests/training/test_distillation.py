"""Stage 2 with the base as a teacher: what it starts from, what is logged, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.train import train
from tdc_fast.training import load_run
from tests.training.small_run import TWO_STAGES, rows, small_config

WEIGHT = 0.5


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose whole experts are taught, with a row for every step."""
    lengths = {**TWO_STAGES, "stage1_steps": 3, "stage2_steps": 4, "k": 1.0}
    options = {"distillation_weight": WEIGHT, "log_interval": 1, "learn_sigma": True, "stage2_batch": 9}
    return load_run(train(small_config(tmp_path_factory.mktemp("taught"), **options, **lengths)).path)


def test_the_teacher_is_the_averaged_base_that_the_experts_start_from(taught):
    first, *later = rows(taught.path / "experts" / "progress.csv")
    assert float(first["distillation"]) < 1e-10  # against the raw weights of stage 1 it would not be
    assert all(float(row["distillation"]) > 1e-8 for row in later)
    for row in (first, *later):
        terms = float(row["mse"]) + float(row["vb"]) + WEIGHT * float(row["distillation"])
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-6)
    raw = taught.base(ema=False).state_dict()
    assert any(not torch.equal(raw[name], value) for name, value in taught.base().state_dict().items())
    assert "distillation" not in rows(taught.path / "base" / "progress.csv")[0]


def test_the_teachers_forward_pass_is_part_of_the_cost(taught):
    base, macs = taught.base(), taught.macs
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([0])
    with FlopCounterMode(display=False) as forward:
        base(x, t)
    with FlopCounterMode(display=False) as both:
        taught.diffusion.training_losses(base, x, t)["loss"].sum().backward()
    per_sample = (both.get_total_flops() + forward.get_total_flops()) // 2
    assert macs["per_sample"]["forward_backward"]["experts"] == [per_sample] * 3
    assert macs["per_sample"]["forward_backward"]["base"] == both.get_total_flops() // 2
    assert macs["phases"]["stage2"]["macs"] == 4 * 9 * per_sample


def test_it_is_for_experts_and_not_negative(tmp_path):
    with pytest.raises(ValueError, match="distillation_weight: got 1.0; expected --groups N as well"):
        small_config(tmp_path, lr_anneal_steps=1, distillation_weight=1.0)
    with pytest.raises(ValueError, match="distillation_weight: got -1.0; expected a number at least 0"):
        small_config(tmp_path, distillation_weight=-1.0, **TWO_STAGES)
