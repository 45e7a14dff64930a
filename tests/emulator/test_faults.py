"""What the emulator must notice: endless waits, divergence, bad addresses, and data used before it has arrived."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.emulator.harness import (
    AT_RUNTIME,
    ROOT,
    SANITIZED,
    SCHEDULES,
    EmulatorError,
    emulated,
    plain_only,
    sanitizer_runtime,
)
from tests.emulator.harness import sanitized_environment as environment
from tests.emulator.self_test import run

FAULTS = {
    "threads that leave before a block barrier": (
        0,
        r"deadlock:\s+threads 0-63 wait at barrier 0 in block_sync at self_test_kernels\.cuh:\d+ \(64 of 128 threads "
        r"came\)\s+threads 64-127 exited",
    ),
    "a named barrier that too few come to": (
        1,
        r"deadlock:\s+threads 0-31 wait at barrier 3 in named_barrier_sync at .* \(64 of 96 threads came\)",
    ),
    "lanes that leave before a shuffle": (2, r"threads 0-15 wait for warp 0 in shfl_xor at .* \(16 of 32 lanes came\)"),
    "shuffles in both branches of a warp": (3, r"shfl_xor at .*: divergence in warp \d: lane \d+ came here while lane"),
    "block barriers in both branches of a warp": (4, r"divergence in warp 0: its lanes came to barrier 0 from block_s"),
    "part of a warp at a barrier": (5, r"divergence in warp 0: lane 0 came to barrier 1, lane 16 did not"),
    "two counts for one barrier": (6, r"barrier 1 was opened for (128|96) threads; this one comes with (128|96)"),
    "a misaligned 16-byte store": (7, r"store_16 at .*, thread \d+: misaligned: the address is 8 past a multiple"),
    "a copy to a misaligned place": (
        8,
        r"cp_async_16 at .*: misaligned: byte \d+ of the dynamic shared memory is no m",
    ),
    "a copy from a misaligned place": (9, r"cp_async_16 at .*: misaligned: the address is 4 past a multiple of 16"),
    "a copy past the end of shared memory": (10, r"it is \d+ past the end of the dynamic shared memory"),
    "a matrix row at a misaligned place": (11, r"ldmatrix_x4 at .*: misaligned: byte \d+ of the dynamic shared memory"),
    "a matrix row outside shared memory": (12, r"ldmatrix_x4 at .*: the address does not lie in shared memory"),
    "a trap": (13, r"trap at .*, thread 77: the kernel trapped"),
    "a barrier id out of range": (14, r"barrier ids go from 1 to 15, not 0"),
    "a barrier of a part of a warp": (15, r"a barrier counts whole warps, not 100 threads"),
    "warps that wait for each other": (
        16,
        r"deadlock:\s+threads 0-63 wait at barrier 1 in .* \(64 of 128 threads came\)\s+"
        r"threads 64-127 wait at barrier 2 in .* \(64 of 128 threads came\)",
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_with_its_place(fault: str, schedule: int) -> None:
    mode, message = FAULTS[fault]
    with pytest.raises(EmulatorError) as error:
        run("faults", torch.empty(4), torch.zeros(8), mode=mode, threads=128, shared=1024, schedule=schedule)
    assert re.search(message, str(error.value))
    assert f"in kernel self_test_faults, block (0, 0, 0) of (1, 1, 1), 128 threads, schedule {schedule}" in str(
        error.value
    )


def test_a_launch_after_a_fault_starts_afresh() -> None:
    for mode in (0, 1, 2):
        with pytest.raises(EmulatorError):
            run("faults", torch.empty(4), torch.zeros(8), mode=mode, threads=128, shared=1024)
        values = torch.arange(128.0)
        assert torch.equal(run("reverse", torch.empty(128), values, threads=128), values.flip(0))


def test_a_launch_gives_back_what_it_mapped() -> None:
    """Every stack is two mappings. A process that keeps those of many libraries comes to its system's limit of them,
    and whatever asks for memory next fails."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    for mode in (0, 13):  # a deadlock, a trap
        with pytest.raises(EmulatorError):
            run("faults", torch.empty(4), torch.zeros(8), mode=mode, threads=128, shared=1024)
    run("reverse", torch.empty(128), torch.zeros(128), threads=128)
    assert mappings() < before + 64


