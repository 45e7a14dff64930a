"""Every tile of the Triton convolution compiles, without a GPU, to the instructions it relies on.

On sm_90 wgmma reads both operands from shared memory, filled by the copy engine; on sm_80 16-byte cp.async fills it. No
tile spills or exceeds the device's shared memory.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from tdc_fast.kernels.problems import ConvProblem, ConvTensors

pytest.importorskip("triton")

from tdc_fast.kernels.conv_launch import conv_launch
from tdc_fast.kernels.launch import Launch
from tdc_fast.kernels.tile_shapes import ConvTile, Device, candidates
from tests.compile_only.triton_build import SHARED_LIMITS, Built, build

DEVICES = {arch: Device(arch, 132, limit) for arch, limit in SHARED_LIMITS.items()}


@dataclass(frozen=True)
class Build:
    """One kernel: what it computes, with which tile, for which GPU. `full` has widths and every addend; `known`: dy is
    known to be zero past the widths."""

    arch: int
    op: str
    problem: ConvProblem
    tile: ConvTile
    full: bool = True
    known: bool = False

    def __str__(self) -> str:
        p, t = self.problem, self.tile
        dtype = "tf32" if p.tf32 else str(p.dtype).removeprefix("torch.")
        two = ("-two" if p.x2_channels else "") + ("-known" if self.known else "")
        kind = f"{p.filter[0]}x{p.filter[1]}s{p.stride[0]}{two}" + ("" if self.full else "-plain")
        return f"sm_{self.arch}-{self.op}-{dtype}-{kind}-{t.path}-{t.block_pixels}x{t.block_channels}x{t.block_k}"


def problem_of(
    dtype: torch.dtype, tf32: bool = False, taps: int = 3, stride: int = 1, channels: int = 128, x2_channels: int = 0
) -> ConvProblem:
    padding = taps // 2
    out = (32 + 2 * padding - taps) // stride + 1
    return ConvProblem(
        op="routed_conv2d", device=torch.device("meta"), dtype=dtype, batch=128, height=32, width=32,
        in_channels=channels, out_channels=128, filter=(taps, taps), stride=(stride, stride),
        padding=(padding, padding), out_height=out, out_width=out, num_groups=8, num_experts=8, tf32=tf32,
        x2_channels=x2_channels,
    )  # fmt: skip


def launch_of(case: Build) -> Launch:
    """The launch, on tensors without memory."""
    p = case.problem

    def made(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = (made(p.batch, count, *size) for count, size in (
        (p.in_channels - p.x2_channels, (p.height, p.width)), (p.out_channels, (p.out_height, p.out_width))
    ))  # fmt: skip
    x2 = made(p.batch, p.x2_channels, p.height, p.width) if p.x2_channels else None
    weight = made(p.num_experts, p.out_channels, p.in_channels, *p.filter)
    bias = sample_bias = residual = widths = None
    if case.full:
        widths = made(p.num_groups, dtype=torch.int32)
    if case.full and case.op == "forward":
        bias, sample_bias, residual = made(p.num_experts, p.out_channels), made(p.batch, p.out_channels), y
    source, out = (y, x) if case.op == "dgrad" else (x, y)
    table, index = made(2048, 3, dtype=torch.int32), made(p.num_groups, dtype=torch.int32)
    offsets = made(p.num_groups + 1, dtype=torch.int32)
    t = ConvTensors(x, weight, offsets, table, index, widths, widths, bias, sample_bias, residual, x2)
    dx2, forward = x2 if case.op == "dgrad" else None, case.op == "forward"
    return conv_launch(case.op, p, source, t, out, case.tile, dx2, dead_zeros=forward or case.known)


@functools.cache
def built(case: Build) -> Built:
    launch = launch_of(case)
    return build(launch.kernel, launch.arguments, case.arch, launch.options)


def all_builds() -> list[Build]:
    """Every tile that `choose_tile` can return, forward and dgrad, with strides where those change the kernel.

    Each tile of 16 bits is built with all addends, in types that take turns; the largest, whose registers are the
    scarcest, without any as well.
    """
    half = problem_of(torch.bfloat16)
    builds = []
    for arch, op in itertools.product((80, 90), ("forward", "dgrad")):
        for problem in (problem_of(torch.float32, True), problem_of(torch.float32)):
            builds += [Build(arch, op, problem, tile) for tile in candidates(op, problem, DEVICES[arch])]
        tiles = candidates(op, half, DEVICES[arch])
        for turn, tile in enumerate(tiles):
            builds.append(Build(arch, op, replace(half, dtype=(torch.bfloat16, torch.float16)[turn % 2]), tile))
        largest = {tile.path: tile for tile in reversed(tiles)}
        builds += [Build(arch, op, half, tile, full=False) for tile in largest.values()]
    for op in ("forward", "dgrad"):
        strided, pointwise = problem_of(torch.bfloat16, stride=2), problem_of(torch.bfloat16, taps=1)
        two = problem_of(torch.bfloat16, taps=1, channels=384, x2_channels=128)  # a skip connection on the way up
        builds += [Build(90, op, two, tile, full=False) for tile in candidates(op, two, DEVICES[90], "tma")[:1]]
        builds += [Build(80, op, two, tile, full=False) for tile in candidates(op, two, DEVICES[80])[:1]]
        builds += [Build(90, op, strided, tile) for tile in candidates(op, strided, DEVICES[90], "tma")]
        builds += [Build(90, op, pointwise, tile, full=False) for tile in candidates(op, pointwise, DEVICES[90])[:1]]
        builds += [Build(80, op, strided, tile) for tile in candidates(op, strided, DEVICES[80])[:1]]
        builds += [Build(100, op, half, tile) for tile in candidates(op, half, DEVICES[100], "tma")[1:2]]
    known = replace(Build(90, "dgrad", half, candidates("dgrad", half, DEVICES[90], "tma")[0]), known=True)
    builds += [known, replace(known, arch=80, tile=candidates("dgrad", half, DEVICES[80])[0])]
    few = problem_of(torch.bfloat16, channels=3)
    return [*builds, *(Build(80, "forward", few, tile) for tile in candidates("forward", few, DEVICES[80])[:1])]


ALL = all_builds()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_tile_compiles_to_the_instructions_it_relies_on(case: Build) -> None:
    code = built(case)
    assert code.shared <= SHARED_LIMITS[case.arch]
    assert code.stack == 0, f"{code.stack} bytes of local memory, {code.registers} registers"
    exact = case.problem.dtype == torch.float32 and not case.problem.tf32
    if case.tile.path == "tma":
        assert code.registers <= case.tile.registers
        assert code.tma >= 4, "boxes and weights are copied by the copy engine"
        assert code.cp_async_16 == 0
        if case.arch == 90:
            steps = case.tile.block_k // 16 * max(1, case.tile.block_channels // (16 * case.tile.warps))
            assert code.wgmma_from_shared >= steps, "the main loop reads both operands from shared memory"
            assert code.count(r"wgmma\.wait_group\.sync\.aligned\s+1") > 0, "one product runs while the next is issued"
        else:
            assert code.count("tcgen05.mma") > 0
    elif exact:
        assert code.wgmma == code.mma == 0, "exact products do not run on tensor cores"
        assert code.cp_async_16 > 0
    else:
        assert (code.wgmma if case.arch == 90 else code.mma) > 0
        assert case.problem.in_channels % 8 or code.cp_async_16 > 0
    assert bool(code.count(r"cvt\.rna\.tf32")) == case.problem.tf32, "factors are rounded to tf32, not cut"


def test_a_gradient_known_to_be_zero_past_its_widths_needs_half_of_the_products_code() -> None:
    """No masked block, whose dy passes through registers."""
    for case in (case for case in ALL if case.known):
        code, other = built(case), built(replace(case, known=False))
        assert (2 * code.wgmma, 2 * code.mma) == (other.wgmma, other.mma)
        assert code.registers < other.registers and code.wgmma == code.wgmma_from_shared


def test_the_pipeline_is_as_deep_as_the_tile_says() -> None:
    for case in ALL:
        if case.tile.path == "tma" and case.arch == 90:
            assert built(case).shared >= case.tile.shared_bytes(2), str(case)
