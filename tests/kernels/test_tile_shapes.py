"""The tile of a Triton convolution follows from shapes and the device, or from measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu.layers import UNET_BATCH, UNETS, unet_layers
from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.conv_launch import conv_launch, conv_supported
from tdc_fast.kernels.problems import ConvProblem, ConvTensors
from tdc_fast.kernels.tile_shapes import (
    ConvTile,
    Device,
    box_of,
    candidates,
    choose_tile,
    chunks_of,
    load_tuned,
    problem_key,
    samples_per_tile,
)
from tdc_fast.kernels.tile_table import level_start, tile_rows
from tdc_fast.kernels.wgrad_tiles import choose_wgrad_tile

H200 = Device(90, 132, 232448, "NVIDIA H200")
A100 = Device(80, 108, 166912, "NVIDIA A100")


def problem_of(batch: int = 128, size: int = 32, channels: int = 128, stride: int = 1, **changes: Any) -> ConvProblem:
    out = (size + 2 - 3) // stride + 1
    problem = ConvProblem(
        op="routed_conv2d", device=torch.device("meta"), dtype=torch.bfloat16, batch=batch, height=size, width=size,
        in_channels=channels, out_channels=channels, filter=(3, 3), stride=(stride, stride), padding=(1, 1),
        out_height=out, out_width=out, num_groups=8, num_experts=8, tf32=False,
    )  # fmt: skip
    return replace(problem, **changes)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measured tables."""
    monkeypatch.setattr(tile_shapes, "TUNED", tmp_path)
    for cache in (load_tuned, choose_tile):
        cache.cache_clear()
    yield tmp_path
    for cache in (load_tuned, choose_tile):
        cache.cache_clear()


@pytest.mark.parametrize(
    ("pixels", "size", "box"),
    [
        (128, (32, 32), (1, 4, 32)),
        (256, (16, 16), (1, 16, 16)),
        (128, (8, 8), (2, 8, 8)),
        (128, (7, 7), (2, 8, 8)),
        (256, (4, 4), (16, 4, 4)),
        (128, (1, 1), (128, 1, 1)),
        (128, (12, 20), (1, 4, 32)),
        (128, (200, 1), (1, 128, 1)),
    ],
)
def test_an_image_takes_as_few_boxes_as_possible(pixels: int, size: tuple[int, int], box: tuple[int, int, int]) -> None:
    assert box_of(pixels, *size) == box


@pytest.mark.parametrize("path", ["tma", "pointer"])
def test_a_tile_holds_whole_images_or_part_of_one(path: str) -> None:
    for height in range(1, 20):
        for width in range(1, 20):
            tile = ConvTile(path, 128, 64, 64, 3, 4)
            samples, chunks = samples_per_tile(tile, height, width), chunks_of(tile, height, width)
            assert samples in (1, 2, 4, 8, 16, 32, 64, 128)
            assert samples == 1 or chunks == 1
            assert samples * height * width <= chunks * 128


def test_large_problems_take_large_tiles_and_small_ones_fill_the_device(tuned: Path) -> None:
    large, small = (choose_tile("forward", problem_of(batch=batch), H200) for batch in (128, 4))
    assert (large.path, large.block_pixels, large.block_channels) == ("tma", 256, 128)
    assert small.block_pixels * small.block_channels < large.block_pixels * large.block_channels
    assert choose_tile("forward", problem_of(size=64, batch=64, channels=192), H200).block_channels == 64  # 3 x 64


@pytest.mark.parametrize("op", ["forward", "dgrad"])
def test_pointers_serve_what_tensor_maps_cannot(op: str, tuned: Path) -> None:
    def path(problem: ConvProblem, device: Device = H200) -> str:
        return choose_tile(op, problem, device).path

    assert path(problem_of()) == "tma"
    assert path(problem_of(dtype=torch.float16)) == "tma"
    assert path(problem_of(), A100) == "pointer"
    assert path(problem_of(dtype=torch.float32)) == path(problem_of(dtype=torch.float32, tf32=True)) == "pointer"
    assert path(problem_of(channels=12)) == "pointer"
    assert path(problem_of(stride=2)) == "tma"
    odd = problem_of(size=31, stride=2)
    assert path(odd) == ("tma" if op == "dgrad" else "pointer"), "dgrad reads dy, whose pixels are not skipped"


def test_memory_that_is_not_aligned_takes_the_pointer_path(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_shapes, "device_of", lambda device: H200)
    problem = problem_of(batch=1, size=4, channels=8)
    weight, table, index = torch.zeros(8, 8, 8, 3, 3).bfloat16(), torch.zeros(9, 3).int(), torch.zeros(8).int()
    memory = torch.zeros(8 * 16 + 1, dtype=torch.bfloat16)
    for start, path in ((0, "tma"), (1, "pointer")):
        x = memory[start : start + 128].view(1, 4, 4, 8).permute(0, 3, 1, 2)
        launch = conv_launch("forward", problem, x, ConvTensors(x, weight, index, table, index), x)
        assert path in launch.kernel.__name__


