"""Group norms by clusters in the emulator: as accurate as torch, the same bits under every schedule, bugs caught."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from tests.emulator.test_group_norm import DTYPES, SEAM, STRADDLING, assert_matches_torch, gradients, routed, some_case
from tests.emulator.test_group_norm import every_dtype as every_dtype
from tests.emulator.test_group_norm_stream import H200, WIDE, backward, form_of, forward, square
from tests.tolerance import assert_as_accurate_as_torch

FORMS = ["cluster", "backward_cluster"]
THREE = Routing((0, 2, 3), 4, 3, (2, 1, 0, 2))  # an empty group, and two that share an expert

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@functools.cache
def _facts(dtype: int, **sizes: int) -> tuple[int, int, int]:
    for limit in range(512, 1 << 17, 64):
        settings: dict[str, Any] = {"device": (90, 1, limit), "streamed": True, "dtype": dtype, **sizes}
        with suppress(ValueError):  # no kernel fits
            plan = [launch.kernel for planner in (forward, backward) for launch in planner(**settings)]
            if [form_of(kernel) for kernel in plan] == FORMS:
                return 90, 1, limit
    raise AssertionError(f"no device takes clusters for {sizes}")


def facts_for(case: NormCase, dtype: torch.dtype) -> tuple[int, int, int]:
    """A device of so little shared memory that a block cannot hold an image of the case, but a cluster can."""
    sizes = {"batch": case.routing.batch, "channels": case.channels, "num_norm_groups": case.num_groups}
    sizes |= {"height": case.size[0], "width": case.size[1], "x2_channels": case.x2_channels}
    return _facts(list(DTYPES.values()).index(dtype), **sizes)


@contextmanager
def emulator(case: NormCase, dtype: torch.dtype, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    library = emulated("group_norm_cluster", AT_RUNTIME)
    launcher = EmulatorLauncher(library, schedule=schedule, facts=facts_for(case, dtype))
    with cuda_launch.use_launcher(launcher):
        yield launcher


@st.composite
def large_images(draw: st.DrawFn) -> NormCase:
    """Problems of whole 16-byte vectors and of pixels that four blocks share, the last often with fewer."""
    channels, num_groups = draw(st.sampled_from([(16, 2), (24, 8), (32, 4), (48, 6)]))
    groups = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    widths = [draw(st.integers(0, num_groups)) * (channels // num_groups) for _ in range(4)]
    return some_case(
        routing=Routing(tuple(groups), 4, 3, (2, 1, 0, 2)), channels=channels, num_groups=num_groups,
        size=draw(st.sampled_from([(5, 7), (4, 8), (13, 3), (9, 11)])),
        widths=draw(st.sampled_from([None, tuple(widths)])),
        extras=draw(st.sampled_from([(), ("scale", "shift")])), activation=draw(st.sampled_from([None, "silu"])),
        x2_channels=draw(st.sampled_from([0, 8])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def test_any_problem_is_as_accurate_as_torch() -> None:
    @settings(max_examples=6 if SANITIZED else 12, deadline=None, derandomize=True)
    @given(case=large_images())
    def check(case: NormCase) -> None:
        dtype = list(DTYPES.values())[case.seed % len(DTYPES)]
        with emulator(case, dtype, SCHEDULES[case.seed % len(SCHEDULES)]) as launcher:
            assert_matches_torch(case, dtype, "hopper")
        assert [form_of(kernel) for kernel in launcher.launched] == FORMS

    check()


@every_dtype
@pytest.mark.parametrize("changes", [WIDE, STRADDLING, SEAM], ids=["whole vectors", "dead channels", "two inputs"])
def test_every_kernel_is_as_accurate_as_torch(changes: dict[str, Any], dtype: str) -> None:
    case = some_case(routing=THREE, size=(17, 5), **changes)
    with emulator(case, DTYPES[dtype]) as launcher:
        assert_matches_torch(case, DTYPES[dtype], "hopper")
    suffix = f"{dtype}_vector" + "_two" * (changes is SEAM)
    assert launcher.launched == [f"tdc_group_norm_{form}_{suffix}" for form in FORMS]


@pytest.mark.parametrize("mean", [100.0, 1e5])
def test_a_large_mean_costs_no_accuracy(mean: float) -> None:
    case = some_case(routing=THREE, widths=None, size=(9, 11), extras=(), activation=None)
    tensors, copies, exact = (case.tensors(d) for d in (torch.float32, torch.float32, torch.float64))
    with torch.no_grad():
        tensors["x"] += mean
        for t in (copies, exact):
            t["x"].copy_(tensors["x"] - mean)  # exact in fp32
    with emulator(case, torch.float32):
        ours = routed(case, tensors, "hopper")
    assert_as_accurate_as_torch(ours, case.plain(copies), case.plain(exact))


def results_of(case: NormCase, plant: str = "", schedule: int = 0) -> dict[str, Tensor]:
    tensors = case.tensors(torch.float32)
    with emulator(case, torch.float32, schedule) as launcher, launcher.planted(plant):
        return gradients(case, routed(case, tensors, "hopper"), tensors)


@plain_only
@pytest.mark.parametrize("changes", [STRADDLING, SEAM], ids=["dead channels", "two inputs"])
def test_no_schedule_changes_a_bit(changes: dict[str, Any]) -> None:
    case = some_case(routing=THREE, size=(7, 5), **changes)
    first, *others = (results_of(case, schedule=schedule) for schedule in SCHEDULES)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


PLANTED = {
    "NORM_CLUSTER_READS_EARLY": "another block's sums that are read before it has them",
    "NORM_CLUSTER_ENDS_EARLY": "a block that ends while others read its sums",
    "NORM_ALL_RUNS_ALIKE": "a last run that counts for as many pixels as the others",
    "NORM_DROPS_LAST_RUN": "a run left out of the sums of backward",
    "NORM_NO_COEFFICIENT_BARRIER": "coefficients of another warp that are read too early",
    "NORM_NO_SUM_BARRIER": "a barrier missing between writing and adding the sums of each warp",
}


@plain_only
@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught(plant: str) -> None:
    case = some_case(routing=Routing((0, 2), 4, 3, (2, 1, 0, 2)), size=(7, 5), **STRADDLING)
    right = results_of(case)

    def passes(schedule: int) -> bool:
        try:
            wrong = results_of(case, plant, schedule)
        except EmulatorError:
            return False
        return all(torch.equal(right[name], wrong[name]) for name in right)

    if "CLUSTER" in plant:  # reported whatever the schedule
        assert not any(passes(schedule) for schedule in SCHEDULES), PLANTED[plant]
    else:
        assert not all(passes(schedule) for schedule in SCHEDULES), PLANTED[plant]


@plain_only
@pytest.mark.parametrize("plant", ["NORM_CLUSTER_READS_EARLY", "NORM_CLUSTER_ENDS_EARLY"])
def test_it_is_caught_in_backward_too(plant: str) -> None:
    case = some_case(routing=Routing((0, 2), 4, 3, (2, 1, 0, 2)), size=(7, 5), **STRADDLING)
    tensors = case.tensors(torch.float32)
    with emulator(case, torch.float32) as launcher:
        y = routed(case, tensors, "hopper")
        with launcher.planted(plant), pytest.raises(EmulatorError, match="begun|ended"):
            torch.autograd.grad(y.sum(), list(tensors.values()))


@pytest.mark.parametrize(
    ("size", "channels", "batch", "row", "blocks_per_sm"),
    [(64, 128, 64, 32, 3), (64, 256, 64, 32, 3), (64, 384, 64, 48, 2), (64, 256, 8, 32, 3), (96, 256, 64, 16, 3)],
)
def test_forward_of_large_images_has_whole_sectors_and_two_blocks_on_an_sm(
    size: int, channels: int, batch: int, row: int, blocks_per_sm: int
) -> None:
    """row: channels of a chunk. x is read once: a launch, no workspace."""
    (launch,) = forward(**square(batch, size, channels), streamed=True)
    assert launch.kernel == "tdc_group_norm_cluster_bf16_vector"
    assert tuple(launch.grid) == (batch * channels // row, 4, 1)
    tile = size * size // 4 * row * 2
    assert tile < launch.shared_bytes < tile + 12288
    assert blocks_per_sm * (launch.shared_bytes + 1024) <= H200[2] + 1024 < (blocks_per_sm + 1) * (tile + 1024)
    assert launch.threads * blocks_per_sm >= 512


@pytest.mark.parametrize(
    ("size", "channels", "batch", "row", "blocks_per_sm"),
    [(64, 128, 64, 16, 3), (64, 256, 64, 16, 3), (64, 384, 64, 24, 2), (32, 640, 64, 40, 5), (32, 256, 8, 32, 6)],
)
def test_backward_of_large_images_keeps_x_and_dy(
    size: int, channels: int, batch: int, row: int, blocks_per_sm: int
) -> None:
    (launch,) = backward(**square(batch, size, channels), streamed=True)
    assert launch.kernel == "tdc_group_norm_backward_cluster_bf16_vector"
    assert tuple(launch.grid) == (batch * channels // row, 4, 1)
    tiles = 2 * size * size // 4 * row * 2
    assert tiles < launch.shared_bytes < tiles + 12288
    assert blocks_per_sm * (launch.shared_bytes + 1024) <= H200[2] + 1024


@pytest.mark.parametrize("planner", [forward, backward])
@pytest.mark.parametrize(("batch", "size"), [(64, 4), (64, 8), (64, 16), (1, 8)])
def test_small_images_take_no_cluster(planner: Any, batch: int, size: int) -> None:
    (launch,) = planner(**square(batch, size, 256), streamed=True)
    assert "cluster" not in launch.kernel


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_have_no_clusters(arch: int) -> None:
    device = (arch, *H200[1:])
    assert [form_of(launch.kernel) for launch in forward(**square(64, 64, 256), streamed=True, device=device)] == [
        "partial",
        "apply",
    ]


def test_explain_names_clusters() -> None:
    case = some_case(routing=THREE, size=(17, 5), **WIDE)
    t = {name: tensor.detach() for name, tensor in case.tensors(torch.bfloat16).items()}
    plan = case.routing.plan()
    tensors = NormTensors(t["x"], t["weight"], t["bias"], plan.offsets, plan.weight_index, None, None, None)
    with emulator(case, torch.bfloat16):
        for op in ("routed_group_norm", "routed_group_norm_backward"):
            problem = norm_problem(op, tensors, case.num_groups, 1e-5, True)
            assert explain_problem(op, problem).forms["hopper"] == "by clusters"
