"""Which tile a routed convolution runs with: a short function of the problem and the device.

Every tile that fits has a cost, waves x area / rate, and the cheapest one runs. A wave is one program per
multiprocessor; `rate` is how busy the tile keeps the tensor cores relative to the best tile. The rates are estimates.
bench/tune.py times the candidates and writes kernels/tuned/<device>.json, whose entries take precedence.

`op` is "forward" or "dgrad" everywhere.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_table import tile_rows

TABLE_VERSION = 1  # raise it when the kernels' speed changes: tables measured with another version are ignored
TUNED = Path(__file__).parent / "tuned"
LARGEST_SAMPLES_PER_TILE = 256  # the last level of the tile table

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Device:
    """What the choice of a tile depends on.

    Attributes:
        arch: 80, 90, 100, ...
        multiprocessors: Their number.
        shared_limit: Bytes of shared memory that a program may use.
        name: The driver's name of the device.
    """

    arch: int
    multiprocessors: int
    shared_limit: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class ConvTile:
    """The tile of one program.

    Attributes:
        path: "tma" or "pointer".
        block_pixels: Pixels of the result.
        block_channels: Output channels of the result.
        block_k: Source channels of one step.
        stages: Steps in the pipeline.
        warps: Warps of a program.
        registers: The most registers a thread may have.
    """

    path: str
    block_pixels: int
    block_channels: int
    block_k: int
    stages: int
    warps: int
    registers: int = 255

    def shared_bytes(self, itemsize: int) -> int:
        """Size of the pipeline; the compiler adds about a kilobyte for barriers and the epilogue."""
        return self.stages * (self.block_pixels + self.block_channels) * self.block_k * itemsize

    def as_json(self) -> dict[str, Any]:
        """The tile as a tuned table stores it."""
        return asdict(self)


# Tile -> rate. Large tiles read less per product; the TMA path spends no registers on addresses.
_TMA = {
    ConvTile("tma", 256, 128, 64, 4, 8): 1.0,
    ConvTile("tma", 128, 128, 64, 3, 8, registers=128): 0.85,  # so that two programs share an SM
    ConvTile("tma", 256, 64, 64, 4, 8): 0.78,
    ConvTile("tma", 128, 64, 64, 4, 4): 0.6,
    ConvTile("tma", 64, 64, 64, 4, 4): 0.4,
}
_POINTER_HALF = {
    ConvTile("pointer", 128, 128, 32, 4, 8): 0.6,
    ConvTile("pointer", 64, 64, 32, 3, 4): 0.35,
}
_POINTER_TF32 = {
    ConvTile("pointer", 128, 64, 32, 3, 8): 0.25,
    ConvTile("pointer", 64, 64, 32, 3, 4): 0.2,
}
_POINTER_IEEE = {ConvTile("pointer", 64, 64, 16, 3, 4): 0.03}


@functools.cache
def device_of(device: torch.device) -> Device:
    """Describes a device; asks the driver once. A CPU (the interpreter) counts as a small sm_80."""
    if device.type != "cuda":
        return Device(80, 4, 166912, "interpreter")
    properties = torch.cuda.get_device_properties(device)
    limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count, limit, properties.name)


def precision_of(problem: ConvProblem) -> str:
    """Triton's input_precision: exact fp32 products unless the problem asks for TF32."""
    return "tf32" if problem.tf32 else "ieee"


def source_channels(op: str, problem: ConvProblem) -> int:
    """Channels of x in the forward, of dy in dgrad."""
    return problem.out_channels if op == "dgrad" else problem.in_channels


def output_channels(op: str, problem: ConvProblem) -> int:
    """Channels of y in the forward, of dx in dgrad."""
    return problem.in_channels if op == "dgrad" else problem.out_channels


def pixel_classes(op: str, problem: ConvProblem) -> int:
    """Classes of pixels: dgrad with a stride has one per parity, each reached by its own taps."""
    return problem.stride[0] * problem.stride[1] if op == "dgrad" else 1


