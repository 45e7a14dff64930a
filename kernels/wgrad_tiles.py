"""Which tile and how many splits a weight gradient runs with: short functions of the problem and the device.

bench/tune.py times the candidates and writes kernels/tuned/<device>.json, whose entries for wgrad
({key: {"tile": ..., "splits": ...}}) take precedence.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import torch

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_shapes import Device, precision_of

_MAX_SPLITS = 64
_STEPS_PER_SPLIT = 8  # with fewer the pipeline never fills
_MAX_PARTIAL_BYTES = 2**28
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class WgradTile:
    """The tile of one program.

    Attributes:
        path: "tma" or "pointer".
        block_out: Output channels of the gradient.
        block_in: Input channels of the gradient.
        block_pixels: Pixels of one step.
        stages: Steps in the pipeline.
        warps: Warps of a program.
    """

    path: str
    block_out: int
    block_in: int
    block_pixels: int
    stages: int
    warps: int

    def shared_bytes(self, itemsize: int) -> int:
        """Size of the pipeline; the compiler adds about a kilobyte for barriers and the epilogue."""
        return self.stages * (self.block_out + self.block_in) * self.block_pixels * itemsize


def wgrad_candidates(problem: ConvProblem, device: Device, path: str | None = None) -> list[WgradTile]:
    """Every tile that can serve the problem on the device (by one path, where given), the largest first."""
    if problem.dtype in _HALVES:
        sizes = [(128, 128), (128, 64), (64, 128), (64, 64), (128, 16)]
        # Tensor cores of data-center GPUs read operands from shared memory (wgmma, tcgen05). Those of other GPUs
        # (sm_120, for one) read them from registers, which hold only half as many pixels per step.
        from_shared = 90 <= device.arch < 120
        pixels, stages = (64, 3) if from_shared else (32, 4)
        tiles = [WgradTile("pointer", m, n, pixels, stages, 4 if m * n <= 64 * 64 else 8) for m, n in sizes]
        if from_shared:
            boxed = [WgradTile("tma", m, n, 64, 4, 8 if m * n > 128 * 64 else 4) for m, n in sizes]
            tiles = [tile for tile in boxed if boxes_can_serve(problem, tile)] + tiles
    elif precision_of(problem) == "tf32":
        tiles = [WgradTile("pointer", 64, 64, 32, 3, 8)]
    else:
        tiles = [WgradTile("pointer", 64, 64, 16, 3, 8)]
    itemsize = problem.dtype.itemsize
    return [t for t in tiles if path in (None, t.path) and t.shared_bytes(itemsize) + 2048 <= device.shared_limit]


def boxes_can_serve(problem: ConvProblem, tile: WgradTile) -> bool:
    """Whether TMA can serve: stride 1, no upsampling, 16-byte strides in memory, boxes that divide an image."""
    rows, columns = pixel_box(tile, problem)
    return (
        problem.stride == (1, 1)
        and problem.upsample == 1
        and problem.in_channels % 8 == 0
        and problem.out_channels % 8 == 0
        and rows * columns == tile.block_pixels
        and problem.out_height % rows == 0
        and problem.out_width % columns == 0
    )


def pixel_box(tile: WgradTile, problem: ConvProblem) -> tuple[int, int]:
    """(rows, columns) of a box of block_pixels pixels, at most as wide as the image."""
    columns = min(problem.out_width, tile.block_pixels)
    return tile.block_pixels // columns, columns


@functools.lru_cache(maxsize=4096)
def choose_wgrad_tile(problem: ConvProblem, device: Device, path: str | None = None) -> WgradTile:
    """The measured tile if the device's table has one, else the one of least cost.

    That is, of the tiles that cover the channels with the least padding, the largest; TMA before pointers.
    """
    usable = wgrad_candidates(problem, device, path)
    measured = load_tuned_wgrad(device.name).get(tile_shapes.problem_key("wgrad", problem))
    if measured is not None and measured[0] in usable:
        return measured[0]

    def cost(tile: WgradTile) -> tuple[int, int, bool]:
        outs, ins = -(-problem.out_channels // tile.block_out), -(-problem.in_channels // tile.block_in)
        return outs * tile.block_out * ins * tile.block_in, outs * ins, tile.path == "pointer"

    return min(usable, key=cost)


def tiles_of_gradient(problem: ConvProblem, tile: WgradTile) -> int:
    """Number of tiles of all experts' gradients."""
    outs, ins = -(-problem.out_channels // tile.block_out), -(-problem.in_channels // tile.block_in)
    return problem.num_experts * outs * ins * problem.filter[0] * problem.filter[1]


@functools.lru_cache(maxsize=4096)
def choose_splits(problem: ConvProblem, tile: WgradTile, device: Device) -> int:
    """Splits of the pixels: the measured number for this tile, else enough for two waves of programs.

    Every split keeps enough steps to fill its pipeline, and the fp32 partials stay within a limit.
    """
    measured = load_tuned_wgrad(device.name).get(tile_shapes.problem_key("wgrad", problem))
    if measured is not None and measured[0] == tile:
        return measured[1]
    used = max(1, min(problem.num_experts, problem.num_groups, problem.batch))
    tiles = tiles_of_gradient(problem, tile) * used // problem.num_experts
    steps = problem.batch * problem.out_height * problem.out_width // (used * tile.block_pixels)
    weights = problem.num_experts * problem.out_channels * problem.in_channels * problem.filter[0] * problem.filter[1]
    wanted = 2 * device.multiprocessors // max(1, tiles)
    return max(1, min(wanted, steps // _STEPS_PER_SPLIT, _MAX_PARTIAL_BYTES // (4 * weights), _MAX_SPLITS))


@functools.cache
def load_tuned_wgrad(device_name: str) -> dict[str, tuple[WgradTile, int]]:
    """Measured (tile, splits) of a device by `problem_key`; empty if there is no table of this TABLE_VERSION."""
    path = tile_shapes.TUNED / f"{tile_shapes.table_name(device_name)}.json"
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    if table.get("version") != tile_shapes.TABLE_VERSION:
        return {}
    return {key: (WgradTile(**entry["tile"]), entry["splits"]) for key, entry in table.get("wgrad", {}).items()}
