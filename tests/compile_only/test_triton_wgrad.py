"""Every tile of the Triton weight gradient compiles, without a GPU, to the instructions it relies on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tdc_fast.kernels.problems import ConvProblem, ConvTensors

pytest.importorskip("triton")

from tdc_fast.kernels.conv_wgrad import wgrad_launches
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.kernels.wgrad_tiles import WgradTile, choose_wgrad_tile, wgrad_candidates
from tests.compile_only.triton_build import SHARED_LIMITS, Built, build

DEVICES = {arch: Device(arch, 132, SHARED_LIMITS[arch]) for arch in (80, 90)}
NEWER = Device(100, 148, SHARED_LIMITS[100])


def layer(
    dtype: torch.dtype = torch.bfloat16, size: int = 32, stride: int = 1, tf32: bool = False, upsample: int = 1
) -> ConvProblem:
    """A 3x3 convolution of 128 samples, of 128 channels to 128."""
    result = (size * upsample - 1) // stride + 1
    return ConvProblem(
        op="routed_conv2d_wgrad", device=torch.device("meta"), dtype=dtype, batch=128, height=size, width=size,
        in_channels=128, out_channels=128, filter=(3, 3), stride=(stride, stride), padding=(1, 1), out_height=result,
        out_width=result, num_groups=8, num_experts=8, tf32=tf32, upsample=upsample,
    )  # fmt: skip


@dataclass(frozen=True)
class Build:
    arch: int
    problem: ConvProblem
    tile: WgradTile
    splits: int
    pruned: bool = True  # with widths
    biases: int = 1  # how many of the bias gradients come with it

    def __str__(self) -> str:
        p, t = self.problem, self.tile
        dtype = "tf32" if p.tf32 else str(p.dtype).removeprefix("torch.")
        kind = f"s{p.stride[0]}-{p.width}" + ("-up" if p.upsample > 1 else "") + ("" if self.pruned else "-plain")
        return f"sm_{self.arch}-{dtype}-{kind}-{t.path}-{t.block_out}x{t.block_in}-k{self.splits}-b{self.biases}"


def everything_that_can_be_chosen() -> list[Build]:
    """Each tile with widths, of which the largest need the most registers without them too; 16-bit types in both forms,
    boxes of every shape; with bias gradients.

    The other settings are spread over these.
    """
    builds = []
    for arch, device in DEVICES.items():
        tiles = wgrad_candidates(layer(), device)
        for index, tile in enumerate(tiles):
            dtype = (torch.bfloat16, torch.float16)[index % 2]
            if tile.path == "tma":
                problem = layer(dtype, size=(32, 16, 64, 8)[index % 4])
            else:
                problem = layer(dtype, size=(32, 7)[index % 2], stride=1 + index % 2)
            builds.append(Build(arch, problem, tile, 1 + index % 3, biases=1 + index % 2))
        for problem in (layer(torch.float32), layer(torch.float32, tf32=True)):
            builds += [Build(arch, problem, tile, 2) for tile in wgrad_candidates(problem, device)]
    largest = {tile.path: tile for tile in reversed(wgrad_candidates(layer(), DEVICES[90]))}
    builds += [Build(90, layer(), tile, 1, pruned=False) for tile in largest.values()]
    for device in (*DEVICES.values(), NEWER):
        upsampled = layer(torch.float16 if device.arch == 80 else torch.bfloat16, size=16, upsample=2)
        builds.append(Build(device.arch, upsampled, choose_wgrad_tile(upsampled, device), 2))
    return [*builds, Build(100, layer(), wgrad_candidates(layer(), NEWER)[0], 2)]


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tensors_of(p: ConvProblem, pruned: bool) -> tuple[torch.Tensor, ConvTensors]:
    """dy and the rest, without memory; with widths where pruned."""
    dy = meta(p.batch, p.out_channels, p.out_height, p.out_width, dtype=p.dtype)
    x = meta(p.batch, p.in_channels, p.height, p.width, dtype=p.dtype)
    weight = meta(p.num_experts, p.out_channels, p.in_channels, *p.filter, dtype=p.dtype)
    offsets, tiles = meta(p.num_groups + 1, dtype=torch.int32), meta(0, 3, dtype=torch.int32)
    index, in_widths, out_widths = (meta(p.num_groups, dtype=torch.int32) for _ in range(3))
    widths = (in_widths, out_widths) if pruned else (None, None)
    return dy, ConvTensors(x, weight, offsets, tiles, index, *widths)


def bias_gradients(p: ConvProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """dbias and dsample_bias, without memory."""
    return meta(p.num_experts, p.out_channels, dtype=p.dtype), meta(p.batch, p.out_channels, dtype=p.dtype)


@pytest.mark.parametrize("case", everything_that_can_be_chosen(), ids=str)
def test_a_tile_compiles_to_the_instructions_it_relies_on(case: Build) -> None:
    dy, t = tensors_of(case.problem, case.pruned)
    biases = bias_gradients(case.problem)[: case.biases]
    launch = wgrad_launches(case.problem, dy, t, t.weight, *biases, tile=case.tile, splits=case.splits)[0]
    built = build(launch.kernel, launch.arguments, case.arch, launch.options)
    assert_fits(built, case.arch)
    halves = case.problem.dtype != torch.float32
    if case.arch > 90:
        assert (built.tma >= 2 or built.cp_async_16 > 0) and built.count(r"tcgen05\.mma") > 0
    elif case.tile.path == "tma":
        assert built.tma >= 2 and built.wgmma_from_shared == built.wgmma > 0
    elif halves and case.arch >= 90:
        assert built.cp_async_16 > 0 and built.wgmma_from_shared == built.wgmma > 0
    elif halves or case.problem.tf32:
        assert built.cp_async_16 > 0 or case.arch >= 90
        assert (built.wgmma if case.arch >= 90 else built.mma) > 0
    else:
        assert built.mma == built.wgmma == 0  # exact products
    assert bool(built.count(r"cvt\.rna\.tf32")) == case.problem.tf32  # factors are rounded, not cut


def assert_fits(built: Built, arch: int) -> None:
    assert built.stack == 0, f"{built.stack} bytes of local memory per thread"
    assert built.shared <= SHARED_LIMITS[arch]
    assert not built.count(r"\b(red|atom)\.")  # gradients are sums in one order


def test_the_sums_of_splits_and_of_biases_alone_compile() -> None:
    problem = layer()
    dy, t = tensors_of(problem, pruned=True)
    dbias, dsample_bias = bias_gradients(problem)
    tile = wgrad_candidates(problem, DEVICES[90])[0]
    launches = [
        wgrad_launches(problem, dy, t, t.weight, dbias, tile=tile, splits=2)[1],
        wgrad_launches(problem, dy, t, None, dbias)[0],
        wgrad_launches(problem, dy, t, None, dbias, dsample_bias)[0],
    ]
    for launch in launches:
        built = build(launch.kernel, launch.arguments, 90, launch.options)
        assert_fits(built, 90)
        assert built.count(r"(ld|st)\.global[.\w]*\.v4")  # 16 bytes at once
