"""The CUDA routing plan in the emulator: torch's stable sort, and the tile table of its offsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import _native
from tdc_fast.kernels import tile_table as tiles
from tdc_fast.ops import cuda, cuda_launch
from tests.emulator.harness import (
    AT_RUNTIME,
    FACTS,
    SANITIZED,
    SCHEDULES,
    EmulatorError,
    EmulatorLauncher,
    emulated,
    plain_only,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
NAMES = ("order", "inverse", "offsets", "groups", "tiles")


def planned(
    groups: Tensor, num_groups: int, plant: str = "", schedule: int = 0, shared_limit: int = FACTS[2]
) -> dict[str, Tensor]:
    library, facts = emulated("plan", AT_RUNTIME), (*FACTS[:2], shared_limit)
    launcher = EmulatorLauncher(library, schedule=schedule, facts=facts)
    with cuda_launch.use_launcher(launcher), library.planted(plant):
        made = cuda.routing_plan(groups, num_groups)
    assert made is not None and launcher.launched == ["tdc_routing_plan"]
    return dict(zip(NAMES, made, strict=True))


def expected(groups: Tensor, num_groups: int) -> dict[str, Tensor]:
    ordered, order = torch.sort(groups, stable=True)
    counts = torch.bincount(groups, minlength=num_groups)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    table = tiles.tile_table(offsets, len(groups))
    return dict(zip(NAMES, (order, torch.argsort(order), offsets, ordered, table), strict=True))


def assert_right(
    groups: Tensor, num_groups: int, plant: str = "", schedule: int = 0, shared_limit: int = FACTS[2]
) -> None:
    made = planned(groups, num_groups, plant, schedule=schedule, shared_limit=shared_limit)
    for name, exact in expected(groups, num_groups).items():
        assert torch.equal(made[name], exact), f"{name} of {len(groups)} samples in {num_groups} groups"
        assert made[name].dtype == exact.dtype, name


def some_groups(batch: int, num_groups: int, seed: int = 0) -> Tensor:
    """Uneven: half of the samples are of one group, and some groups have none."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(num_groups, (batch,), generator=generator)
    return groups.where(torch.rand(batch, generator=generator) < 0.5, num_groups // 2)


@settings(max_examples=20 if SANITIZED else 50, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([0, 1, 2, 31, 32, 33, 64, 100]),
    num_groups=st.sampled_from([1, 2, 3, 8, 33, 130]),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 99),
)
def test_any_batch_is_sorted_stably_and_tiled(batch: int, num_groups: int, schedule: int, seed: int) -> None:
    assert_right(some_groups(batch, num_groups, seed), num_groups, schedule=schedule)


@pytest.mark.parametrize(("batch", "num_groups"), [(1300, 5), (1025, 1), (257, 1100), (40, 5000)])
@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_large_batches_and_thousands_of_groups(batch: int, num_groups: int, schedule: int) -> None:
    assert_right(some_groups(batch, num_groups), num_groups, schedule=schedule)


@pytest.mark.parametrize("counters", [1, 2, 5])
def test_little_shared_memory_means_fewer_warps_and_more_passes(counters: int) -> None:
    num_groups, warp_sums = 60, 9 * 32
    limit = 4 * (warp_sums + num_groups + 1 + counters * num_groups)
    assert_right(some_groups(300, num_groups), num_groups, shared_limit=limit)


@pytest.mark.parametrize("arch", [(80, 108, 166912), (90, 132, 232448)])
def test_support_ends_where_shared_memory_does(arch: tuple[int, int, int]) -> None:
    most = arch[2] // 8
    assert _native.cuda_routing_plan_supported(num_groups=most - 200, device=arch)
    assert not _native.cuda_routing_plan_supported(num_groups=most, device=arch)
    with cuda_launch.use_launcher(EmulatorLauncher(emulated("plan", AT_RUNTIME), facts=arch)):
        assert cuda.routing_plan(torch.zeros(1, dtype=torch.int64), most) is None


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**62)])
def test_a_group_id_out_of_range_stops_the_kernel(bad: int) -> None:
    groups = torch.tensor([0, 2, 1, bad, 0])
    with pytest.raises(EmulatorError, match=r"trap(.|\n)*groups \(5\), 3 groups"):
        planned(groups, 3)


PLANTED = {
    "PLAN_NO_SCAN_BARRIER": "a barrier missing between the scan of the warps' totals and their use",
    "PLAN_UNSTABLE": "samples of one group ranked from the last lane",
    "PLAN_TILE_PAST_GROUP": "the last tile of a group reaching one sample too far",
}


@plain_only
@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught(plant: str) -> None:
    def passes(schedule: int) -> bool:
        try:
            assert_right(some_groups(200, 70), 70, plant, schedule=schedule)
        except (AssertionError, EmulatorError):
            return False
        return True

    assert not all(passes(schedule) for schedule in SCHEDULES), PLANTED[plant]
