"""Clusters of blocks in the emulator: their barrier, each other's shared memory, and what must not be done with it."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.harness import SCHEDULES, EmulatorError, emulated, plain_only
from tests.emulator.sm90 import BLOCKS, Emulated, exchanged, expected_exchange, passed_on

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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_of_a_cluster_reach_each_others_shared_memory(schedule: int) -> None:
    values, out = exchanged(machine=Emulated(schedule))
    assert torch.equal(out, expected_exchange(values))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_of_a_cluster_wait_for_each_other_at_mbarriers(schedule: int) -> None:
    assert torch.equal(*passed_on(machine=Emulated(schedule)))


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", [1, 2], ids=["no wait before sending", "no wait before reading"])
def test_a_wait_that_is_missing_is_reported(bug: int, schedule: int) -> None:
    """Or a thread is a phase behind and waits for one that is over."""
    with pytest.raises(EmulatorError, match="race on byte .* of the shared array received|deadlock"):
        passed_on(bug, Emulated(schedule))


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_under_every_schedule(bug: str, schedule: int) -> None:
    number, message = BUGS[bug]
    with pytest.raises(EmulatorError, match=message):
        exchanged(machine=Emulated(schedule), bug=number)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_that_have_exited_are_not_waited_for(schedule: int) -> None:
    values, out = exchanged(machine=Emulated(schedule), bug=11)
    assert torch.equal(out[:, 1, :32], expected_exchange(values)[:, 1, :32])


def test_what_is_left_of_a_block_that_ends_is_not_its_data() -> None:
    """So that a schedule reveals a read of it without the race check, which sanitized builds do not have."""

    def is_right(schedule: int) -> bool:
        values, out = exchanged(machine=Emulated(schedule), bug=4)
        right = expected_exchange(values)
        right[:, 0] += values.view(2, 4, 2, 64).roll(-1, 1).reshape(BLOCKS, 64)
        return torch.equal(out, right)

    with emulated("self_test_sm90").without_race_check():
        assert not all(is_right(schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize(("grid", "threads"), [((2, 6, 1), 64), ((2, 8, 1), 48)])
def test_a_launch_of_no_whole_clusters_is_refused(grid: tuple[int, int, int], threads: int) -> None:
    with pytest.raises(EmulatorError, match="clusters are of 4 whole blocks of whole warps"):
        exchanged(grid=grid, threads=threads)
