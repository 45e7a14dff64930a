"""Scoring a round of 8 pruning candidates: one routed batch, against 8 separately built pruned models.

Both measure the denoising loss of every candidate on the same calibration data, timesteps and noise. Set-up is
included: ours packs the base by importance and sets widths; the peer builds each pruned model with its own weights. A
search packs once for all rounds, so "next round" times a round after the first. Candidates keep 0.5 to 1 of each unit;
fp32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from bench.compare import compare
from tdc_fast.diffusion import create_diffusion
from tdc_fast.diffusion.calibration import Calibration
from tdc_fast.models.iddpm import UNet
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.scoring import DenoisingLoss
from tdc_fast.pruning.task import Task
from tests.pruning.narrow import narrow

CANDIDATES, BATCHES, INTERVAL = 8, 4, (250, 500)


@dataclass(frozen=True)
class ScoringCase:
    """Image size, channels of the first level, ResBlocks per level, and batch."""

    size: int
    channels: int
    blocks: int
    batch: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}-C{self.channels}-{self.blocks}-block-{BATCHES}x{self.batch}"


by_case = pytest.mark.parametrize(
    "case", [ScoringCase(8, 16, 1, 16), ScoringCase(8, 32, 1, 32), ScoringCase(16, 32, 2, 16)], ids=str
)


class Problem:
    """A base, a task of random importance, 8 candidates, and calibration data."""

    def __init__(self, case: ScoringCase) -> None:
        torch.manual_seed(0)
        self.base = UNet(
            image_size=case.size,
            in_channels=3,
            model_channels=case.channels,
            out_channels=3,
            num_res_blocks=case.blocks,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_heads=4,
            use_scale_shift_norm=True,
        ).eval()
        for parameter in self.base.parameters():  # zero-initialised layers would make some products trivial
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        units = tuple(self.base.pruning_units())
        rng, draw = np.random.default_rng(0), random.Random(0)
        importance = {unit.name: rng.exponential(size=unit.num_atoms) for unit in units}
        self.task = Task(0, INTERVAL, units, UnitCosts(0, {}), 0, 0.01, importance)
        self.widths = [
            {unit.name: draw.choice([w for w in unit.widths() if 2 * w >= unit.channels]) for unit in units}
            for _ in range(CANDIDATES)
        ]
        self.batches = [torch.randn(case.batch, 3, case.size, case.size) for _ in range(BATCHES)]
        self.diffusion = create_diffusion(noise_schedule="cosine")

    def scorer(self) -> DenoisingLoss:
        """A scorer that has packed nothing yet."""
        return DenoisingLoss(self.base, self.diffusion, self.batches)

    def routed(self) -> list[float]:
        """The candidates' scores, all from one routed batch."""
        return self.scorer().score(self.task, self.widths)

    @torch.no_grad()
    def separate(self) -> list[float]:
        """The candidates' scores, each from its own pruned model."""
        orders = {unit.name: self.task.order(unit.name) for unit in self.task.units}
        scores = []
        for widths in self.widths:
            model = narrow(self.base, orders, widths)
            losses = Calibration[torch.Tensor](model, self.diffusion).of(self.batches, INTERVAL)
            scores.append(float(torch.cat([loss.double() for loss in losses]).mean()))
        return scores


@by_case
def test_score_8_candidates(benchmark, case: ScoringCase):
    p = Problem(case)
    assert p.routed() == pytest.approx(p.separate(), rel=1e-5)
    compare(benchmark, p.routed, {"separate models": p.separate})


@by_case
def test_score_8_candidates_in_a_next_round(benchmark, case: ScoringCase):
    p = Problem(case)
    scorer = p.scorer()
    compare(benchmark, lambda: scorer.score(p.task, p.widths), {"separate models": p.separate})
