"""Packing experts: the kernel in the emulator and the gather in torch both equal indexing expert by expert."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast.ops import cuda_launch
from tdc_fast.ops.layout import empty_channel_innermost
from tdc_fast.ops.pack import pack_channels
from tests.emulator.harness import (
    AT_RUNTIME,
    SANITIZED,
    SCHEDULES,
    EmulatorError,
    EmulatorLauncher,
    emulated,
    plain_only,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
WAYS = ["kernel", "torch"]


def with_kernels(way: str = "kernel", schedule: int = 0):
    if way == "torch":
        return nullcontext()
    return cuda_launch.use_launcher(EmulatorLauncher(emulated("pack", AT_RUNTIME), schedule=schedule))


def expected(source: Tensor, orders: list[Tensor | None], widths: list[Tensor | None], experts: int) -> Tensor:
    packed = []
    for e in range(experts):
        value = source[0 if source.shape[0] == 1 else e]
        for dim, (order, width) in enumerate(zip(orders, widths, strict=True)):
            if dim >= value.dim():
                continue
            total = value.shape[dim] if order is None else order.shape[1]
            live = total if width is None else int(width[e])
            chosen = torch.arange(live) if order is None else order[e, :live].long()
            kept = value.index_select(dim, chosen)
            shape = list(kept.shape)
            shape[dim] = total - live
            value = torch.cat([kept, kept.new_zeros(shape)], dim)
        packed.append(value)
    return torch.stack(packed)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Tensor | None]:
    experts = draw(st.integers(1, 4))
    rank = draw(st.sampled_from([2, 3, 5]))
    channels = [draw(st.integers(1, 9)), draw(st.integers(1, 9))][: 1 if rank == 2 else 2]
    taps = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1)])) if rank == 5 else ()
    shape = (draw(st.sampled_from([1, experts])), *channels, *taps)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    source = torch.randn(shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        source = source.flip(0).transpose(1, -1).contiguous().transpose(1, -1)
    given: dict[str, Tensor | None] = {"source": source}
    for name, count in zip(("out", "in"), channels, strict=False):
        packed = draw(st.integers(1, 9))
        widths = None
        if draw(st.booleans()):
            limit = packed if draw(st.booleans()) else min(packed, count)
            widths = torch.tensor(draw(st.lists(st.integers(0, limit), min_size=experts, max_size=experts)))
        order = torch.randint(count, (experts, packed), generator=generator, dtype=torch.int32)
        if widths is not None:  # what an order holds past the width must not be read
            order = order.where(torch.arange(packed) < widths[:, None], -(10**6)).int()
            widths = widths.int()
        if draw(st.booleans()):
            given[f"{name}_order"] = order
        elif widths is not None:
            widths = widths.clamp(max=count)
        given[f"{name}_widths"] = widths
    return given


@pytest.mark.parametrize("way", WAYS)
def test_packing_equals_indexing_expert_by_expert(way: str) -> None:
    @settings(max_examples=40 if SANITIZED else 120, deadline=None, derandomize=True)
    @given(given_=problems(), innermost=st.booleans())
    def check(given_: dict[str, Tensor | None], innermost: bool) -> None:
        orders = [given_.get(f"{name}_order") for name in ("out", "in")]
        widths = [given_.get(f"{name}_widths") for name in ("out", "in")]
        per_expert = [t for t in (*orders, *widths) if t is not None]
        experts = max([given_["source"].shape[0], *(t.shape[0] for t in per_expert)])
        exact = expected(given_["source"], orders, widths, experts)
        out = empty_channel_innermost(exact.shape, exact.dtype) if innermost and exact.dim() == 5 else None
        with with_kernels(way):
            packed = pack_channels(**given_, out=out)
        assert torch.equal(packed, exact) and packed.dtype == exact.dtype
        assert out is None or packed is out

    check()


def conv_problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "source": torch.randn(1, 6, 10, 3, 3, generator=generator),
        "out_order": torch.stack([torch.randperm(6, generator=generator)[:5] for _ in range(3)]).int(),
        "in_order": torch.stack([torch.randperm(10, generator=generator) for _ in range(3)]).int(),
        "out_widths": torch.tensor([5, 0, 3], dtype=torch.int32),
        "in_widths": torch.tensor([4, 10, 7], dtype=torch.int32),
    }


def test_every_tensor_is_one_launch_under_any_schedule() -> None:
    problem = conv_problem()
    exact = pack_channels(**problem)
    for schedule in SCHEDULES:
        launcher = EmulatorLauncher(emulated("pack", AT_RUNTIME), schedule=schedule)
        with cuda_launch.use_launcher(launcher):
            assert torch.equal(pack_channels(**problem), exact)
        assert launcher.launched == ["tdc_pack_experts_4"]


@pytest.mark.parametrize("outside", [-1, 10])
def test_an_order_that_points_outside_stops_the_kernel(outside: int) -> None:
    problem = conv_problem()
    problem["in_order"][2, 6] = outside
    with with_kernels(), pytest.raises(EmulatorError, match="trap"):
        pack_channels(**problem)
    problem["in_widths"][2] = 6  # that entry is then not needed
    with with_kernels():
        pack_channels(**problem)


def test_taps_at_no_even_distance_are_gathered_by_torch() -> None:
    problem = conv_problem()
    exact = pack_channels(**problem)
    launcher = EmulatorLauncher(emulated("pack", AT_RUNTIME))
    with cuda_launch.use_launcher(launcher):
        wide = torch.zeros(1, 6, 10, 3, 5)
        wide[..., :3] = problem["source"]
        assert torch.equal(pack_channels(**problem | {"source": wide[..., :3]}), exact)
    assert launcher.launched == []


@plain_only
def test_a_channel_past_the_width_is_caught() -> None:
    problem = conv_problem()
    with with_kernels(), emulated("pack", AT_RUNTIME).planted("PACK_ONE_PAST_WIDTH"):
        assert not torch.equal(pack_channels(**problem), expected_of(problem))


def expected_of(problem: dict[str, Tensor]) -> Tensor:
    orders, widths = ([problem[f"{name}_{kind}"] for name in ("out", "in")] for kind in ("order", "widths"))
    return expected(problem["source"], orders, widths, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(3, 6, 10, 9)}, "source"),
        ({"out_order": torch.zeros(3, 5)}, "out_order.*int32"),
        ({"in_order": torch.zeros(4, 5, dtype=torch.int32)}, "in_order.*3 experts"),
        ({"in_widths": torch.zeros(3, 1, dtype=torch.int32)}, "in_widths"),
        ({"source": torch.zeros(3, 6)}, "in_order.*no input channels"),
        ({"out": torch.zeros(3, 5, 10, 3)}, "out"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_channels(**conv_problem() | change)
