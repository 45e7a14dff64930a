"""The model of clocks by which the Hopper form chooses tiles, for every layer of two public UNets. No kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tdc_fast import _native
from tests.native.test_conv_hopper_launch import plan, sizes
from tests.native.test_conv_launch import H100, only

PASSES = ("forward", "dgrad")
# (filter, height, width, input channels, output channels) of the layers of stride 1 that are not of image channels.
CIFAR10 = [
    *((1, 4, 4, 512, 256), (1, 8, 8, 512, 256), (1, 16, 1, 256, 256), (1, 16, 1, 256, 768), (1, 16, 16, 128, 256)),
    *((1, 16, 16, 384, 256), (1, 16, 16, 512, 256), (1, 32, 32, 256, 128), (1, 32, 32, 384, 128)),
    *((1, 64, 1, 256, 256), (1, 64, 1, 256, 768), (1, 256, 1, 256, 256), (1, 256, 1, 256, 768)),
    *((3, 4, 4, 256, 256), (3, 4, 4, 512, 256), (3, 8, 8, 256, 256), (3, 8, 8, 512, 256), (3, 16, 16, 128, 256)),
    *((3, 16, 16, 256, 256), (3, 16, 16, 384, 256), (3, 16, 16, 512, 256), (3, 32, 32, 128, 128)),
    *((3, 32, 32, 256, 128), (3, 32, 32, 384, 128)),
]
IMAGENET64 = [
    *((1, 8, 8, 384, 512), (1, 8, 8, 896, 512), (1, 8, 8, 1024, 512), (1, 16, 16, 256, 384), (1, 16, 16, 640, 384)),
    *((1, 16, 16, 768, 384), (1, 16, 16, 896, 384), (1, 32, 32, 128, 256), (1, 32, 32, 384, 256)),
    *((1, 32, 32, 512, 256), (1, 32, 32, 640, 256), (1, 64, 1, 512, 512), (1, 64, 1, 512, 1536)),
    *((1, 64, 64, 256, 128), (1, 64, 64, 384, 128), (1, 256, 1, 384, 384), (1, 256, 1, 384, 1152)),
    *((3, 8, 8, 384, 512), (3, 8, 8, 512, 512), (3, 8, 8, 896, 512), (3, 8, 8, 1024, 512), (3, 16, 16, 256, 384)),
    *((3, 16, 16, 384, 384), (3, 16, 16, 640, 384), (3, 16, 16, 768, 384), (3, 16, 16, 896, 384)),
    *((3, 32, 32, 128, 256), (3, 32, 32, 256, 256), (3, 32, 32, 384, 256), (3, 32, 32, 512, 256)),
    *((3, 32, 32, 640, 256), (3, 64, 64, 128, 128), (3, 64, 64, 256, 128), (3, 64, 64, 384, 128)),
]
LAYERS = CIFAR10 + IMAGENET64
DRAM_BYTES = 2400  # of an H200, in a clock
START = 10_600  # clocks until a block's first products, in a prototype on an H200
TENSOR_CORES = 132 * 2048  # multiply-adds in a clock


def settings(layer: tuple[int, int, int, int, int], batch: int, groups: int) -> dict[str, Any]:
    filter_, height, width, ins, outs = layer
    shape = {"batch": batch, "height": height, "width": width, "in_channels": ins, "out_channels": outs}
    padding = {"pad_height": filter_ // 2, "pad_width": filter_ // 2}
    return (
        shape
        | padding
        | {"filter_height": filter_, "filter_width": filter_}
        | {"num_groups": groups, "num_experts": groups}
    )


def choices(pass_: str, **changes: Any) -> dict[str, int]:
    """Clocks by tile, the chosen one first."""
    found = getattr(_native, f"cuda_conv_{pass_}_hopper_choices")(**sizes(**changes))
    return {tile: clocks for tile, clocks, _ in found}


def problems(
    batches: tuple[int, ...] = (16, 64, 512), groups: tuple[int, ...] = (1, 8, 64)
) -> Iterator[tuple[str, Any]]:
    for layer in LAYERS:
        for batch in batches:
            for count in groups:
                for pass_ in PASSES:
                    yield pass_, settings(layer, batch, count)


def test_what_runs_is_the_first_choice() -> None:
    for pass_, own in problems(groups=(1, 8)):
        kernel = only(plan(pass_, **own)).kernel
        assert kernel.removeprefix("tdc_conv_hopper_").replace(f"{pass_}_bf16_", "") == next(
            iter(choices(pass_, **own))
        )


def test_no_layer_takes_longer_by_splitting_or_by_small_tiles() -> None:
    split = 0
    for pass_, own in problems():
        clocks = choices(pass_, **own)
        chosen = next(iter(clocks))
        # Images go as rows only where these are faster by a tenth.
        assert clocks[chosen] <= min(clocks.values()) / (0.9 if not chosen.startswith("rows") else 1) + 10, own
        split += "split" in chosen
    assert split >= 50


@pytest.mark.parametrize("layer", [(3, 4, 4, 256, 256), (3, 4, 4, 512, 256), (3, 8, 8, 256, 256), (3, 8, 8, 512, 256)])
def test_small_images_keep_all_multiprocessors_busy(layer: tuple[int, int, int, int, int]) -> None:
    """64 samples of 8 experts: 4x4 images by clusters of four blocks, 8x8 images by tiles of two samples."""
    clocks = choices("forward", **settings(layer, 64, 8))
    chosen = next(iter(clocks))
    height, ins, outs = layer[1], layer[3], layer[4]
    assert chosen == ("rows_split4_128x64" if height == 4 else "8x8x2x64")
    large = clocks["rows_128x64" if height == 4 else "8x8x4x128"]
    assert clocks[chosen] <= (0.5 if height == 4 else 0.36) * large
    launch = only(plan(**settings(layer, 64, 8)))
    assert 128 <= launch.grid[0] * launch.grid[1] <= H100[1]
    products = 64 * height**2 * 9 * ins * outs / TENSOR_CORES
    assert clocks[chosen] <= (3.1 if height == 4 else 1.6) * products


def test_64_experts_cost_little_more_than_what_memory_delivers() -> None:
    """64 samples of 64 experts against 8 experts, or the time in which memory delivers all tensors, the longer one.

    1x1 filters have as few as 4 steps, so that the ends of tiles weigh more: there the start of a launch counts, too.
    """
    for pass_, own in problems(batches=(64,), groups=(8,)):
        eight, many = (
            next(iter(choices(pass_, **own | {"num_groups": n, "num_experts": n}).values())) for n in (8, 64)
        )
        taps, ins, outs = own["filter_height"] ** 2, own["in_channels"], own["out_channels"]
        elements = 64 * (taps * ins * outs + own["height"] * own["width"] * (ins + outs))
        least = max(eight, 2 * elements / DRAM_BYTES)
        start = START if taps == 1 else 0
        assert many + start <= 1.1 * (least + start), own
        assert many <= (1.1 if taps == 9 else 1.2) * least, own


def test_groups_of_single_samples_fill_small_tiles_of_one() -> None:
    """Of a tile of two samples they would leave half idle."""
    layer = (3, 16, 16, 128, 256)
    even, single = choices("dgrad", **settings(layer, 64, 8)), choices("dgrad", **settings(layer, 64, 64))
    assert next(iter(even)) == "8x8x2x64" and even["16x8x64"] == even["8x8x2x64"]
    assert next(iter(single)) == "16x8x64" and single["16x8x64"] == even["16x8x64"] < 0.7 * single["8x8x2x64"]


def test_products_of_few_columns_save_half_of_their_share() -> None:
    """Shared memory delivers the 64 rows of a product in half of the time that 64 columns take."""
    layer = settings((3, 32, 32, 64, 64), 128, 8)  # 256 tiles of 512 pixels
    two = layer | {"in_channels": 96, "x2_channels": 32}  # for either input; 64 and 32 columns
    assert choices("dgrad", **layer)["32x16x64"] == 2 * (9 * 1024 + 600 + 512 * 64 // 14)
    assert choices("dgrad", **two)["32x16x64"] == 4 * (9 * (1024 + 768) // 2 + 600 + 512 * 48 // 14)


def test_clusters_stay_within_the_multiprocessors_of_a_gpc() -> None:
    small = settings((3, 4, 4, 256, 256), 64, 8)
    assert only(plan(**small)).grid == (32, 4, 1)
    assert only(plan(device=(90, 114, 232448), **small)).grid == (57, 2, 1)  # 28 clusters of 4 would need two rounds
    assert "split" not in only(plan(device=(90, 1, 232448), **small)).kernel