def test_every_tile_fits_the_device() -> None:
    small = Device(89, 80, 101376)
    for dtype in (torch.bfloat16, torch.float32):
        for tf32 in (False, True):
            for tile in candidates("forward", problem_of(dtype=dtype, tf32=tf32), small):
                assert tile.shared_bytes(dtype.itemsize) < small.shared_limit


def test_the_grid_comes_from_shapes_alone() -> None:
    problem = problem_of(batch=20, size=8, channels=192)
    tile = ConvTile("pointer", 128, 64, 32, 4, 8)
    x, weight = torch.empty(20, 192, 8, 8, device="meta"), torch.empty(8, 192, 192, 3, 3, device="meta")
    table, index = torch.empty(99, 3, device="meta"), torch.empty(8, device="meta")
    t = ConvTensors(x, weight, index, table, index)
    launch = conv_launch("dgrad", problem, x, t, x, tile)
    assert launch.grid == (tile_rows(20, 8, 2) * 3, 1)
    assert launch.arguments["tile_row"] == level_start(20, 8, 2)
    strided = conv_launch("dgrad", problem_of(batch=20, size=8, channels=192, stride=2), x, t, x, tile)
    assert strided.grid == (tile_rows(20, 8, 8) * 3, 4), "one class of pixels for each parity"


def test_a_measured_tile_takes_precedence(tuned: Path) -> None:
    problem = problem_of()
    chosen = choose_tile("forward", problem, H200)
    other = next(tile for tile in candidates("forward", problem, H200) if tile != chosen)
    write_table(tuned, tile_shapes.TABLE_VERSION, {problem_key("forward", problem): other.as_json()})
    assert choose_tile("forward", problem, H200) == other
    assert choose_tile("dgrad", problem, H200) == chosen
    assert choose_tile("forward", problem, replace(H200, name="NVIDIA H100")) == chosen


@pytest.mark.parametrize("stale", ["another version of the kernels", "a tile that is no candidate"])
def test_a_measurement_that_does_not_apply_is_ignored(stale: str, tuned: Path) -> None:
    problem = problem_of()
    chosen = choose_tile("forward", problem, H200)
    other = next(tile for tile in candidates("forward", problem, H200) if tile != chosen)
    version = tile_shapes.TABLE_VERSION
    if stale == "another version of the kernels":
        version -= 1
    else:
        other = replace(other, stages=9)
    write_table(tuned, version, {problem_key("forward", problem): other.as_json()})
    assert choose_tile("forward", problem, H200) == chosen


def write_table(folder: Path, version: int, tiles: dict[str, Any]) -> None:
    for cache in (load_tuned, choose_tile):
        cache.cache_clear()
    (folder / "nvidia_h200.json").write_text(json.dumps({"version": version, "tiles": tiles}))


def at_half_widths(op: str, problem: ConvProblem) -> float:
    """The share of its products that the chosen tile still computes, in blocks of channels as in the kernels."""

    def across(live: int, block: int) -> float:
        tiles = -(-live // block)
        return tiles - 0.5 if block >= 128 and live <= tiles * block - block // 2 else tiles

    def products(ins: int, outs: int) -> float:
        if op == "wgrad":
            boxes = choose_wgrad_tile(problem, H200)
            return across(outs, boxes.block_out) * across(ins, boxes.block_in)
        tile = choose_tile(op, problem, H200)
        source, out = (outs, ins) if op == "dgrad" else (ins, outs)
        return across(out, tile.block_channels) * -(-source // tile.block_k)

    ins, outs = problem.in_channels, problem.out_channels
    return products(ins // 2, outs // 2) / products(ins, outs)


@pytest.mark.parametrize("op", ["forward", "dgrad", "wgrad"])
def test_half_widths_leave_a_quarter_of_the_products_of_a_unet(op: str) -> None:
    for name, flags in UNETS.items():
        for layer in unet_layers(name, flags, UNET_BATCH)[0]:
            ins, outs = layer.in_channels, layer.out_channels
            if layer.filter == 1 or min(ins, outs) < 16:  # images' own channels are never pruned
                continue
            problem = problem_of(layer.batch, layer.height, stride=layer.stride, in_channels=ins, out_channels=outs)
            assert at_half_widths(op, problem) == 0.25, str(layer)
    assert at_half_widths(op, problem_of(64, 64, 192)) == 4 / 9  # 96 channels take as much as 128


def test_unsupported_problems_are_refused_with_a_reason() -> None:
    assert conv_supported(problem_of()) is None
    assert "float64" in str(conv_supported(problem_of(dtype=torch.float64)))
    assert "odd filters" in str(conv_supported(problem_of(filter=(2, 2))))
    assert "strides 1 and 2" in str(conv_supported(replace(problem_of(), stride=(3, 1))))
    assert "2**31" in str(conv_supported(problem_of(size=8192)))
