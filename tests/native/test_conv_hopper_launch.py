"""Which convolutions the Hopper form serves, on which tiles, and how its tensors are described. No kernel runs."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest

from tdc_fast import _native
from tdc_fast.ops.cuda_planned import _forms
from tests.native.test_conv_launch import A100, ALIGNED, H100, arguments, only


def plan(pass_: str = "forward", device: tuple[int, int, int] = H100, **changes: Any) -> list[Any]:
    """Launches where the form is asked for."""
    planner = getattr(_native, f"cuda_launches_conv_{pass_}")
    return planner(**arguments(pass_, device, **changes), hopper=True)


def sizes(device: tuple[int, int, int] = H100, **changes: Any) -> dict[str, Any]:
    own = arguments("forward", device, **changes)
    return {name: value for name, value in own.items() if value is not ALIGNED}


def refusal(pass_: str = "forward", device: tuple[int, int, int] = H100, **changes: Any) -> str:
    return getattr(_native, f"cuda_conv_{pass_}_hopper_refusal")(**sizes(device, **changes))


def test_it_runs_only_where_it_is_asked_for() -> None:
    assert "hopper" not in only(_native.cuda_launches_conv_forward(**arguments("forward", H100))).kernel
    assert only(plan()).kernel == "tdc_conv_hopper_forward_bf16_16x16x128"
    assert only(plan("dgrad", dtype=2)).kernel == "tdc_conv_hopper_dgrad_fp16_16x16x128"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device": A100}, "it needs compute capability 9.0, not 8.0"),
        ({"device": (100, 148, 232448)}, "it needs compute capability 9.0, not 10.0"),
        ({"dtype": 0, "tf32": True}, "it has bf16 and fp16, not fp32"),
        ({"filter_height": 1, "filter_width": 1}, "it has 3x3 filters with padding 1 and stride 1 or 2"),
        ({"stride_height": 2}, "it has 3x3 filters with padding 1 and stride 1 or 2"),
        ({"x2_channels": 60}, "it has channels from 64 on, in multiples of 8"),
        ({"upsample": 2, "x2_channels": 64}, "it upsamples one input of 3x3 filters with padding 1 and stride 1"),
        ({"upsample": 2, "pad_height": 0}, "it upsamples one input of 3x3 filters with padding 1 and stride 1"),
        ({"upsample": 2, "height": 1}, "it upsamples images from 2x2 on"),
        ({"upsample": 2, "num_groups": 385}, "it has at most 384 groups"),
        ({"height": 7, "width": 7}, "its 3x3 filters have images from 8x8 on, or whose number of pixels"),
        ({"in_channels": 3}, "it leaves image channels to the portable form"),
        ({"out_channels": 6}, "it leaves image channels to the portable form"),
        ({"in_channels": 32}, "it has channels from 64 on, in multiples of 8"),
        ({"out_channels": 132}, "it has channels from 64 on, in multiples of 8"),
        ({"num_groups": 385}, "it has at most 384 groups"),
        ({"device": (90, 132, 101376)}, "its stages do not fit into shared memory"),
    ],
)
def test_what_it_does_not_serve_takes_the_portable_form(changes: dict[str, Any], reason: str) -> None:
    for pass_ in ("forward", "dgrad"):
        assert refusal(pass_, **changes).startswith(reason)
        assert "hopper" not in only(plan(pass_, **changes)).kernel


@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
@pytest.mark.parametrize(
    "changes, reason",
    [
        *(({name: 0}, "a size is out of range") for name in ("height", "width", "in_channels", "out_channels")),
        ({"batch": -1}, "a size is out of range"),  # the others would overflow the clocks
        ({"batch": 1 << 20, "height": 1 << 20}, "the batch has more than 2^30 pixels"),
        ({"in_channels": 32}, "it has channels from 64 on"),
    ],
)
def test_sizes_that_the_model_cannot_count_are_refused(pass_: str, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=f"routed convolution: {re.escape(reason)}"):
        getattr(_native, f"cuda_conv_{pass_}_hopper_choices")(**sizes(**changes))


@pytest.mark.parametrize("pass_", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("side", ["height", "width"])
def test_images_without_pixels_are_refused(pass_: str, side: str) -> None:
    assert refusal(pass_, **{side: 0}) == "it needs images of at least one pixel"


def test_an_address_that_tma_cannot_take_is_refused() -> None:
    assert "hopper" not in only(plan(x=ALIGNED + 8)).kernel
    assert refusal() == refusal("dgrad") == ""


@pytest.mark.parametrize(
    "changes, tile",
    [
        ({"height": 16, "width": 16, "out_channels": 256}, "16x16x128"),
        ({"out_channels": 192}, "16x16x192"),
        ({"out_channels": 576}, "16x16x192"),
        ({"out_channels": 384}, "16x16x192"),
        ({"out_channels": 64}, "32x16x64"),
        ({"out_channels": 64, "height": 16, "width": 16}, "16x16x128"),
        ({"height": 8, "width": 8, "batch": 1024}, "8x8x4x128"),
        ({"height": 24, "width": 24}, "8x8x4x128"),  # 9 tiles of 8x8 instead of 4 of 16x16
        ({"height": 12, "width": 12}, "16x16x128"),
    ],
)
def test_the_tile_computes_as_little_outside_of_the_result_as_possible(changes: dict[str, int], tile: str) -> None:
    launch = only(plan(**changes))
    assert launch.kernel == f"tdc_conv_hopper_forward_bf16_{tile}"
    assert launch.threads == 384 and launch.shared_bytes <= H100[2]


def test_a_launch_has_a_block_for_every_multiprocessor_or_for_every_tile() -> None:
    assert only(plan()).grid == (132, 1, 1)
    assert only(plan(batch=64, height=16, width=16, out_channels=256)).grid == (64 * 2, 1, 1)
    # 2 samples of a tile: at most 40 // 2 + 8 groups rows, of 2 x 64 channels.
    assert only(plan(batch=40, height=8, width=16)).grid == (28 * 2 * 2, 1, 1)


def test_stages_of_weights_fill_what_the_groups_leave_of_shared_memory() -> None:
    used = [only(plan(num_groups=groups)).shared_bytes for groups in (1, 8, 64, 384)]
    stages = [(size - (2 * 41984 + 16 * 2048)) // 16384 for size in used]
    assert stages == [7, 7, 6, 6] and max(used) <= H100[2]


@pytest.mark.parametrize(
    "changes, columns, source, buffers, stages",
    [
        ({"out_channels": 192}, 192, 18 * 18, 16, 4),
        ({"out_channels": 64}, 64, 34 * 18, 16, 5),
        ({"height": 8, "width": 8, "batch": 1024}, 128, 4 * 10 * 10, 8, 6),
        ({"height": 8, "width": 16, "batch": 40}, 64, 2 * 10 * 10, 16, 8),
    ],
)
def test_every_tile_has_4_to_8_stages_of_weights(
    changes: dict[str, int], columns: int, source: int, buffers: int, stages: int
) -> None:
    """What is left of shared memory beside sources and store buffers; control data and 8 groups take less than one."""
    left = only(plan(**changes)).shared_bytes - 2 * -(-128 * source // 1024) * 1024 - buffers * 2048
    assert left // (128 * columns) == stages


def described(launch: Any, at: int) -> tuple[int, ...]:
    """address, strides, sizes, box, dimensions, half of a TensorMap."""
    return struct.unpack_from("=5Q10I2i", launch.params, at)


def test_tensors_are_described_with_their_boxes() -> None:
    launch = only(plan(x=1 << 21, weight=1 << 22, y=1 << 23, residual=1 << 24, out_channels=256, dtype=2))
    assert launch.tensor_maps == [0, 256, 384, 640]
    source, weight, result, residual = (described(launch, at) for at in launch.tensor_maps)
    of_x = (128 * 2, 32 * 128 * 2, 32 * 32 * 128 * 2, 0, 128, 32, 32, 128, 1)
    assert source == (1 << 21, *of_x, 64, 18, 18, 1, 1, 4, 1)
    of_weight = (128 * 2, 9 * 128 * 2, 256 * 9 * 128 * 2, 0, 128, 9, 256, 8, 1)
    assert weight == (1 << 22, *of_weight, 64, 1, 64, 1, 1, 4, 1)
    of_y = (256 * 2, 32 * 256 * 2, 32 * 32 * 256 * 2, 0, 256, 32, 32, 128, 1)
    assert result == (1 << 23, *of_y, 64, 8, 2, 1, 1, 4, 1)
    assert residual == (1 << 24, *result[1:])
    assert only(plan(residual=0)).tensor_maps == [0, 256, 384]


def test_3x3_filters_read_boxes_of_both_inputs_and_write_both_gradients() -> None:
    sizes = {"in_channels": 384, "x2_channels": 128, "residual": 0}
    launch = only(plan(x=1 << 21, x2=1 << 22, **sizes))
    assert launch.tensor_maps == [0, 128, 256, 384]
    x, x2, weight, _ = (described(launch, at) for at in launch.tensor_maps)
    assert (x[0], x[5:9], x[10:14]) == (1 << 21, (256, 32, 32, 128), (64, 18, 18, 1))
    assert x2 == (1 << 22, 256, 32 * 256, 32 * 32 * 256, 0, 128, *x[6:])
    assert weight[5:9] == (384, 9, 128, 8)
    launch = only(plan("dgrad", dx=1 << 22, dx2=1 << 23, in_channels=384, x2_channels=128))
    assert launch.kernel == "tdc_conv_hopper_dgrad_bf16_16x16x128"
    assert launch.tensor_maps == [0, 256, 384, 512]
    dx, dx2 = (described(launch, at) for at in launch.tensor_maps[2:])
    assert (dx[0], dx[5], dx2[0], dx2[5]) == (1 << 22, 256, 1 << 23, 128)
    assert dx[6:] == dx2[6:]


@pytest.mark.parametrize(
    "inputs, tile",
    [
        ((64, 64), "32x16x64"),
        ((192, 192), "16x16x192"),
        # 2 tiles of 192 channels compute as many as 3 of 128.
        ((192, 128), "16x16x128"),
        ((96, 96), "16x16x128"),
    ],
)
def test_no_tile_of_dgrad_has_channels_of_both_inputs(inputs: tuple[int, int], tile: str) -> None:
    launch = only(plan("dgrad", in_channels=sum(inputs), x2_channels=inputs[1]))
    assert launch.kernel == f"tdc_conv_hopper_dgrad_bf16_{tile}"


POINTWISE = {"filter_height": 1, "filter_width": 1, "pad_height": 0, "pad_width": 0}


def test_1x1_filters_read_rows_of_both_inputs() -> None:
    sizes = {**POINTWISE, "in_channels": 384, "x2_channels": 128}
    launch = only(plan(x=1 << 21, x2=1 << 22, y=1 << 23, residual=1 << 24, **sizes))
    assert launch.kernel == "tdc_conv_hopper_rows_forward_bf16_256x128"
    assert launch.grid == (132, 1, 1) and launch.threads == 384 and launch.shared_bytes <= H100[2]
    x, x2, weight, y, y_row, residual = (described(launch, at) for at in launch.tensor_maps)
    rows = 128 * 32 * 32
    assert x == (1 << 21, 512, 512 * rows, 512 * rows, 0, 256, rows, 1, 1, 1, 64, 256, 1, 1, 1, 4, 0)
    assert (x2[0], x2[5:7], x2[10:12]) == (1 << 22, (128, rows), (64, 256))
    assert (weight[5:9], weight[10:14]) == ((384, 1, 128, 8), (64, 1, 64, 1))
    assert (y[0], y[5:7], y[10:12]) == (1 << 23, (128, rows), (64, 16))
    assert y_row == (*y[:11], 1, *y[12:])
    assert residual == (1 << 24, *y[1:])


def test_dgrad_of_1x1_filters_writes_both_gradients() -> None:
    sizes = {**POINTWISE, "in_channels": 384, "x2_channels": 128}
    launch = only(plan("dgrad", dy=1 << 21, dx=1 << 22, dx2=1 << 23, **sizes))
    assert launch.kernel == "tdc_conv_hopper_rows_dgrad_bf16_256x128"
    dy, _, dx, dx2, dx_row, dx2_row = (described(launch, at) for at in launch.tensor_maps)
    assert (dy[0], dx[0], dx2[0]) == (1 << 21, 1 << 22, 1 << 23)
    assert (dx[5], dx2[5], dx[11], dx2[11], dx_row[11], dx2_row[11]) == (256, 128, 16, 16, 1, 1)
    assert len(only(plan("dgrad", **POINTWISE)).tensor_maps) == 4


@pytest.mark.parametrize(
    "changes, tile, blocks",
    [
        ({}, "256x128", 132),
        ({"height": 8, "width": 8, "batch": 64, "in_channels": 256, "out_channels": 768}, "256x128", 132),
        # 48 tiles of 128x128 in one wave, which take longer than 96 of 128x64
        ({"height": 4, "width": 4, "batch": 64, "in_channels": 256, "out_channels": 768}, "128x64", 132),
        # 256 tiles in two waves of 128x64, which take longer than one of 128x128
        ({"height": 4, "width": 4, "batch": 128, "in_channels": 256, "out_channels": 1024}, "128x128", 132),
        ({"height": 1, "width": 1, "batch": 64, "in_channels": 512, "out_channels": 512}, "128x64", 64),
    ],
)
def test_the_tile_of_rows_keeps_the_busiest_multiprocessor_for_the_fewest_clocks(
    changes: dict[str, int], tile: str, blocks: int
) -> None:
    launch = only(plan(**POINTWISE, **changes))
    assert launch.kernel == f"tdc_conv_hopper_rows_forward_bf16_{tile}"
    assert launch.grid == (blocks, 1, 1)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"in_channels": 384, "x2_channels": 124}, "it has channels from 64 on, in multiples of 8"),
        ({"out_channels": 3}, "it leaves image channels to the portable form"),
        ({"num_groups": 385}, "it has at most 384 groups"),
        ({"device": (90, 132, 101376)}, "its stages do not fit into shared memory"),
    ],
)
def test_what_1x1_filters_do_not_serve_takes_the_portable_form(changes: dict[str, Any], reason: str) -> None:
    for pass_ in ("forward", "dgrad"):
        assert refusal(pass_, **POINTWISE, **changes).startswith(reason)
        assert "hopper" not in only(plan(pass_, **POINTWISE, **changes)).kernel
    assert refusal(**POINTWISE) == refusal("dgrad", **POINTWISE) == ""


STRIDED = {"stride_height": 2, "stride_width": 2}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pad_height": 0}, "it has 3x3 filters with padding 1 and stride 1 or 2"),
        ({"stride_width": 1}, "it has 3x3 filters with padding 1 and stride 1 or 2"),
        ({"height": 3}, "its filters of stride 2 have images from 4x4 on"),
        ({"x2_channels": 64}, "its filters of stride 2 have one input"),
        ({"in_channels": 3}, "it leaves image channels to the portable form"),
        ({"num_groups": 385}, "it has at most 384 groups"),
        ({"device": (90, 132, 101376)}, "its stages do not fit into shared memory"),
    ],
)
def test_what_stride_2_does_not_serve_takes_the_portable_form(changes: dict[str, Any], reason: str) -> None:
    for pass_ in ("forward", "dgrad"):
        assert refusal(pass_, **STRIDED | changes).startswith(reason)
        assert "hopper" not in only(plan(pass_, **STRIDED | changes)).kernel
    assert refusal("wgrad", **STRIDED | changes)
    assert refusal("forward", upsample=2, **STRIDED).startswith("it upsamples one input of 3x3 filters")
    assert refusal(**STRIDED) == refusal("dgrad", **STRIDED) == refusal("wgrad", **STRIDED) == ""


@pytest.mark.parametrize(
    "changes, tile, box",
    [
        ({}, "256x128", (16, 16, 1)),
        ({"height": 64, "width": 64, "in_channels": 128}, "256x128", (16, 16, 1)),
        # 128 tiles of 128 pixels instead of 64 of 256, for 132 SMs
        ({"batch": 64}, "128x128", (16, 8, 1)),
        ({"height": 16, "width": 16, "in_channels": 256, "out_channels": 256}, "128x128", (8, 8, 2)),
        ({"height": 8, "width": 8, "in_channels": 256, "out_channels": 256}, "128x64", (4, 4, 8)),
        ({"height": 21, "width": 21}, "256x128", (4, 4, 16)),
        ({"out_channels": 64}, "128x64", (16, 8, 1)),
    ],
)
def test_the_tile_of_stride_2_keeps_the_busiest_multiprocessor_for_the_fewest_clocks(
    changes: dict[str, int], tile: str, box: tuple[int, int, int]
) -> None:
    launch = only(plan(**STRIDED | changes))
    assert launch.kernel == f"tdc_conv_hopper_strided_forward_bf16_{tile}"
    assert described(launch, 0)[11:14] == box
    assert launch.threads == 384 and launch.shared_bytes <= H100[2]


def test_stride_2_reads_the_pixels_of_each_parity_as_an_image() -> None:
    sizes = {**STRIDED, "height": 33, "width": 31, "out_channels": 256}
    launch = only(plan(x=1 << 21, y=1 << 22, weight=1 << 23, residual=1 << 24, **sizes))
    *planes, weight, y, residual = (described(launch, at) for at in launch.tensor_maps)
    box = planes[0][10:14]
    places = [(down, across) for down in (0, 1) for across in (0, 1)]
    for plane, (down, across) in zip(planes, places, strict=True):
        assert plane[0] == (1 << 21) + (down * 31 + across) * 128 * 2
        assert plane[1:4] == (2 * 128 * 2, 2 * 31 * 128 * 2, 33 * 31 * 128 * 2)
        assert plane[5:9] == (128, 16 - across, 17 - down, 128) and plane[10:14] == box
    assert weight[5:9] == (128, 9, 256, 8) and weight[10:14] == (64, 1, 64, 1)
    assert (y[0], y[5:9], y[10:14]) == (1 << 22, (256, 16, 17, 128), (64, box[1], 16 // box[1], 1))
    assert residual == (1 << 24, *y[1:])
    grad = only(plan("dgrad", dy=1 << 21, dx=1 << 22, weight=1 << 23, **sizes))
    dy, _, *of_dx = (described(grad, at) for at in grad.tensor_maps)
    assert (dy[0], dy[5:9]) == (1 << 21, y[5:9])
    assert [m[0] - (1 << 22) for m in of_dx] == [m[0] - (1 << 21) for m in planes]
    assert [m[1:9] for m in of_dx] == [m[1:9] for m in planes]
    assert of_dx[3][10:14] == (64, dy[11], 16 // dy[11], 1)


@pytest.mark.parametrize(
    "height, width, box, patches",
    [(32, 32, (8, 8, 1), (2, 2)), (9, 8, (4, 4, 4), (2, 1)), (21, 23, (4, 4, 4), (3, 3)), (13, 64, (8, 8, 1), (1, 4))],
)
def test_wgrad_of_stride_2_has_the_fewest_patches(
    height: int, width: int, box: tuple[int, int, int], patches: tuple[int, int]
) -> None:
    sizes = {**STRIDED, "height": height, "width": width, "out_channels": 256}
    products, reduce = plan("wgrad", x=1 << 21, dy=1 << 22, dsample_bias=0, **sizes)
    assert products.kernel == "tdc_conv_hopper_wgrad_rows128_bf16"
    assert products.grid == (132, 1, 1) and reduce.grid == (3 * 132, 1, 1)
    x, dy, *planes = (described(products, at) for at in products.tensor_maps)
    assert dy[5:9] == (256, (width + 1) // 2, (height + 1) // 2, 128)
    places = [(down, across) for down in (0, 1) for across in (0, 1)]
    for plane, (down, across) in zip((x, *planes), places, strict=True):
        assert plane[0] == (1 << 21) + (down * width + across) * 128 * 2
        assert plane[5:9] == (128, (width + 1 - across) // 2, (height + 1 - down) // 2, 128)
        assert plane[11:14] == dy[11:14] == box
    down, across = patches
    assert (down, across) == (-(-dy[7] // box[1]), -(-dy[6] // box[0]))


def test_wgrad_of_stride_2_that_sums_samples_has_patches_of_one_sample() -> None:
    sizes = {**STRIDED, "height": 9, "width": 8}
    boxes = [described(plan("wgrad", **sizes, dsample_bias=bias)[0], 256)[11:14] for bias in (0, ALIGNED)]
    assert boxes == [(4, 4, 4), (8, 8, 1)]
    # Or of four samples, which it ends.
    assert described(plan("wgrad", **sizes | {"height": 8})[0], 256)[11:14] == (4, 4, 4)


def test_wgrad_of_an_upsampled_image_reads_planes_of_windows() -> None:
    sizes = {"upsample": 2, "height": 16, "width": 12, "in_channels": 64, "out_channels": 256}
    windows, products, reduce = plan("wgrad", x=1 << 21, dy=1 << 22, workspace=1 << 25, **sizes)
    assert windows.kernel == "tdc_conv_hopper_window_sums_bf16" and windows.grid == (128 * 4, 1, 1)
    assert products.kernel == "tdc_conv_hopper_wgrad_rows128_bf16"
    assert reduce.kernel == "tdc_conv_hopper_wgrad_reduce_rows128_bf16"
    assert products.grid == (132, 1, 1)
    x, even_even, *others = (described(products, at) for at in products.tensor_maps)
    assert (x[0], x[5:9], x[10:14]) == (1 << 21, (64, 12, 16, 128), (64, 4, 4, 4))
    places = [(down, across) for down in (0, 1) for across in (0, 1)]
    for plane, (down, across) in zip((even_even, *others), places, strict=True):
        assert plane[0] == (1 << 25) + (down * 25 + across) * 256 * 2
        assert plane[1:4] == (2 * 256 * 2, 2 * 25 * 256 * 2, 33 * 25 * 256 * 2)
        assert plane[5:9] == (256, 13 - across, 17 - down, 128) and plane[10:14] == x[10:14]
    measure = _native.cuda_conv_wgrad_workspace
    parts = 33 * 25 * 128 * 256 * 2 + 2 * 132 * 1 * 16 * 256 * 16
    own = arguments("wgrad", H100, **sizes)
    assert measure(**own, hopper=True) == parts + 128 * 256 * 4
    assert measure(**own | {"dbias": 0, "dsample_bias": 0}, hopper=True) == parts
    # Strips of lines where there are few samples
    assert plan("wgrad", **sizes | {"batch": 8})[0].grid == (8 * 4 * 9, 1, 1)


def test_an_upsampled_image_is_a_convolution_of_stride_2_on_merged_taps() -> None:
    sizes = {"upsample": 2, "height": 16, "width": 12, "in_channels": 64, "out_channels": 256}
    places = {"x": 1 << 21, "y": 1 << 22, "weight": 1 << 23, "residual": 1 << 24, "workspace": 1 << 25}
    merge, launch = plan(**sizes, **places)
    assert merge.kernel == "tdc_conv_hopper_merge_taps_bf16" and merge.grid == (8 * 16 * 2 * 8, 1, 1)
    assert launch.kernel == "tdc_conv_hopper_strided_dgrad_bf16_256x128"
    x, weight, *planes = (described(launch, at) for at in launch.tensor_maps)
    assert (x[0], x[5:9]) == (1 << 21, (64, 12, 16, 128))
    assert (weight[0], weight[5:9]) == (1 << 25, (256, 16, 64, 8))
    for number, plane in enumerate(planes):
        parity = number % 4
        assert plane[0] == (1 << (22 if number < 4 else 24)) + (parity // 2 * 24 + parity % 2) * 256 * 2
        assert plane[1:4] == (2 * 256 * 2, 2 * 24 * 256 * 2, 32 * 24 * 256 * 2)
        assert plane[5:9] == (256, 12, 16, 128) and plane[10:14] == (64, 4, 4, 1)
    assert len(planes) == 8
    merge, grad = plan("dgrad", **sizes, dy=1 << 22, dx=1 << 21, weight=1 << 23, workspace=1 << 25)
    assert merge.kernel == "tdc_conv_hopper_merge_taps_bf16"
    assert grad.kernel == "tdc_conv_hopper_strided_forward_bf16_128x64"
    *of_dy, weight, dx = (described(grad, at) for at in grad.tensor_maps)
    assert [m[:9] for m in of_dy] == [m[:9] for m in planes[:4]]
    assert (weight[0], weight[5:9], dx[0], dx[5:9]) == (1 << 25, (256, 16, 64, 8), 1 << 21, x[5:9])
    # Without a workspace the portable form takes every tap.
    assert only(plan(**sizes)).kernel == "tdc_conv_forward_bf16_128x128"
    assert "hopper" not in only(plan("dgrad", **sizes)).kernel


@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_the_workspace_of_an_upsampled_image_holds_the_merged_taps(pass_: str) -> None:
    measure = getattr(_native, f"cuda_conv_{pass_}_workspace")
    own = arguments(pass_, H100, out_channels=256)
    assert measure(**own, upsample=2, hopper=True) == 8 * 256 * 16 * 128 * 2
    assert measure(**own | {"batch": 0}, upsample=2, hopper=True) == measure(**own, hopper=True) == 0
    assert measure(**own, upsample=2) == (0 if pass_ == "forward" else 8 * 256 * 16 * 128 * 2)


def test_dgrad_of_stride_2_has_tiles_of_every_parity() -> None:
    # 8 samples of a tile of 8 x 16 pixels, times the tiles of channels; four times as many pixels of dx
    changes = {**STRIDED, "batch": 8, "height": 31, "width": 16, "in_channels": 64}
    assert only(plan(**changes)).grid == (8 * 2, 1, 1)
    assert only(plan("dgrad", **changes)).grid == (4 * 8, 1, 1)
    assert plan(batch=0, **STRIDED) == plan("dgrad", batch=0, **STRIDED) == []


def test_dgrad_reads_dy_and_the_weights_of_the_forward() -> None:
    launch = only(plan("dgrad", dy=1 << 21, weight=1 << 22, dx=1 << 23, out_channels=256))
    source, weight, result = (described(launch, at) for at in launch.tensor_maps)
    assert (source[0], source[5:9]) == (1 << 21, (256, 32, 32, 128))
    assert (weight[0], weight[5:9]) == (1 << 22, (128, 9, 256, 8))
    assert (result[0], result[5:9]) == (1 << 23, (128, 32, 32, 128))


def test_wgrad_has_products_and_sums_of_parts_and_biases() -> None:
    launches = plan("wgrad", x=1 << 21, dy=1 << 22, out_channels=256)
    assert [launch.kernel for launch in launches] == [
        "tdc_conv_hopper_wgrad_bf16",
        "tdc_conv_hopper_wgrad_reduce_bf16",
    ]
    products, reduce = launches
    assert products.grid == (132, 1, 1) and products.threads == 384 and products.shared_bytes <= H100[2]
    assert reduce.grid == (3 * 132, 1, 1)
    assert plan("wgrad", num_experts=1)[1].grid == (3 * 16, 1, 1)  # slices of 3 units
    x, dy = (described(products, at) for at in products.tensor_maps)
    assert (x[0], x[5:9], x[10:14]) == (1 << 21, (128, 32, 32, 128), (64, 10, 8, 1))
    assert (dy[0], dy[5:9], dy[10:14]) == (1 << 22, (256, 32, 32, 128), (64, 8, 8, 1))
    products = plan("wgrad", x2=1 << 23, x2_channels=56)[0]
    x, dy, x2 = (described(products, at) for at in products.tensor_maps)
    assert (x[5], x2[0], x2[5], x2[6:9], x2[10:14]) == (72, 1 << 23, 56, x[6:9], x[10:14])
    workspace = _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100, out_channels=256), hopper=True)
    # Two parts of each block, sums that blocks begin within samples, and those of 128 samples.
    assert workspace == 2 * 132 * 3 * 16 * 256 * 16 + 132 * 128 * 4 + 128 * 256 * 4


def test_wgrad_sums_biases_in_the_launches_of_the_weights() -> None:
    changes = {"out_channels": 256, "dsample_bias": 0}
    products, reduce = plan("wgrad", **changes)
    assert products.kernel == "tdc_conv_hopper_wgrad_bf16" and reduce.kernel == "tdc_conv_hopper_wgrad_reduce_bf16"
    workspace = _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100, **changes), hopper=True)
    # Sums of 128 channels for the two parts of each of 132 blocks, and for 8 experts x 3 filter rows x 2 whole units.
    assert workspace == 2 * 132 * 3 * 16 * 256 * 16 + (2 * 132 + 8 * 3 * 2) * 128 * 4
    without = _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100, **changes, dbias=0), hopper=True)
    assert without == 2 * 132 * 3 * 16 * 256 * 16


def test_wgrad_of_1x1_filters_reads_rows_of_both_inputs() -> None:
    sizes = {**POINTWISE, "in_channels": 384, "x2_channels": 128, "out_channels": 256}
    products, reduce = plan("wgrad", x=1 << 21, x2=1 << 22, dy=1 << 23, **sizes)[:2]
    # Two units of 256 channels load 768 channels, three of 128 as many: the larger one is taken.
    assert products.kernel == "tdc_conv_hopper_wgrad_rows256_bf16"
    assert reduce.kernel == "tdc_conv_hopper_wgrad_reduce_rows256_bf16"
    assert products.grid == (132, 1, 1) and reduce.grid == (3 * 132, 1, 1) and products.shared_bytes <= H100[2]
    x, dy, x2 = (described(products, at) for at in products.tensor_maps)
    rows = 128 * 32 * 32
    assert (x[0], x[5:7], x[10:12]) == (1 << 21, (256, rows), (64, 64))
    assert (dy[0], dy[5:7], dy[10:12]) == (1 << 23, (256, rows), (64, 64))
    assert (x2[0], x2[5:7], x2[10:12]) == (1 << 22, (128, rows), (64, 64))
    workspace = _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100, **sizes), x2=ALIGNED, hopper=True)
    assert workspace == 2 * 132 * 2 * 16 * 256 * 16 + 132 * 128 * 4 + 128 * 256 * 4


def test_3x3_filters_on_small_images_read_whole_images() -> None:
    sizes = {"height": 4, "width": 4, "batch": 64, "in_channels": 256, "out_channels": 256}
    launch = only(plan(x=1 << 21, residual=0, **sizes))
    assert launch.kernel == "tdc_conv_hopper_rows_split4_forward_bf16_128x64"
    x, weight, y = (described(launch, at) for at in launch.tensor_maps[:3])
    assert (x[0], x[5:9], x[10:14]) == (1 << 21, (256, 4, 4, 64), (64, 4, 4, 8))
    assert weight[5:9] == (256, 9, 256, 8)
    assert (y[5:7], y[10:12]) == ((256, 64 * 16), (64, 16))
    products = plan("wgrad", **sizes)[0]
    # 8 experts x 9 taps x 2 units of 128 x 256 channels
    assert products.kernel == "tdc_conv_hopper_wgrad_rows256_bf16" and products.grid == (132, 1, 1)
    x, dy = (described(products, at) for at in products.tensor_maps)
    assert (x[5:9], x[10:14], dy[5:7], dy[10:12]) == ((256, 4, 4, 64), (64, 4, 4, 4), (256, 1024), (64, 64))


@pytest.mark.parametrize("channels, unit", [(64, 128), (128, 128), (256, 256), (384, 384), (512, 256), (768, 384)])
def test_the_unit_of_1x1_filters_loads_the_fewest_channels(channels: int, unit: int) -> None:
    kernel = plan("wgrad", **POINTWISE, in_channels=channels)[0].kernel
    assert kernel == f"tdc_conv_hopper_wgrad_rows{unit}_bf16"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"filter_height": 1, "filter_width": 1}, "it has 3x3 filters with padding 1 and stride 1 or 2"),
        ({"stride_height": 2, "stride_width": 2, "width": 3}, "its filters of stride 2 have images from 4x4 on"),
        ({"height": 4, "width": 12}, "its 3x3 filters have images from 8x8 on, or whose number of pixels"),
        ({"x2_channels": 60}, "it has channels from 64 on, in multiples of 8"),
        ({"upsample": 2, "height": 1}, "it upsamples images from 2x2 on"),
        ({"upsample": 2, "x2_channels": 64}, "it upsamples one input of 3x3 filters with padding 1 and stride 1"),
        ({"num_groups": 257}, "it has at most 256 groups in wgrad"),
        ({"batch": 2**17, "height": 64, "width": 64, "in_channels": 2048, "out_channels": 1024}, "it takes less than"),
        # Only the patches of one sample, which dsample_bias takes, are too many.
        ({**STRIDED, "batch": 2**17, "height": 18, "width": 18, "in_channels": 1024, "out_channels": 1024}, "it takes"),
    ],
)
def test_a_wgrad_that_it_does_not_serve_takes_the_portable_form(changes: dict[str, Any], reason: str) -> None:
    assert refusal("wgrad", **changes).startswith(reason)
    for dsample_bias in (0, ALIGNED):
        launches = plan("wgrad", **changes, dsample_bias=dsample_bias)
        assert all("hopper" not in launch.kernel for launch in launches)


def test_images_of_few_pixels_have_sums_of_samples_of_the_portable_form() -> None:
    sizes = {**POINTWISE, "height": 5, "width": 3}
    sums = ["tdc_conv_sample_sums_bf16", "tdc_conv_expert_sums_bf16"]
    assert [launch.kernel for launch in plan("wgrad", **sizes)][2:] == sums
    assert len(plan("wgrad", **sizes, dsample_bias=0)) == len(plan("wgrad", **sizes | {"width": 4})) == 2


def test_sums_of_biases_alone_are_those_of_the_portable_form() -> None:
    assert [launch.kernel for launch in plan("wgrad", dweight=0)] == [
        "tdc_conv_sample_sums_bf16",
        "tdc_conv_expert_sums_bf16",
    ]


def test_a_batch_of_nothing_needs_no_launch() -> None:
    assert plan(batch=0) == plan("dgrad", batch=0) == []


@pytest.mark.parametrize("settings", [{}, {"hopper": True}, {"hopper": True, "upsample": 2, "workspace": ALIGNED}])
@pytest.mark.parametrize("pass_", ["forward", "dgrad", "wgrad"])
def test_padding_of_parameters_is_zeros(pass_: str, settings: dict[str, Any]) -> None:
    """Else launches with other addresses differ in more than these, and are never repeated."""
    small = {"batch": 2, "num_groups": 2, "num_experts": 2, "out_widths": 0, "sample_bias": 0, "dsample_bias": 0}
    own = arguments(pass_, H100, **settings)
    own |= {name: value for name, value in small.items() if name in own}
    names = [name for name, value in own.items() if value is ALIGNED]
    planner = getattr(_native, f"cuda_launches_conv_{pass_}")
    for _ in range(50):  # what memory held before is not always the same
        assert _forms(lambda addresses: planner(**own | addresses), names) is not None
