"""Clusters of blocks in the emulator: their barrier, each other's shared memory, and what must not be done with it."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from tests.emulator.harness import SCHEDULES, EmulatorError, emulated, plain_only

GRID = (2, 8, 1)  # clusters of four along y
BLOCKS = 16
BEGUN = "whose block need not have begun: no barrier of the cluster is before"
ENDED = r"whose block may have ended: none of its threads waits for a barrier of the cluster after that"
# ClusterBug in self_test_sm90_kernels.cuh -> what is said about it.
BUGS = {
    "no barrier before another block's memory is read": (1, BEGUN),
    "arrival without a wait": (2, f"came again to the cluster's barrier without a cluster_wait|{BEGUN}"),
    "no barrier before what another block wrote is read": (3, f"race on byte .* of the shared array received|{ENDED}"),
    "a read of a block that may have ended": (4, ENDED),
    "a block that does not wait for its readers": (5, f"the shared memory of rank 1, {ENDED}"),
    "two arrivals in a phase": (6, "cluster_arrive at .* came again to the cluster's barrier without a cluster_wait"),
    "a wait without an arrival": (7, "cluster_wait at .* no cluster_arrive came before"),
    "half a warp at the barrier": (8, r"deadlock(.|\n)*16 of 32 lanes came"),
    "two writers of one place": (9, r"race on byte \d+ of the shared array received of rank 0"),
    "a rank that is not there": (10, "no rank 4 in a cluster of 4"),
}


def exchanged(
    schedule: int, bug: int = 0, grid: tuple[int, int, int] = GRID, threads: int = 64
) -> tuple[Tensor, Tensor]:
    """(what each block has, what the kernel makes of it)."""
    values = torch.randint(-1000, 1000, (BLOCKS, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    out = torch.full((BLOCKS, 2, 64), -1, dtype=torch.int32)
    params = struct.pack("=QQi4x", values.data_ptr(), out.data_ptr(), bug)
    emulated("self_test_sm90").launch("self_test_cluster", grid, threads, 256, params, schedule)
    return values, out


def expected(values: Tensor) -> Tensor:
    clusters = values.view(2, 4, 2, 64)  # (cluster in y, rank, x, 64)
    sums = clusters.sum(1, dtype=torch.int32, keepdim=True).flip(3).expand_as(clusters)
    return torch.stack([sums, clusters.roll(1, 1)], 3).reshape(BLOCKS, 2, 64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_of_a_cluster_reach_each_others_shared_memory(schedule: int) -> None:
    values, out = exchanged(schedule)
    assert torch.equal(out, expected(values))


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_under_every_schedule(bug: str, schedule: int) -> None:
    number, message = BUGS[bug]
    with pytest.raises(EmulatorError, match=message):
        exchanged(schedule, number)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_that_have_exited_are_not_waited_for(schedule: int) -> None:
    values, out = exchanged(schedule, 11)
    assert torch.equal(out[:, 1, :32], expected(values)[:, 1, :32])


def test_what_is_left_of_a_block_that_ends_is_not_its_data() -> None:
    """So that a schedule reveals a read of it without the race check, which sanitized builds do not have."""

    def is_right(schedule: int) -> bool:
        values, out = exchanged(schedule, 4)
        right = expected(values)
        right[:, 0] += values.view(2, 4, 2, 64).roll(-1, 1).reshape(BLOCKS, 64)
        return torch.equal(out, right)

    with emulated("self_test_sm90").without_race_check():
        assert not all(is_right(schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize(("grid", "threads"), [((2, 6, 1), 64), ((2, 8, 1), 48)])
def test_a_launch_of_no_whole_clusters_is_refused(grid: tuple[int, int, int], threads: int) -> None:
    with pytest.raises(EmulatorError, match="clusters are of 4 whole blocks of whole warps"):
        exchanged(0, grid=grid, threads=threads)