@pytest.mark.parametrize(
    "kernel, settings, message",
    [
        ("nothing", {}, "no kernel 'self_test_nothing' in this library"),
        ("reverse", {"threads": 129}, "got 129 threads, its launch bound is 128"),
        ("reverse", {"shared": 232449}, "got 232449 bytes of shared memory, a block has 232448"),
        ("reverse", {"grid": (1, 0, 1)}, r"got a grid of \(1, 0, 1\)"),
    ],
)
def test_a_wrong_launch_is_refused(kernel: str, settings: dict, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run(kernel, torch.empty(128), torch.empty(128), **settings)


def test_parameters_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(EmulatorError, match="got 8 bytes of parameters, its struct has 32"):
        emulated("self_test", AT_RUNTIME).launch("self_test_reverse", (1, 1, 1), 32, 0, bytes(8), 0)


@pytest.mark.parametrize("mode", [0, 1])
def test_shared_memory_that_nobody_wrote_is_nan(mode: int) -> None:
    assert run("unwritten", torch.zeros(32), mode=mode, shared=128).isnan().all()


def test_a_register_that_nobody_wrote_is_no_plausible_value() -> None:
    out = run("unwritten", torch.zeros(32), mode=2, shared=128)
    assert (out.isnan() | (out.abs() > 1e37)).all()


def stages_are_right(schedule: int, plant: str = "") -> bool:
    rows = (torch.arange(9 * 128).view(9, 128) % 37).float()
    out = run("stages", torch.empty(32), rows, count=9, shared=3 * 512, schedule=schedule, plant=plant)
    return torch.equal(out, rows.view(9, 32, 4).sum((0, 2)).flip(0))


def reverse_is_right(schedule: int, plant: str = "") -> bool:
    values = torch.arange(128.0)
    out = run("reverse", torch.empty(128), values, threads=128, schedule=schedule, plant=plant)
    return torch.equal(out, values.flip(0))


def producer_is_right(schedule: int, plant: str = "") -> bool:
    rows = torch.arange(7 * 32.0).view(7, 32)
    out = run("producer", torch.empty(7, 32), rows, count=7, threads=64, schedule=schedule, plant=plant)
    return torch.equal(out, 2 * rows.flip(1))


def warp_reverse_is_right(schedule: int, plant: str = "") -> bool:
    values = torch.arange(32.0)
    out = run("warp_reverse", torch.empty(32), values, schedule=schedule, plant=plant)
    return torch.equal(out, values.flip(0))


PLANTS = {
    "SELF_NO_WAIT": (stages_are_right, r"thread \d+ touches .* while the copy that thread \d+ issued .* is in flight"),
    "SELF_NO_COMMIT": (
        stages_are_right,
        r"thread \d+ touches .* while the copy that thread \d+ issued .* is in flight",
    ),
    "SELF_WRONG_STAGE": (stages_are_right, r"while the copy that thread \d+ issued .* is in flight"),
    "SELF_NO_STAGE_BARRIER": (stages_are_right, r"race on byte \d+ of the dynamic shared memory|in flight"),
    "SELF_NO_BARRIER": (reverse_is_right, r"race on byte \d+ of the shared array values"),
    "SELF_NO_EMPTY_WAIT": (producer_is_right, r"race on byte \d+ of the shared array buffer|came twice to barrier 1"),
    "SELF_NO_WARP_SYNC": (warp_reverse_is_right, r"race on byte \d+ of the shared array values"),
}


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_wait_or_barrier_is_reported_under_every_schedule(plant: str, schedule: int) -> None:
    is_right, message = PLANTS[plant]
    assert is_right(schedule)
    with pytest.raises(EmulatorError, match=message):
        is_right(schedule, plant)


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_missing_wait_or_barrier_spoils_the_result_under_some_schedule(plant: str) -> None:
    """The poison alone reveals it; sanitized builds have no race check."""
    is_right, _ = PLANTS[plant]

    def spoiled(schedule: int) -> bool:
        try:
            return not is_right(schedule, plant)
        except EmulatorError as error:
            return "race" not in str(error)

    with emulated("self_test", AT_RUNTIME).without_race_check():
        assert any(spoiled(schedule) for schedule in SCHEDULES)


@plain_only
def test_a_race_is_reported_with_both_places() -> None:
    if shutil.which("addr2line") is None:
        pytest.skip("no addr2line on PATH: places are code addresses")
    with pytest.raises(EmulatorError) as error:
        reverse_is_right(0, "SELF_NO_BARRIER")
    place = r"at self_test_kernels\.cuh:(\d+)"
    pattern = rf"thread \d+ (\w+) {place} what thread \d+ (\w+) {place}, and no barrier is between"
    found = re.search(pattern, str(error.value))
    assert found, str(error.value)
    lines = (ROOT / "csrc/emulator/self_test_kernels.cuh").read_text().splitlines()
    for verb, line in ((found[1], found[2]), (found[3], found[4])):
        code = "  values[threadIdx.x] =" if verb in ("writes", "wrote") else "  static_cast<float*>(p.out)[self_test"
        assert lines[int(line) - 1].startswith(code)


@plain_only
@pytest.mark.parametrize("mode", [1, 2], ids=["an atomic and a plain read", "a byte written twice"])
def test_conflicts_are_races_and_nothing_else_is(mode: int) -> None:
    """Mode 0 has atomics of many threads, reads by all, and neighbouring bytes, none of which conflict."""
    out = torch.empty(64, dtype=torch.int32)
    assert run("conflicts", out, mode=0, threads=64).eq(65).all()
    with pytest.raises(EmulatorError, match="race on byte"):
        run("conflicts", out, mode=mode, threads=64)


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", [2, 3, 4], ids=["no barrier", "written by two blocks", "read from another block"])
def test_races_on_global_memory_are_reported(mode: int, schedule: int) -> None:
    out, source = torch.empty(65, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert run("global", out, source, mode=0, grid=(2, 1, 1), schedule=schedule)[:64].eq(3).all()
    assert run("global", out, source, mode=1, grid=(2, 1, 1), schedule=schedule)[:64].eq(6).all()
    order = "no barrier is between" if mode == 2 else "nothing orders the two blocks"
    with pytest.raises(EmulatorError, match=f"race on global memory at 0x.*, and {order}"):
        run("global", out, source, mode=mode, grid=(2, 1, 1), schedule=schedule)


def last_block_is_right(schedule: int, plant: str = "") -> bool:
    values, counter = torch.arange(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    sums = [
        run("last_block", torch.empty(6, dtype=torch.int32), values, counter, grid=(5, 1, 1), threads=64,
            schedule=schedule, plant=plant)[0]
        for _ in range(2)
    ]  # fmt: skip
    return sums == [10, 10] and counter == 0


@plain_only
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plant", ["SELF_NO_RELEASE", "SELF_NO_ACQUIRE", "SELF_NO_BARRIER_BEFORE_ARRIVAL"])
def test_blocks_are_ordered_by_fences_around_atomics(plant: str, schedule: int) -> None:
    assert last_block_is_right(schedule)
    with pytest.raises(EmulatorError, match="race on global memory at 0x.*, and nothing orders the two blocks"):
        last_block_is_right(schedule, plant)


# Without torch, whose import takes seconds under ASan; of a size that Python takes from malloc.
BOUNDS = """
import ctypes
from tests.emulator.self_test import launch
buffer = ctypes.addressof(memory := ctypes.create_string_buffer(4096))
launch("bounds", buffer, buffer, buffer, mode={mode}, count={at}, shared=40)
print("not noticed")
"""


@plain_only
@pytest.mark.parametrize(
    "mode, at, access", [(0, 40, "WRITE"), (0, -1, "WRITE"), (1, 4096, "WRITE"), (2, 4096, "READ")], ids=str
)
def test_asan_stops_an_access_out_of_bounds(mode: int, at: int, access: str) -> None:
    """One byte past shared memory, one before it, and one past other memory."""
    assert not SANITIZED
    command = [sys.executable, "-c", BOUNDS.format(mode=mode, at=at)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment(sanitizer_runtime()), capture_output=True, text=True, timeout=300
    )
    assert result.returncode != 0 and "not noticed" not in result.stdout
    assert "heap-buffer-overflow" in result.stderr, result.stderr[-3000:]
    assert re.search(rf"{access} of size 1.*\n\s+#0 .*self_test_bounds", result.stderr), result.stderr[-3000:]
