"""Each primitive of csrc/cuda/device.cuh against its definition in CUDA's and PTX's documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator.harness import SCHEDULES
from tests.emulator.self_test import run

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def integers(*shape: int, low: int = -(2**31), high: int = 2**31, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@schedules
def test_every_thread_of_a_grid_runs_once_with_its_indices(schedule: int) -> None:
    blocks = 2 * 3 * 5
    out = run("indices", integers(blocks, 40, 4), grid=(2, 3, 5), threads=40, schedule=schedule)
    expected = torch.empty(blocks, 40, 4, dtype=torch.int32)
    expected[..., 0] = torch.arange(40)
    expected[..., 1] = torch.arange(blocks)[:, None]
    expected[..., 2], expected[..., 3] = 40, blocks
    assert torch.equal(out, expected)


@schedules
@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
def test_shuffles_and_ballot(distance: int, schedule: int) -> None:
    values = integers(2, 32, low=0, high=1000)
    out = torch.empty(2, 32, 6, dtype=torch.int32)
    run("shuffles", out, values, mode=distance, threads=64, schedule=schedule)
    lanes = torch.arange(32)
    down, up = lanes + distance, lanes - distance
    expected = [
        values[:, [distance]].expand(2, 32),
        values[:, lanes ^ distance],
        values[:, torch.where(down < 32, down, lanes)],
        values[:, torch.where(up >= 0, up, lanes)],
        ((values % 3 == 0).long() << lanes).sum(1, keepdim=True).to(torch.int32).expand(2, 32),
        values[:, lanes ^ 1],
    ]
    assert torch.equal(out, torch.stack(expected, -1))


@pytest.mark.parametrize("matrices", [4, 2])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix_gives_lane_l_the_pair_at_row_l_div_4(matrices: int, trans: bool) -> None:
    """PTX ISA, ldmatrix: register m of lane l holds elements 2 (l % 4) and the next of row l / 4 of matrix m."""
    halves = torch.arange(32 * 8, dtype=torch.int16)
    rows = halves.view(4, 8, 8)[:matrices]
    out = torch.zeros(32, 4, dtype=torch.int32)
    run("ldmatrix", out, halves, mode=2 * (matrices == 2) + trans)
    expected = (rows.mT if trans else rows).reshape(matrices, 32, 2)  # lane = 4 row + pair
    assert torch.equal(out.view(torch.int16).view(32, 4, 2)[:, :matrices], expected.transpose(0, 1))


def fragments_16(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PTX ISA, mma.m16n8k16, 16-bit types: registers of a (16, 16) and b (16, 8) as (32, 4) and (32, 2) int32."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    a_elements, b_elements = [], []
    for i in range(8):
        row = g + (8 if i in (2, 3, 6, 7) else 0)
        column = 2 * t + (i & 1) + (8 if i >= 4 else 0)
        a_elements.append(a[row, column])
    for i in range(4):
        b_elements.append(b[2 * t + (i & 1) + (8 if i >= 2 else 0), g])
    packed = [torch.stack(e, 1).contiguous().view(torch.int32) for e in (a_elements, b_elements)]
    return packed[0], packed[1]


def fragments_tf32(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PTX ISA, mma.m16n8k8, .tf32: registers of a (16, 8) and b (8, 8) as (32, 4) and (32, 2)."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    a_elements = [a[g + (8 if i in (1, 3) else 0), t + (4 if i >= 2 else 0)] for i in range(4)]
    b_elements = [b[t + (4 if i == 1 else 0), g] for i in range(2)]
    return torch.stack(a_elements, 1).contiguous(), torch.stack(b_elements, 1).contiguous()


def accumulator(d: Tensor) -> Tensor:
    """PTX ISA: the four registers of each lane of a (16, 8) accumulator."""
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    return torch.stack([d[g + (8 if i >= 2 else 0), 2 * t + (i & 1)] for i in range(4)], 1).contiguous()


@pytest.mark.parametrize("mode, dtype", [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)])
def test_mma_multiplies_in_the_documented_layout(mode: int, dtype: torch.dtype) -> None:
    depth = 8 if dtype == torch.float32 else 16
    a, b, c = normal(16, depth, seed=1).to(dtype), normal(depth, 8, seed=2).to(dtype), normal(16, 8, seed=3)
    if dtype == torch.float32:
        a, b = a.bfloat16().float(), b.bfloat16().float()  # values that tf32 represents
    registers = (fragments_tf32 if dtype == torch.float32 else fragments_16)(a, b)
    d = run("mma", accumulator(c), *registers, mode=mode)
    expected = accumulator(c.double() + a.double() @ b.double())
    assert (d - expected).abs().max() < 4e-6  # fp32 sums of 16 products of order one


def test_tf32_mma_ignores_the_low_13_bits() -> None:
    a, b = integers(32, 4, low=0x3F800000, high=0x40000000), integers(32, 2, low=0x3F800000, high=0x40000000)
    whole = run("mma", torch.zeros(32, 4), a, b, mode=2)
    cut = run("mma", torch.zeros(32, 4), a & ~0x1FFF, b & ~0x1FFF, mode=2)
    assert torch.equal(whole, cut)


def converted(source: Tensor, mode: int) -> Tensor:
    count = source.numel()
    out = torch.empty(count, dtype=torch.int32)
    return run("convert", out, source, count=count, mode=mode, grid=((count + 63) // 64, 1, 1), threads=64)


@pytest.mark.parametrize("mode, dtype", [(3, torch.bfloat16), (4, torch.float16)])
def test_every_16_bit_value_becomes_the_right_float(mode: int, dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32)
    expected = bits.to(torch.int16).view(dtype).float()
    result = converted(bits, mode).view(torch.float32)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("mode, dtype", [(0, torch.bfloat16), (1, torch.float16)])
def test_floats_round_to_nearest_even(mode: int, dtype: torch.dtype) -> None:
    """All 16-bit values, the floats half way between two of them, and their neighbours."""
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (exact + torch.nextafter(exact.to(dtype), torch.full_like(exact, torch.inf).to(dtype)).float()) / 2
    some = torch.cat([exact, between, torch.nextafter(between, exact), 1e9 * normal(999), 1e-9 * normal(999)])
    some = some[~some.isnan()].contiguous()
    result = converted(some, mode).to(torch.int16).view(dtype)
    assert torch.equal(result, some.to(dtype))


def test_packing_puts_the_first_value_low() -> None:
    values = normal(64)
    for mode, dtype in ((5, torch.bfloat16), (6, torch.float16)):
        pairs = torch.stack([values, -values], 1).to(dtype)
        assert torch.equal(converted(values, mode).view(dtype).view(64, 2), pairs)


def test_tf32_rounds_to_nearest_with_ties_away() -> None:
    values = normal(1 << 12)
    result = converted(values, 2).view(torch.float32)
    step = torch.exp2(torch.floor(torch.log2(values.abs())) - 10).double()
    expected = (values.double().abs() / step + 0.5).floor() * step * values.sign()
    assert torch.equal(result.double(), expected)


@schedules
def test_a_block_exchanges_values_through_shared_memory(schedule: int) -> None:
    values = normal(3, 128)
    out = run("reverse", torch.empty(3, 128), values, grid=(3, 1, 1), threads=128, schedule=schedule)
    assert torch.equal(out, values.flip(1))


@schedules
def test_copies_arrive_through_a_ring_of_stages(schedule: int) -> None:
    rows = integers(9, 128, low=-100, high=100).float()
    out = run("stages", torch.empty(32), rows, count=9, shared=3 * 512, schedule=schedule)
    assert torch.equal(out, rows.view(9, 32, 4).sum((0, 2)).flip(0))


@schedules
def test_a_dead_copy_writes_zeros(schedule: int) -> None:
    values, live = integers(32), integers(32, low=0, high=2)
    out = run("copy_4", torch.empty(32, dtype=torch.int32), values, live, schedule=schedule)
    assert torch.equal(out, values * live)


@schedules
def test_named_barriers_hand_a_buffer_back_and_forth(schedule: int) -> None:
    rows = normal(7, 32)
    out = run("producer", torch.empty(7, 32), rows, count=7, threads=64, schedule=schedule)
    assert torch.equal(out, 2 * rows.flip(1))


@schedules
def test_atomics_lose_nothing(schedule: int) -> None:
    values, total = integers(3, 128, low=-1000, high=1000), torch.zeros(1)
    out = torch.tensor([0, 0, -5000], dtype=torch.int32)
    run("atomics", out, values, total, grid=(3, 1, 1), threads=128, schedule=schedule)
    assert out.tolist() == [values.sum().item(), 3 * 128, values.max().item()]
    assert total.item() == values.sum().item()
