"""The tile table: every sample once per level, no tile across groups, and a size that the host knows."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast import RoutingPlan
from tdc_fast.kernels.tile_table import SAMPLES_PER_TILE, level_start, tile_rows, tile_table, tiles_of, total_rows

sizes_of_groups = st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 64, 300]), min_size=1, max_size=9)


def expected_table(sizes: list[int]) -> list[list[int]]:
    """The same table in plain Python."""
    batch, table = sum(sizes), []
    for most in SAMPLES_PER_TILE:
        level, start = [], 0
        for group, size in enumerate(sizes):
            level += [[group, start + at, min(most, size - at)] for at in range(0, size, most)]
            start += size
        table += level + [[-1, 0, 0]] * (tile_rows(batch, len(sizes), most) - len(level))
    return table


@settings(deadline=None)
@given(sizes_of_groups)
def test_the_table_tiles_every_group_at_every_level(sizes: list[int]) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    table = tile_table(offsets, sum(sizes))
    assert table.dtype == torch.int32
    assert table.tolist() == expected_table(sizes)


@given(sizes_of_groups, st.sampled_from(SAMPLES_PER_TILE))
def test_a_level_has_enough_rows_for_any_group_sizes(sizes: list[int], most: int) -> None:
    assert sum(-(-size // most) for size in sizes) <= tile_rows(sum(sizes), len(sizes), most)


def test_levels_follow_each_other() -> None:
    assert SAMPLES_PER_TILE == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for batch, groups in ((0, 3), (1, 1), (7, 3), (64, 8), (1000, 2)):
        start = 0
        for most in SAMPLES_PER_TILE:
            assert level_start(batch, groups, most) == start
            start += tile_rows(batch, groups, most)
        assert total_rows(batch, groups) == start


def test_a_level_is_not_larger_than_its_worst_case_by_more_than_the_groups() -> None:
    """One sample per tile needs exactly B rows; 64 samples in 8 groups at 16 per tile at most 4 + 8."""
    assert tile_rows(64, 8, 1) == 64
    assert tile_rows(64, 8, 16) == 12
    assert tile_rows(3, 8, 256) == 3


def test_a_plan_in_host_memory_has_no_tiles_and_a_gpu_backend_builds_them() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([2, 0, 2, 2]), 3)
    assert plan.tiles.shape == (0, 3) and plan.tiles.dtype == torch.int32
    made = tiles_of(plan.tiles, plan.offsets, 4)
    assert made.tolist() == expected_table([1, 0, 3])
    assert tiles_of(made, plan.offsets, 4) is made


def test_the_size_of_a_table_on_a_device_does_not_depend_on_the_groups() -> None:
    with torch._subclasses.FakeTensorMode():
        groups = torch.zeros(12, dtype=torch.int64, device="cuda")
        weight_index = torch.zeros(5, dtype=torch.int32, device="cuda")
        plan = RoutingPlan.from_groups(groups, 5, weight_index)
        assert plan.tiles.shape == (total_rows(12, 5), 3)
        assert (plan.tiles.dtype, plan.tiles.device.type) == (torch.int32, "cuda")