def pixel_grid(op: str, problem: ConvProblem) -> tuple[int, int]:
    """(height, width) of the pixels that the programs of one class compute."""
    if op == "dgrad":
        return -(-problem.height // problem.stride[0]), -(-problem.width // problem.stride[1])
    return problem.out_height, problem.out_width


def box_of(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """(samples, rows, columns), powers of two whose product is `pixels`, that cover an image with the fewest boxes."""
    best = (0.0, 1, 1, pixels)
    for columns in _powers_of_two(min(pixels, _round_up(width))):
        rows = min(pixels // columns, _round_up(height))
        samples = pixels // columns // rows
        if samples > 1 and (rows < height or columns < width):
            continue  # a box of several samples must hold whole images
        boxes = -(-height // rows) * -(-width // columns)
        best = max(best, (samples / boxes, columns, rows, samples))
    return best[3], best[2], best[1]


def samples_per_tile(tile: ConvTile, height: int, width: int) -> int:
    """Whole images in a tile: a power of two; 1 for images that fill it."""
    if tile.path == "tma":
        return box_of(tile.block_pixels, height, width)[0]
    fitting = max(1, tile.block_pixels // (height * width))
    return min(LARGEST_SAMPLES_PER_TILE, 1 << (fitting.bit_length() - 1))


def chunks_of(tile: ConvTile, height: int, width: int) -> int:
    """Tiles that cover one image, or as many images as fit in a tile."""
    if tile.path == "tma":
        _, rows, columns = box_of(tile.block_pixels, height, width)
        return -(-height // rows) * -(-width // columns)
    return -(-height * width // tile.block_pixels)


def tma_can_serve(op: str, problem: ConvProblem, device: Device) -> bool:
    """Whether TMA can serve: tensor maps need 16-byte strides, and stride 2 needs images of even size."""
    if device.arch < 90 or problem.dtype not in _HALVES:
        return False
    if problem.in_channels % 8 or problem.x2_channels % 8 or source_channels(op, problem) % 8:
        return False
    if op == "dgrad" or problem.stride == (1, 1):
        return True
    return problem.stride == (2, 2) and problem.height % 2 == 0 and problem.width % 2 == 0


def _rated(op: str, problem: ConvProblem, device: Device) -> dict[ConvTile, float]:
    if problem.dtype in _HALVES:
        tiles = _POINTER_HALF
        if tma_can_serve(op, problem, device):
            # Newer devices accumulate in tensor memory; reading it with fewer registers would spill.
            boxed = _TMA if device.arch == 90 else {replace(tile, registers=255): rate for tile, rate in _TMA.items()}
            tiles = {**boxed, **_POINTER_HALF}
    else:
        tiles = _POINTER_TF32 if precision_of(problem) == "tf32" else _POINTER_IEEE
    itemsize = problem.dtype.itemsize
    return {tile: rate for tile, rate in tiles.items() if tile.shared_bytes(itemsize) + 2048 <= device.shared_limit}


def candidates(op: str, problem: ConvProblem, device: Device, path: str | None = None) -> list[ConvTile]:
    """Every tile that can serve the problem on the device (by one path, where given); each is compile-tested."""
    return [tile for tile in _rated(op, problem, device) if path in (None, tile.path)]


def tile_rate(op: str, problem: ConvProblem, device: Device, tile: ConvTile) -> float:
    """How busy one of `candidates` keeps the tensor cores, relative to the best tile in bf16."""
    return _rated(op, problem, device)[tile]


def programs(op: str, problem: ConvProblem, tile: ConvTile) -> int:
    """Programs that have work to do, if groups are of equal size."""
    grid = pixel_grid(op, problem)
    groups = max(1, min(problem.num_groups, problem.batch))
    rows = groups * -(-problem.batch // (groups * samples_per_tile(tile, *grid)))
    channel_tiles = -(-output_channels(op, problem) // tile.block_channels)
    return rows * chunks_of(tile, *grid) * channel_tiles * pixel_classes(op, problem)


@functools.lru_cache(maxsize=4096)
def choose_tile(op: str, problem: ConvProblem, device: Device, path: str | None = None) -> ConvTile:
    """The measured tile if the device's table has one, else the one of least cost."""
    usable = candidates(op, problem, device, path)
    measured = load_tuned(device.name).get(problem_key(op, problem))
    if measured in usable:
        return measured
    rated = _rated(op, problem, device)

    def cost(tile: ConvTile) -> float:
        waves = -(-programs(op, problem, tile) // device.multiprocessors)
        return waves * tile.block_pixels * tile.block_channels / rated[tile]

    return min(usable, key=cost)


def grid_rows(problem: ConvProblem, samples: int) -> int:
    """Rows of the tile table's level for `samples` per tile: an upper bound, known without the group sizes."""
    return tile_rows(problem.batch, problem.num_groups, samples)


def problem_key(op: str, p: ConvProblem) -> str:
    """The name of a problem in a tuned table."""
    dtype = "tf32" if p.tf32 and p.dtype == torch.float32 else str(p.dtype).removeprefix("torch.")
    image = f"b{p.batch} {p.height}x{p.width} {p.in_channels}->{p.out_channels}"
    taps = f"{p.filter[0]}x{p.filter[1]} s{p.stride[0]},{p.stride[1]} p{p.padding[0]},{p.padding[1]}"
    return f"{op} {dtype} {image} {taps} n{p.num_groups}" + (f" up{p.upsample}" if p.upsample > 1 else "")


def table_name(device_name: str) -> str:
    """File name of a device's table: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@functools.cache
def load_tuned(device_name: str) -> dict[str, ConvTile]:
    """Measured tiles of a device by `problem_key`; empty if there is no table of this TABLE_VERSION."""
    path = TUNED / f"{table_name(device_name)}.json"
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    if table.get("version") != TABLE_VERSION:
        return {}
    return {key: ConvTile(**tile) for key, tile in table["tiles"].items()}


def _round_up(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _powers_of_two(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length())]
