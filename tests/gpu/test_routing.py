"""The routing plan on a GPU: the sort and the tile table of the CPU, from one launch that checks its group ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdc_fast import RoutingPlan, TimestepGroups
from tdc_fast.kernels.tile_table import tile_table
from tests.gpu.networks import no_synchronisation
from tests.gpu.problems import on_device, synchronize

ROOT = Path(__file__).resolve().parents[2]


def groups_of(batch: int, num_groups: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + num_groups)
    if kind == "one group":
        return torch.full((batch,), num_groups - 1)
    ids = torch.randint(0, num_groups, (batch,), generator=generator)
    return ids // 2 * 2 if kind == "every other group empty" else ids


@on_device
@pytest.mark.parametrize("kind", ["mixed", "one group", "every other group empty"])
@pytest.mark.parametrize(
    ("batch", "num_groups"), [(0, 3), (1, 1), (7, 3), (64, 8), (65, 16), (1000, 5), (3, 64), (5000, 40)]
)
def test_it_is_the_plan_of_the_cpu(device: str, batch: int, num_groups: int, kind: str) -> None:
    groups = groups_of(batch, num_groups, kind)
    expected, plan = RoutingPlan.from_groups(groups, num_groups), RoutingPlan.from_groups(groups.to(device), num_groups)
    for name in ("order", "inverse", "offsets", "groups", "weight_index"):
        assert torch.equal(getattr(plan, name).cpu(), getattr(expected, name)), name
    if device == "cuda":
        assert torch.equal(plan.tiles.cpu(), tile_table(expected.offsets, batch))


@on_device
def test_building_and_using_a_plan_never_waits_for_the_gpu(device: str) -> None:
    boundaries = TimestepGroups.uniform(100, 4)
    x, t = torch.randn(9, 8, 4, 4, device=device), torch.arange(9, device=device) * 11

    def use() -> torch.Tensor:
        plan = RoutingPlan.from_groups(boundaries.group_of(t), 4)
        return plan.unsort(plan.sort(x))

    use()  # the boundaries go to the device once
    with no_synchronisation(device):
        y = use()
    assert torch.equal(y, x)


@on_device
@pytest.mark.parametrize("bad", [4, -1, 2**40])
def test_a_group_out_of_range_is_named_when_asked_to_wait(device: str, bad: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        RoutingPlan.from_groups(torch.tensor([0, bad, 1], device=device), 4, validate=True)


BAD_GROUPS = """
import sys, torch
from tdc_fast import RoutingPlan
device = sys.argv[1]
try:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 7, 2], device=device), 4)
    y = plan.sort(torch.ones(4, 3, device=device))
    print("sorted:", y.sum().item())
except (RuntimeError, ValueError) as error:
    print("caught:", error)
    sys.stdout.flush()
    sys.exit(3)
"""


@on_device
def test_a_group_out_of_range_is_caught_without_waiting(device: str) -> None:
    """In a process of its own: an assertion that fails on a GPU ends every use of it."""
    result = subprocess.run(
        [sys.executable, "-c", BAD_GROUPS, device], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert result.returncode != 0 and "sorted:" not in result.stdout, result.stdout + result.stderr
    assert ("group" if device == "cpu" else "CUDA error") in result.stdout + result.stderr


@on_device
def test_moving_a_plans_experts_needs_no_new_sort(device: str) -> None:
    groups = torch.tensor([2, 0, 1, 2, 0], device=device)
    plan = RoutingPlan.from_groups(groups, 3)
    with no_synchronisation(device):
        other = plan.with_weight_index(plan.weight_index.flip(0))
    synchronize(device)
    assert torch.equal(other.order, plan.order) and torch.equal(other.tiles, plan.tiles)
