"""The tile table: which samples each program of a GPU convolution works on, known on the device alone.

An int32 table (rows, 3) of (group, first_sample, num_samples). Level k = 0..8 holds tiles of at most 2**k samples of
one group, groups in order, samples ascending. The number of tiles in a level depends on the group sizes, which only the
device knows. So every level has as many rows as any sizes could need, and rows past the last tile are (-1, 0, 0); a
program whose group is -1 returns at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 9
SAMPLES_PER_TILE = tuple(2**level for level in range(LEVELS))  # 1, 2, ..., 256


def tile_rows(batch: int, num_groups: int, samples_per_tile: int) -> int:
    """Rows of one level: an upper bound on the sum over groups of ceil(n_g / samples_per_tile), for any n_g.

    A group wastes less than one tile, and only groups that have samples waste any.
    """
    least = min if type(batch) is int else torch.sym_min
    return least(batch, batch // samples_per_tile + least(num_groups, batch))


def level_start(batch: int, num_groups: int, samples_per_tile: int) -> int:
    """First row of the level with this many samples per tile."""
    return sum(tile_rows(batch, num_groups, n) for n in SAMPLES_PER_TILE if n < samples_per_tile)


def total_rows(batch: int, num_groups: int) -> int:
    """Rows of all levels together."""
    return sum(tile_rows(batch, num_groups, n) for n in SAMPLES_PER_TILE)


def tile_table(offsets: Tensor, batch: int) -> Tensor:
    """Builds the table with torch operators that never wait for the device.

    Args:
        offsets: (N + 1,) int32, first sorted sample of each group and the batch size.
        batch: Number of samples.

    Returns:
        (total_rows(batch, N), 3) int32, on the device of `offsets`.
    """
    device, groups = offsets.device, offsets.shape[0] - 1
    samples = torch.ones(LEVELS, dtype=torch.int64, device=device).cumsum(0)  # 1..9; no copy from the host
    samples = 2 ** (samples - 1)  # [level]
    capacity = (batch // samples + min(groups, batch)).clamp(max=batch)
    level_ends = capacity.cumsum(0)
    row = torch.arange(total_rows(batch, groups), device=device)
    level = torch.searchsorted(level_ends, row, right=True)
    within = row - (level_ends - capacity).index_select(0, level)  # tile number in its level

    bounds = offsets.to(torch.int64)
    tiles = (bounds.diff() + samples[:, None] - 1) // samples[:, None]  # [level, group]
    ends = tiles.cumsum(1)
    # One ascending row of all levels' ends, so that one search finds level and group at once.
    span = batch + 1
    ascending = (ends + span * torch.arange(LEVELS, device=device)[:, None]).flatten()
    group = torch.searchsorted(ascending, level * span + within, right=True) - level * groups
    exists = group < groups
    entry = level * groups + group.clamp(max=groups - 1)
    chosen = group.clamp(max=groups - 1)
    size = samples.index_select(0, level)
    first = bounds.index_select(0, chosen) + (within - (ends - tiles).flatten().index_select(0, entry)) * size
    count = torch.minimum(size, bounds.index_select(0, chosen + 1) - first)
    table = torch.stack((group, first, count), 1)
    past = torch.stack((torch.full_like(group, -1), torch.zeros_like(group), torch.zeros_like(group)), 1)
    return torch.where(exists[:, None], table, past).to(torch.int32)


def no_tiles(device: torch.device) -> Tensor:
    """The empty table of a plan in host memory, where nothing reads tiles."""
    return torch.empty((0, 3), dtype=torch.int32, device=device)


def tiles_of(tiles: Tensor, offsets: Tensor, batch: int) -> Tensor:
    """The plan's table; built here if the plan has none (when a test runs a GPU backend on host memory)."""
    return tile_table(offsets, batch) if tiles.shape[0] == 0 else tiles
