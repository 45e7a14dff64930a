"""What the emulator must notice in a pipeline of copies and products: each bug, whatever the schedule."""

from __future__ import annotations

import pytest
import torch

from tests.emulator import sm90
from tests.emulator.harness import SCHEDULES, EmulatorError, emulated, plain_only

# PipelineBug in self_test_sm90_kernels.cuh -> what is said about it.
RACE, IN_FLIGHT = r"race on byte \d+ of the dynamic shared memory", "in flight: no mbarrier_wait covered it"
BUGS = {
    "no wait for the full stage": (1, f"{IN_FLIGHT}|{RACE}"),
    "no wait for the empty stage": (2, "more than 1 arrivals in a phase of byte 0 of the shared array full"),
    "the wrong phase": (3, r"deadlock(.|\n)*mbarrier_wait at .* \(phase 0: 4 of 4 arrivals and 0 bytes missing"),
    "fewer bytes expected": (4, f"{IN_FLIGHT}|{RACE}"),
    "more bytes expected": (5, r"deadlock(.|\n)*\(phase 0: 0 of 1 arrivals and 128 bytes missing"),
    "a stage released before its product is done": (6, f"{RACE}: a copy .* writes .* what a product of warp 4 read"),
    "no wait for a product": (7, RACE),
    "no fence before a product": (8, "no wgmma_fence since the registers could last be touched"),
    "no fence between stores and TMA": (
        9,
        "a store of thread .* which thread .* wrote .* and no async_fence is between",
    ),
    "no wait for the last store": (10, "exits while its stores have still to read shared memory"),
    "no fence after the init": (11, "no mbarrier_init_fence after the init of byte 0 of the shared array full"),
    "no barrier after the init": (12, "race on byte 0 of the shared array full|no mbarrier_init made byte 0 of"),
    "a descriptor that is not moved": (13, None),
    "a base offset": (14, "a descriptor is wrong: its base offset is 1, not 0"),
    "too many arrivals": (15, f"{RACE}|{IN_FLIGHT}|deadlock"),
    "more registers than there are": (16, r"deadlock(.|\n)*wait for registers in registers_take"),
    "a buffer overwritten while it is stored": (17, f"{RACE}: thread .* writes .* what a store of thread .* read"),
}


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (64, 5 * 64), generator=generator).bfloat16() for _ in range(2))
    return a, b


def is_right(schedule: int, bug: int) -> bool:
    a, b = operands()
    exact = a.double() @ b.double().T
    y = sm90.pipeline(a, b, bug, sm90.Emulated(schedule))
    return torch.equal(y, torch.stack([exact, 2 * exact]).to(torch.bfloat16))


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_reported_under_every_schedule(bug: str, schedule: int) -> None:
    number, message = BUGS[bug]
    if message is None:  # no rule is broken; the result is wrong
        assert not is_right(schedule, number)
        return
    with pytest.raises(EmulatorError, match=message):
        is_right(schedule, number)


@plain_only
@pytest.mark.parametrize(
    "bug",
    [
        "no wait for the full stage",
        "no wait for the empty stage",
        "fewer bytes expected",
        "a stage released before its product is done",
        "a buffer overwritten while it is stored",
    ],
)
def test_a_bug_spoils_the_result_under_some_schedule(bug: str) -> None:
    """What is under way holds NaN and happens late: that alone reveals these; sanitized builds have no race check."""

    def spoiled(schedule: int) -> bool:
        try:
            return not is_right(schedule, BUGS[bug][0])
        except EmulatorError:
            return True

    with emulated("self_test_sm90").without_race_check():
        assert any(spoiled(schedule) for schedule in SCHEDULES)
