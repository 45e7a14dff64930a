"""The group norm as a stream in the emulator: as accurate as torch, the same bits under every schedule, bugs caught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast import _native, explain, routed_group_norm
from tdc_fast.ops import cuda_launch
from tests.cases import NormCase, Routing
from tests.emulator.harness import (
    AT_RUNTIME,
    SANITIZED,
    SCHEDULES,
    EmulatorError,
    EmulatorLauncher,
    emulated,
    plain_only,
)
from tests.emulator.test_group_norm import (
    DTYPES,
    SEAM,
    STRADDLING,
    assert_matches_torch,
    routed,
    some_case,
)
from tests.emulator.test_group_norm import every_dtype as every_dtype
from tests.tolerance import assert_as_accurate_as_torch

ONE_SM = (90, 1, 166912)  # so that few samples are many items for every block
H200 = (90, 132, 232448)
WIDE = {"channels": 64, "num_groups": 4, "widths": (64, 0, 32, 48)}

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@contextmanager
def emulator(schedule: int = 0, plant: str = "") -> Iterator[EmulatorLauncher]:
    stream = emulated("group_norm_stream", *([plant] if plant else []))
    launcher = EmulatorLauncher(
        stream, emulated("group_norm"), emulated("group_norm_two"), schedule=schedule, facts=ONE_SM
    )
    with cuda_launch.use_launcher(launcher):
        yield launcher


def streamed(launcher: EmulatorLauncher) -> int:
    return sum("_stream_" in kernel for kernel in launcher.launched)


@st.composite
def streams(draw: st.DrawFn) -> NormCase:
    """Problems of whole 16-byte vectors and at least four samples."""
    channels, num_groups = draw(st.sampled_from([(16, 2), (24, 8), (32, 4), (48, 6), (64, 4)]))
    groups = draw(st.lists(st.integers(0, 3), min_size=4, max_size=8))
    widths = [draw(st.integers(0, num_groups)) * (channels // num_groups) for _ in range(4)]
    return some_case(
        routing=Routing(tuple(groups), 4, 3, (2, 1, 0, 2)), channels=channels, num_groups=num_groups,
        size=(draw(st.integers(1, 9)), draw(st.integers(2, 8))), widths=draw(st.sampled_from([None, tuple(widths)])),
        extras=draw(st.sampled_from([(), ("scale", "shift")])), activation=draw(st.sampled_from([None, "silu"])),
        x2_channels=draw(st.sampled_from([0, 8])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def test_any_problem_is_as_accurate_as_torch() -> None:
    @settings(max_examples=8 if SANITIZED else 16, deadline=None, derandomize=True)
    @given(case=streams())
    def check(case: NormCase) -> None:
        launcher.schedule = SCHEDULES[case.seed % len(SCHEDULES)]
        before = streamed(launcher)
        assert_matches_torch(case, list(DTYPES.values())[case.seed % 3], "hopper")
        assert streamed(launcher) == before + 1

    with emulator() as launcher:
        check()


@every_dtype
@pytest.mark.parametrize("changes", [WIDE, STRADDLING, SEAM], ids=["whole vectors", "dead channels", "two inputs"])
def test_many_items_of_few_blocks_are_as_accurate_as_torch(changes: dict[str, Any], dtype: str) -> None:
    """Of experts, widths and live channels that differ from one item of a block to the next."""
    case = some_case(routing=Routing((0, 1, 1, 2, 3, 3, 0, 2), 4, 3, (2, 1, 0, 2)), **changes)
    with emulator() as launcher:
        assert_matches_torch(case, DTYPES[dtype], "hopper")
    suffix = f"{dtype}_vector" + "_two" * (changes is SEAM)
    assert launcher.launched == [f"tdc_group_norm_stream_{suffix}", f"tdc_group_norm_backward_whole_{suffix}"]


def test_no_schedule_changes_a_bit() -> None:
    case = some_case(**WIDE)
    results = []
    for schedule in SCHEDULES:
        with emulator(schedule):
            results.append(routed(case, case.tensors(torch.bfloat16), "hopper"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mean", [100.0, 1e5])
def test_a_large_mean_costs_no_accuracy(mean: float) -> None:
    case = some_case(widths=None, size=(17, 13), extras=(), activation=None)
    tensors, copies, exact = (case.tensors(d) for d in (torch.float32, torch.float32, torch.float64))
    with torch.no_grad():
        tensors["x"] += mean
        for t in (copies, exact):
            t["x"].copy_(tensors["x"] - mean)  # exact in fp32
    with emulator() as launcher:
        ours = routed(case, tensors, "hopper")
    assert streamed(launcher) == 1
    assert_as_accurate_as_torch(ours, case.plain(copies), case.plain(exact))


PLANTED = {
    "NORM_STREAM_WAITS_FOR_NOTHING": "an item that is read before its copies have arrived",
    "NORM_STREAM_NO_LAST_GROUP": "a last item whose copies no wait covers",
    "NORM_STREAM_NO_FIRST_BARRIER": "the lookup of an item that overtakes the one before",
    "NORM_STREAM_ONE_TILE": "an item that is read from the tile of another",
    "NORM_NO_SUM_BARRIER": "a barrier missing between writing and adding the sums of each warp",
}


@plain_only
@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught(plant: str) -> None:
    def passes(schedule: int) -> bool:
        try:
            with emulator(schedule, AT_RUNTIME) as launcher, emulated("group_norm_stream", AT_RUNTIME).planted(plant):
                assert_matches_torch(some_case(**STRADDLING), torch.float32, "hopper")
                assert streamed(launcher)
        except (AssertionError, EmulatorError):
            return False
        return True

    assert not all(passes(schedule) for schedule in SCHEDULES), PLANTED[plant]


def planned(batch: int, size: int, channels: int, device: tuple[int, int, int] = H200, **changes: Any) -> list[Any]:
    """Launches of a forward in bf16 with 32 norm groups, at made-up addresses."""
    sizes = {"dtype": 1, "batch": batch, "height": size, "width": size, "channels": channels, "num_norm_groups": 32}
    sizes |= {"num_groups": 8, "num_experts": 8, "eps": 1e-5, "silu": True, "device": device}
    names = ("x", "weight", "bias", "mean", "rstd", "offsets", "weight_index", "workspace", "y")
    addresses = dict.fromkeys(names, 1 << 20) | dict.fromkeys(("scale", "shift", "widths"), 0)
    return _native.cuda_launches_group_norm_forward(**sizes | addresses | changes)


@pytest.mark.parametrize(
    ("size", "channels", "row", "rounds"),
    [(32, 128, 16, 2), (32, 256, 16, 4), (32, 512, 16, 8), (16, 512, 64, 2), (16, 1024, 64, 4)],
)
def test_two_blocks_fit_on_an_sm_and_have_equal_shares(size: int, channels: int, row: int, rounds: int) -> None:
    """row: channels of an item; rounds: items of a block, at most 264 of which run at once."""
    (launch,) = planned(64, size, channels, streamed=True)
    assert launch.kernel == "tdc_group_norm_stream_bf16_vector" and launch.threads == 512
    tiles = 2 * size * size * row * 2
    assert tiles < launch.shared_bytes < tiles + 16384 and 2 * (launch.shared_bytes + 1024) <= H200[2] + 1024
    assert launch.grid[0] * rounds == 64 * channels // row and launch.grid[0] <= 2 * H200[1]
    (whole,) = planned(64, size, channels)
    assert whole.kernel == "tdc_group_norm_whole_bf16_vector"


@pytest.mark.parametrize("size", [4, 8, 64])
def test_few_chunks_and_chunks_of_which_two_do_not_fit_are_no_stream(size: int) -> None:
    launches = planned(64, size, 256, streamed=True)
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in planned(64, size, 256)]


def test_rows_shorter_than_a_sector_of_memory_take_two_launches() -> None:
    """Of 4 and 8 channels per norm group; at 12 the chunk's rows are 48 bytes, in smaller images 64."""
    forms = {
        channels: [launch.kernel.split("_")[3] for launch in planned(64, 64, channels)] for channels in (128, 256, 384)
    }
    assert forms == {128: ["partial", "apply"], 256: ["partial", "apply"], 384: ["whole"]}
    assert len(planned(64, 32, 256)) == len(planned(64, 32, 128)) == 1
    assert len(planned(8, 64, 256)) == 1  # few blocks: less is fetched twice than a launch costs


def test_explain_says_which_form_serves() -> None:
    case = some_case(**WIDE)
    t = case.tensors(torch.bfloat16)
    with emulator():
        said = explain(routed_group_norm, t["x"], t["weight"], t["bias"], case.routing.plan(), **case.settings())
    assert said.forms["hopper"] == "as a stream"
