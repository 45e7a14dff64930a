"""Group norms as streams in the emulator: as accurate as torch, the same bits under every schedule, bugs caught."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import _native
from tdc_fast.kernels.problems import NormTensors
from tdc_fast.ops import cuda_launch
from tdc_fast.ops.backends import explain_problem
from tdc_fast.ops.checks import norm_problem
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
    gradients,
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
def emulator(facts: tuple[int, int, int] = ONE_SM, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    libraries = [emulated(family, AT_RUNTIME) for family in ("group_norm_stream", "group_norm", "group_norm_two")]
    launcher = EmulatorLauncher(*libraries, schedule=schedule, facts=facts)
    with cuda_launch.use_launcher(launcher):
        yield launcher


def form_of(kernel: str) -> str:
    """ "backward_stream" of "tdc_group_norm_backward_stream_bf16_vector"."""
    return re.sub(r"tdc_group_norm_(\w+?)_(fp32|bf16|fp16)_.*", r"\1", kernel)


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
        assert_matches_torch(case, list(DTYPES.values())[case.seed % len(DTYPES)], "hopper")
        assert [form_of(kernel) for kernel in launcher.launched[-2:]] == ["stream", "backward_stream"]

    with emulator() as launcher:
        check()


EIGHT = Routing((0, 1, 1, 2, 3, 3, 0, 2), 4, 3, (2, 1, 0, 2))
every_width = pytest.mark.parametrize(
    "changes", [WIDE, STRADDLING, SEAM], ids=["whole vectors", "dead channels", "two inputs"]
)


@every_dtype
@every_width
def test_many_items_of_few_blocks_are_as_accurate_as_torch(changes: dict[str, Any], dtype: str) -> None:
    """Of experts, widths and live channels that differ from one item of a block to the next."""
    with emulator() as launcher:
        assert_matches_torch(some_case(routing=EIGHT, **changes), DTYPES[dtype], "hopper")
    suffix = f"{dtype}_vector" + "_two" * (changes is SEAM)
    assert launcher.launched == [f"tdc_group_norm_stream_{suffix}", f"tdc_group_norm_backward_stream_{suffix}"]


def test_of_many_samples_the_affines_gradients_are_summed_in_a_launch_of_their_own() -> None:
    routing = Routing(tuple(i % 7 % 3 for i in range(257)), 4, 3, (2, 1, 0, 2))
    with emulator() as launcher:
        assert_matches_torch(some_case(routing=routing, **STRADDLING | {"size": (1, 2)}), torch.float32, "hopper")
    assert [form_of(kernel) for kernel in launcher.launched[1:]] == [
        "backward_stream",
        "tdc_group_norm_expert_sums_fp32",
    ]


@plain_only
@every_width
def test_no_schedule_changes_a_bit(changes: dict[str, Any]) -> None:
    case, results = some_case(**changes), []
    for schedule in SCHEDULES:
        tensors = case.tensors(torch.bfloat16)
        with emulator(ONE_SM, schedule):
            results.append(gradients(case, routed(case, tensors, "hopper"), tensors))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("wanted", ["x", "weight", "scale", "x of two", "x2 of two"])
def test_each_gradient_alone_is_the_one_among_all(wanted: str) -> None:
    """Without dx, or where it is that of the other input, the tiles are filled all the same."""
    wanted, *two = wanted.split(" of ")
    case = some_case(routing=EIGHT, **(SEAM if two else STRADDLING))
    tensors = case.tensors(torch.bfloat16)
    with emulator() as launcher:
        every = gradients(case, routed(case, tensors, "hopper"), tensors)
        alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
        y = routed(case, alone, "hopper")
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        (grad,) = torch.autograd.grad(y, alone[wanted], dy)
    assert torch.equal(grad, every[f"d{wanted}"]) and form_of(launcher.launched[-1]) == "backward_stream"


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
    assert form_of(launcher.launched[0]) == "stream"
    assert_as_accurate_as_torch(ours, case.plain(copies), case.plain(exact))


def results_of(case: NormCase, dtype: torch.dtype, backward: bool, plant: str = "", schedule: int = 0) -> list[Tensor]:
    """y twice, or every gradient twice from one forward; the bug is planted in that pass alone."""
    tensors, results = case.tensors(dtype), []
    with emulator(ONE_SM, schedule):
        stream = emulated("group_norm_stream", AT_RUNTIME)
        with stream.planted("" if backward else plant):
            y = [routed(case, tensors, "hopper") for _ in range(1 if backward else 2)]
        if not backward:
            return [t.detach() for t in y]
        with stream.planted(plant):
            for _ in range(2):
                results += torch.autograd.grad(y[0].sum(), list(tensors.values()), retain_graph=True)
    return results


PLANTED = {
    ("forward", "NORM_STREAM_WAITS_FOR_NOTHING"): "an item that is read before its copies have arrived",
    ("forward", "NORM_STREAM_NO_LAST_GROUP"): "a last item whose copies no wait covers",
    ("forward", "NORM_STREAM_NO_FIRST_BARRIER"): "the lookup of an item that overtakes the one before",
    ("forward", "NORM_STREAM_ONE_TILE"): "an item that is read from the tile of another",
    ("forward", "NORM_NO_SUM_BARRIER"): "a barrier missing between writing and adding the sums of each warp",
    ("backward", "NORM_STREAM_WAITS_FOR_NOTHING"): "as above",
    ("backward", "NORM_STREAM_NO_FIRST_BARRIER"): "coefficients written while the item before needs its own",
    ("backward", "NORM_REFILLS_EARLY"): "a place that is given to the next item before this one has been read from it",
    ("backward", "NORM_NO_SUM_BARRIER"): "as above",
    ("backward", "NORM_NO_RELEASE"): "a block that counts itself before others see what it wrote",
    ("backward", "NORM_NO_ACQUIRE"): "a block that adds up what it need not see yet",
    ("backward", "NORM_SUMS_TOO_EARLY"): "the last item but one that adds up the samples",
    ("backward", "NORM_KEEPS_COUNTER"): "a counter that the next backward does not find at zero",
}


@plain_only
@pytest.mark.parametrize(("direction", "plant"), PLANTED)
def test_a_planted_bug_is_caught(direction: str, plant: str) -> None:
    case = some_case(**STRADDLING)
    right = results_of(case, torch.float32, direction == "backward")

    def passes(schedule: int) -> bool:
        try:
            wrong = results_of(case, torch.float32, direction == "backward", plant, schedule)
        except EmulatorError:
            return False
        return all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))

    assert not all(passes(schedule) for schedule in SCHEDULES), PLANTED[direction, plant]


def planned(direction: str, **changes: Any) -> list[Any]:
    """Launches in bf16 with 32 norm groups on an H200, at made-up addresses."""
    sizes = {"dtype": 1, "num_norm_groups": 32, "num_groups": 8, "num_experts": 8, "eps": 1e-5, "silu": True}
    names = ("x", "weight", "bias", "mean", "rstd", "offsets", "weight_index", "workspace", "counters")
    names += ("dy", "dx", "dweight", "dbias") if direction == "backward" else ("y",)
    absent = ("scale", "shift", "widths") + ("dscale", "dshift") * (direction == "backward")
    addresses = dict.fromkeys(names, 1 << 20) | dict.fromkeys(absent, 0)
    planner = getattr(_native, f"cuda_launches_group_norm_{direction}")
    return planner(**sizes | addresses | {"device": H200} | changes)


def square(batch: int, size: int, channels: int) -> dict[str, int]:
    return {"batch": batch, "height": size, "width": size, "channels": channels}


def forward(**changes: Any) -> list[Any]:
    return planned("forward", **changes)


def backward(**changes: Any) -> list[Any]:
    return planned("backward", **changes)


@pytest.mark.parametrize(
    ("size", "channels", "row", "rounds"),
    [(32, 128, 16, 2), (32, 256, 16, 4), (32, 512, 16, 8), (16, 512, 64, 2), (16, 1024, 64, 4)],
)
def test_two_blocks_fit_on_an_sm_and_have_equal_shares(size: int, channels: int, row: int, rounds: int) -> None:
    """row: channels of an item; rounds: items of a block, at most 264 of which run at once."""
    (launch,) = forward(**square(64, size, channels), streamed=True)
    assert launch.kernel == "tdc_group_norm_stream_bf16_vector" and launch.threads == 512
    tiles = 2 * size * size * row * 2
    assert tiles < launch.shared_bytes < tiles + 16384 and 2 * (launch.shared_bytes + 1024) <= H200[2] + 1024
    assert launch.grid[0] * rounds == 64 * channels // row and launch.grid[0] <= 2 * H200[1]
    (whole,) = forward(**square(64, size, channels))
    assert whole.kernel == "tdc_group_norm_whole_bf16_vector"


@pytest.mark.parametrize(
    ("size", "channels", "row", "blocks_per_sm"),
    [(32, 128, 16, 2), (32, 384, 24, 2), (16, 512, 64, 2)],
)
def test_backward_keeps_x_and_dy_of_as_wide_rows_as_two_blocks_leave_room_for(
    size: int, channels: int, row: int, blocks_per_sm: int
) -> None:
    """row: channels of an item. One launch has all gradients, and no workspace but each sample's terms."""
    (launch,) = backward(**square(64, size, channels), streamed=True)
    assert launch.kernel == "tdc_group_norm_backward_stream_bf16_vector"
    assert launch.threads * blocks_per_sm == 512  # of 128 registers
    tiles = 2 * size * size * row * 2
    assert tiles < launch.shared_bytes < tiles + 16384
    assert blocks_per_sm * (launch.shared_bytes + 1024) <= H200[2] + 1024
    rounds = -(-64 * channels // row // (blocks_per_sm * H200[1]))
    assert rounds >= 2 and launch.grid[0] == 64 * channels // row // rounds


@pytest.mark.parametrize("planner", [forward, backward])
@pytest.mark.parametrize("size", [4, 8])
def test_few_chunks_are_no_stream(size: int, planner: Any) -> None:
    launches = planner(**square(64, size, 256), streamed=True)
    assert [launch.kernel for launch in launches] == [launch.kernel for launch in planner(**square(64, size, 256))]


def test_rows_shorter_than_a_sector_of_memory_take_two_launches() -> None:
    """Of 4 and 8 channels per norm group; at 12 the chunk's rows are 48 bytes, in smaller images 64."""
    forms = {
        channels: [form_of(launch.kernel) for launch in forward(**square(64, 64, channels))]
        for channels in (128, 256, 384)
    }
    assert forms == {128: ["partial", "apply"], 256: ["partial", "apply"], 384: ["whole"]}
    assert len(forward(**square(64, 32, 256))) == len(forward(**square(64, 32, 128))) == 1
    assert len(forward(**square(8, 64, 256))) == 1  # few blocks: less is fetched twice than a launch costs


@pytest.mark.parametrize(("channels", "threads"), [(384, 128), (512, 128), (640, 128), (768, 128), (1024, 128)])
def test_blocks_that_fit_beside_each_other_leave_less_than_a_third_of_the_threads_unused(
    channels: int, threads: int
) -> None:
    """Of 512 that registers allow in backward. Of 640 channels five blocks of 64 threads fit; four of 128 do more."""
    (launch,) = backward(**square(64, 16, channels))
    assert launch.kernel == "tdc_group_norm_backward_whole_bf16_vector" and launch.threads == threads
    assert launch.threads * min(4, H200[2] // launch.shared_bytes) * 3 > 512 * 2


@pytest.mark.parametrize("op", ["routed_group_norm", "routed_group_norm_backward"])
def test_explain_says_which_form_serves(op: str) -> None:
    case = some_case(**WIDE)
    t = {name: tensor.detach() for name, tensor in case.tensors(torch.bfloat16).items()}
    plan = case.routing.plan()
    tensors = NormTensors(t["x"], t["weight"], t["bias"], plan.offsets, plan.weight_index, None, None, None)
    problem = norm_problem(op, tensors, case.num_groups, 1e-5, True)
    said = []
    for facts in (ONE_SM, (90, 132, 232448)):
        with emulator(facts):
            said.append(explain_problem(op, problem).forms["hopper"])
    assert said[0] == "as a stream"
    assert said[1].startswith("in the portable form: it is no stream, its")
