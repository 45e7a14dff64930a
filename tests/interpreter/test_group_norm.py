"""The Triton group norm, forward and backward, run by Triton's interpreter, against the fp64 reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tdc_fast import routed_group_norm
from tdc_fast.kernels.group_norm import NormTile, norm_tile
from tdc_fast.kernels.problems import NormProblem, NormTensors
from tdc_fast.ops import reference
from tdc_fast.ops import triton as backend
from tdc_fast.ops.checks import norm_problem
from tests.cases import NormCase, Routing, norm_cases
from tests.tolerance import assert_as_accurate_as_torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def some_case(**changes: Any) -> NormCase:
    settings = {
        "routing": Routing((0, 2, 2, 1, 0, 2), 3, 3, None),
        "channels": 12,
        "num_groups": 4,
        "size": (6, 5),
        "widths": (12, 3, 6),
        "extras": ("scale", "shift"),
        "activation": "silu",
        "layout": "channels_last",
        "seed": 3,
    }
    return NormCase(**(settings | changes))


def routed(case: NormCase, tensors: dict[str, Tensor], name: str = "triton") -> Tensor:
    extras = {extra: tensors.get(extra) for extra in ("scale", "shift", "x2")}
    plan, affine = case.routing.plan(), (tensors["weight"], tensors["bias"])
    return routed_group_norm(tensors["x"], *affine, plan, **case.settings(), **extras, backend=name)


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every input for some fixed upstream gradient."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)
    grads = torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def assert_accurate(case: NormCase, dtype: torch.dtype) -> None:
    tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors), tensors)
    torchs = gradients(case.plain(copies), copies)
    right = gradients(routed(case, exact, "reference"), exact)
    terms = case.routing.batch * case.size[0] * case.size[1] * case.channels // case.num_groups
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], right[name], f"{name} of {case}", max(64, terms))


@DTYPES
def test_any_problem_is_as_accurate_as_torch(dtype: torch.dtype, nan_filled_memory: None) -> None:
    """Any groups, widths, layouts; with and without scale, shift and SiLU; output and all gradients."""

    @given(case=(norm_cases() | norm_cases(fused=True)).filter(lambda case: case.routing.batch > 0))
    @settings(max_examples=14, deadline=None, derandomize=True)
    def check(case: NormCase) -> None:
        assert_accurate(case, dtype)

    check()


@pytest.mark.parametrize(
    ("channels", "num_groups", "size"),
    [
        (64, 32, (9, 33)),  # two programs per sample, several tiles of pixels, the last one ragged
        (192, 8, (3, 3)),  # 24 channels per group, not a power of two
        (40, 40, (2, 7)),  # a channel per group, and a last program with fewer groups than the others
        (600, 1, (2, 2)),  # one group, wider than a tile
    ],
)
def test_statistics_are_right_across_tiles_and_programs(
    channels: int, num_groups: int, size: tuple[int, int], nan_filled_memory: None
) -> None:
    per_group = channels // num_groups
    widths = (channels, channels // 2 // per_group * per_group)
    case = some_case(
        routing=Routing((0, 1), 2, 1, (0, 0)), channels=channels, num_groups=num_groups, size=size, widths=widths
    )
    assert_accurate(case, torch.float32)


@pytest.mark.parametrize(
    ("channels", "num_groups", "x2_channels", "dtype"),
    [
        pytest.param(12, 4, 5, torch.float16, id="in a norm group"),
        pytest.param(64, 32, 24, torch.float32, id="between vectors"),
        pytest.param(96, 8, 20, torch.float16, id="in a block"),
        pytest.param(40, 40, 1, torch.float32, id="last channel"),
    ],
)
def test_norm_groups_and_blocks_may_straddle_the_seam_of_two_inputs(
    channels: int, num_groups: int, x2_channels: int, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    per_group = channels // num_groups
    widths = (channels, (channels - x2_channels) // per_group * per_group, per_group)
    case = some_case(channels=channels, num_groups=num_groups, x2_channels=x2_channels, widths=widths, size=(3, 11))
    assert_accurate(case, dtype)


@pytest.mark.parametrize("mean", [100.0, 3000.0, 1e5])
def test_a_mean_far_from_zero_costs_no_accuracy(mean: float) -> None:
    """E[x^2] - E[x]^2 would lose every digit of a variance of 1, and a mean rounded to fp32 digits of y."""
    case = some_case(widths=None, activation=None, size=(16, 17))
    tensors, copies = case.tensors(torch.float32), case.tensors(torch.float32)
    exact = case.tensors(torch.float64)
    with torch.no_grad():
        for values in (tensors, copies, exact):
            values["x"] += mean
        exact["x"].copy_(tensors["x"])
    ours, torchs = gradients(routed(case, tensors), tensors), gradients(case.plain(copies), copies)
    right = gradients(routed(case, exact, "reference"), exact)
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], right[name], name, 4096)


@DTYPES
def test_everything_past_the_widths_is_exactly_zero(dtype: torch.dtype, nan_filled_memory: None) -> None:
    case = some_case(widths=(12, 0, 6))
    tensors = case.tensors(dtype)  # NaN in what is dead
    with torch.no_grad():
        for name in ("weight", "bias"):
            for group, expert, _, _ in case.routing.segments():  # each expert serves one group here
                tensors[name][expert, case.widths[group] :] = float("nan")
    y = routed(case, tensors)
    dy = torch.ones_like(y)
    for group, _, start, stop in case.routing.segments():
        dy[start:stop, case.widths[group] :] = float("nan")
    grads = dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))
    for group, expert, start, stop in case.routing.segments():
        width = case.widths[group]
        dead = [y[start:stop, width:], grads["weight"][expert, width:], grads["bias"][expert, width:]]
        dead += [grads[name][start:stop, width:] for name in ("x", "scale", "shift")]
        assert all(torch.equal(values, torch.zeros_like(values)) for values in dead)
    assert not any(values.isnan().any() for values in (y, *grads.values()))


def problem_and_tensors(case: NormCase) -> tuple[NormProblem, NormTensors]:
    t = {name: tensor.detach() for name, tensor in case.tensors(torch.float32).items()}
    plan = case.routing.plan()
    routing = (plan.offsets, plan.weight_index, case.settings()["widths"])
    tensors = NormTensors(t["x"], t["weight"], t["bias"], *routing, t.get("scale"), t.get("shift"), t.get("x2"))
    silu = case.activation == "silu"
    return norm_problem("routed_group_norm", tensors, case.num_groups, 1e-5, silu), tensors


def test_mean_and_rstd_are_those_of_the_reference(nan_filled_memory: None) -> None:
    problem, tensors = problem_and_tensors(some_case())
    ours = backend.group_norm(problem, tensors)
    expected = reference.group_norm(problem, tensors)
    for actual, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    assert not ours[2][2, 2:].any()  # rstd of dead norm groups


def test_only_requested_gradients_are_computed_and_they_do_not_change() -> None:
    problem, tensors = problem_and_tensors(some_case(x2_channels=5))
    y, mean, rstd, counters = backend.group_norm(problem, tensors)
    tensors = tensors._replace(counters=counters)
    dy = torch.ones_like(y)
    complete = backend.group_norm_backward(problem, dy, mean, rstd, tensors, (True,) * 6)
    for mask in [m for m in product((False, True), repeat=6) if sum(m) in (1, 5)]:
        grads = backend.group_norm_backward(problem, dy, mean, rstd, tensors, mask)
        for wanted, grad, expected in zip(mask, grads, complete, strict=True):
            assert torch.equal(grad, expected) if wanted else grad is None


def test_a_launch_of_its_own_sums_the_affines_gradients_of_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    case = some_case(routing=Routing((0, 1, 2, 2, 0, 1), 4, 3, (2, 0, 2, 1)), widths=(12, 3, 6, 0))
    tensors = case.tensors(torch.float32)
    at_once = gradients(routed(case, tensors), tensors)
    monkeypatch.setattr("tdc_fast.kernels.group_norm.MAX_AT_ONCE", 0)
    apart = gradients(routed(case, tensors), tensors)
    assert all(torch.equal(at_once[name], apart[name]) for name in at_once)


def test_two_runs_are_bitwise_equal() -> None:
    case = some_case(routing=Routing((0, 1, 1, 0, 1, 1, 0), 2, 1, (0, 0)), widths=None, size=(9, 9))
    tensors = case.tensors(torch.float32)
    first, second = (gradients(routed(case, tensors), tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_widths_and_experts_out_of_range_are_clamped() -> None:
    """Nothing checks them on a GPU."""
    from tdc_fast.kernels.group_norm import group_norm_forward

    problem, tensors = problem_and_tensors(some_case(widths=None))
    wild = torch.full_like(tensors.weight_index, 10**6)
    y, *_ = group_norm_forward(problem, tensors._replace(weight_index=wild, widths=wild))
    last = torch.full_like(wild, problem.num_experts - 1)
    assert torch.equal(y, group_norm_forward(problem, tensors._replace(weight_index=last))[0])
    assert not group_norm_forward(problem, tensors._replace(weight_index=last, widths=-wild))[0].any()


@pytest.mark.parametrize(
    ("channels", "per_group", "pixels", "itemsize", "tile"),
    [
        (128, 4, 1024, 2, NormTile(32, 8, 8, 32, 64, 4)),
        (192, 6, 4096, 2, NormTile(48, 8, 8, 64, 32, 4)),
        (512, 16, 64, 4, NormTile(16, 4, 1, 16, 64, 4)),
        (1536, 1536, 64, 2, NormTile(1536, 8, 1, 2048, 1, 8)),
        (20, 5, 9, 4, NormTile(20, 4, 4, 32, 16, 4)),
    ],
)
def test_a_program_reads_whole_groups_in_rows_of_64_bytes(
    channels: int, per_group: int, pixels: int, itemsize: int, tile: NormTile
) -> None:
    assert norm_tile(channels, per_group, pixels, itemsize, backward=False) == tile
    assert norm_tile(channels, per_group, pixels, itemsize, backward=True).num_warps == 2 * tile.num_warps
