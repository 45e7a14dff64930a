"""The base is measured in the precision that is asked for: close to fp32, with weights that were cast once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc_fast.diffusion import Diffusion
from tdc_fast.grouping import measure_similarity, probe_losses
from tdc_fast.models.iddpm import UNet
from tdc_fast.pruning import PruningSettings, plan_pruning
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.importance import TaylorImportance
from tdc_fast.pruning.memory import OtherSearch
from tdc_fast.pruning.scoring import DenoisingLoss
from tdc_fast.routing import TimestepGroups
from tests.operators import Recorded
from tests.pruning.tiny import RecordedDiffusion, task_of, tiny_batches, tiny_net

BF16 = torch.bfloat16


def test_candidates_score_in_bf16_as_in_fp32_but_for_its_rounding(
    unet: UNet, unet_costs: UnitCosts, diffusion: Diffusion, images: list[Tensor]
) -> None:
    units = unet.pruning_units()
    task, whole = task_of(units, unet_costs, 0), {unit.name: unit.channels for unit in units}
    widths = [whole, {**whole, "middle_block.0": 8}, dict.fromkeys(whole, 0), {**whole, "middle_block.1": 0}]
    plain, low = (DenoisingLoss(unet, diffusion, images, dtype=dtype) for dtype in (torch.float32, BF16))
    expected = plain.score(task, widths)
    with Recorded() as called:
        found = low.score(task, widths)
    assert found != expected and found == pytest.approx(expected, rel=1e-2)
    assert np.argsort(found).tolist() == np.argsort(expected).tolist()
    first = called["_to_copy"]
    with Recorded() as again:
        assert low.score(task, widths) == found
    assert again["_to_copy"] < first - 40, "weights are cast in every pass"
    assert next(unet.parameters()).dtype == torch.float32


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "routed"])
def test_importance_in_bf16_is_that_of_fp32_but_for_its_rounding(
    unet: UNet, diffusion: Diffusion, images: list[Tensor], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as one expert on the routed kernels, as on a GPU."""
    monkeypatch.setattr("tdc_fast.nn.inference.kernels_serve", lambda device, dtype: kernels)
    units = unet.pruning_units()
    expected = TaylorImportance(unet, units, diffusion).of(images, (400, 700))
    found = TaylorImportance(unet, units, diffusion, BF16).of(images, (400, 700))
    ours, plain = (np.concatenate([scores[unit.name] for unit in units]) for scores in (found, expected))
    assert not np.array_equal(ours, plain)
    assert np.linalg.norm(ours - plain) < 0.05 * np.linalg.norm(plain)
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in unet.parameters())


def test_losses_and_similarities_of_timesteps_in_bf16_are_those_of_fp32_but_for_its_rounding(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    intervals = [(0, 200), (400, 600)]
    losses = [probe_losses(unet, intervals, diffusion, images, dtype=dtype) for dtype in (torch.float32, BF16)]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(*losses, rtol=1e-2)
    matrices = [
        measure_similarity(unet, diffusion, images[:1], num_probes=3, dtype=dtype).matrix
        for dtype in (torch.float32, BF16)
    ]
    assert not np.array_equal(*matrices)
    np.testing.assert_allclose(*matrices, atol=0.05)


def test_a_search_in_another_precision_is_another_search(tmp_path) -> None:
    arguments = (tiny_net(), TimestepGroups.uniform(100, 1), RecordedDiffusion(), tiny_batches())
    options = {"k": 0.7, "memory_file": tmp_path / "memory.jsonl"}
    plan_pruning(*arguments, **options)
    assert '"dtype"' not in options["memory_file"].read_text().splitlines()[0]  # as before there was a choice
    with pytest.raises(OtherSearch, match=r"dtype: got None; expected 'torch.bfloat16' as in this search"):
        plan_pruning(*arguments, dtype=BF16, **options)
    with pytest.raises(ValueError, match=r"^dtype: got torch.float64; expected torch.float32"):
        PruningSettings(k=0.5, dtype=torch.float64)
