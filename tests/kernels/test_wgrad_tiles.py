"""The tile and the splits of a Triton weight gradient follow from shapes and the device, or from measurements."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tdc_fast.kernels import tile_shapes
from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.kernels.wgrad_tiles import (
    WgradTile,
    choose_splits,
    choose_wgrad_tile,
    tiles_of_gradient,
    wgrad_candidates,
)

A100, H100 = Device(80, 108, 166912), Device(90, 132, 232448)


def layer(batch: int, size: int, in_channels: int, out_channels: int, **changes: Any) -> ConvProblem:
    fields = {
        "op": "routed_conv2d_wgrad", "device": torch.device("cpu"), "dtype": torch.bfloat16, "batch": batch,
        "height": size, "width": size, "in_channels": in_channels, "out_channels": out_channels, "filter": (3, 3),
        "stride": (1, 1), "padding": (1, 1), "out_height": size, "out_width": size, "num_groups": 8,
        "num_experts": 8, "tf32": False,
    }  # fmt: skip
    return ConvProblem(**(fields | changes))


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_the_layers_of_a_unet_go_through_tma_on_hopper(size: int) -> None:
    assert choose_wgrad_tile(layer(128, size, 256, 256), H100) == WgradTile("tma", 128, 128, 64, 4, 8)
    assert choose_wgrad_tile(layer(128, size, 256, 256), A100).path == "pointer"


@pytest.mark.parametrize(
    "problem",
    [
        layer(8, 32, 3, 128),
        layer(8, 32, 128, 6),
        layer(8, 4, 128, 128),
        layer(8, 24, 128, 128),
        layer(8, 32, 128, 128, stride=(2, 2), out_height=16, out_width=16),
        layer(8, 32, 128, 128, dtype=torch.float32),
    ],
    ids=["3 channels in", "6 channels out", "4x4", "24x24", "stride 2", "fp32"],
)
def test_pointers_serve_what_boxes_cannot(problem: ConvProblem) -> None:
    assert choose_wgrad_tile(problem, H100).path == "pointer"
    assert all(tile.path == "pointer" for tile in wgrad_candidates(problem, H100))


def test_narrow_layers_get_narrow_tiles() -> None:
    assert choose_wgrad_tile(layer(8, 32, 3, 128), H100).block_in == 16
    assert choose_wgrad_tile(layer(8, 32, 64, 64), H100).block_out == 64


def test_splits_fill_the_device_if_tiles_alone_do_not() -> None:
    few, many = layer(128, 32, 128, 128), layer(64, 8, 512, 512)
    tile = choose_wgrad_tile(few, H100)
    assert tiles_of_gradient(few, tile) == 8 * 9
    assert choose_splits(few, tile, H100) == 3
    assert choose_splits(many, choose_wgrad_tile(many, H100), H100) == 1
    assert choose_splits(layer(1, 4, 128, 128), tile, H100) == 1  # too few pixels to split
    assert choose_splits(layer(0, 32, 128, 128), tile, H100) == 1


def test_a_measurement_takes_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem, gpu = layer(128, 32, 128, 128), Device(90, 132, 232448, "NVIDIA Test 9000")
    measured = WgradTile("tma", 64, 64, 64, 4, 4)
    key = tile_shapes.problem_key("wgrad", problem)
    table = {"version": tile_shapes.TABLE_VERSION, "tiles": {}, "wgrad": {key: {"tile": asdict(measured), "splits": 7}}}
    (tmp_path / "nvidia_test_9000.json").write_text(json.dumps(table))
    monkeypatch.setattr(tile_shapes, "TUNED", tmp_path)
    assert choose_wgrad_tile(problem, gpu) == measured and choose_splits(problem, measured, gpu) == 7
    other = choose_wgrad_tile(problem, H100)
    assert other != measured and choose_splits(problem, other, gpu) == choose_splits(problem, other, H100)


def test_every_candidate_fits_into_shared_memory() -> None:
    for device in (A100, H100, Device(86, 84, 101376), Device(120, 170, 101376)):
        for dtype in (torch.bfloat16, torch.float32):
            for tile in wgrad_candidates(layer(8, 32, 128, 128, dtype=dtype), device):
                assert tile.shared_bytes(dtype.itemsize) <= device.shared_limit
