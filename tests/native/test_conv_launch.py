"""Which kernels the planner of convolutions chooses, and on what grids. No kernel runs."""

from __future__ import annotations

from typing import Any

import pytest

from tdc_fast import _native
from tdc_fast.kernels.tile_table import tile_rows

A100, H100, SMALL_SHARED = (80, 108, 166912), (90, 132, 232448), (86, 84, 101376)
ALIGNED = 1 << 20  # an address that is never read


def plan(pass_: str, device: tuple[int, int, int] = A100, **changes: Any) -> list[Any]:
    return getattr(_native, f"cuda_launches_conv_{pass_}")(**arguments(pass_, device, **changes))


def arguments(pass_: str, device: tuple[int, int, int] = A100, **changes: Any) -> dict[str, Any]:
    own = {
        "forward": ("x", "weight", "bias", "sample_bias", "residual", "y", "tiles"),
        "dgrad": ("dy", "weight", "dx", "tiles"),
        "wgrad": ("x", "dy", "dweight", "dbias", "dsample_bias", "workspace"),
    }
    sizes = {
        **{"dtype": 1, "tf32": False, "batch": 128, "height": 32, "width": 32, "in_channels": 128},
        **{"out_channels": 128, "filter_height": 3, "filter_width": 3, "stride_height": 1, "stride_width": 1},
        **{"pad_height": 1, "pad_width": 1, "num_groups": 8, "num_experts": 8},
    }
    addresses = dict.fromkeys(("offsets", "weight_index", "in_widths", "out_widths", *own[pass_]), ALIGNED)
    return addresses | sizes | {"device": device} | changes


def only(launches: list[Any]) -> Any:
    assert len(launches) == 1
    return launches[0]


def test_a_large_convolution_takes_large_tiles() -> None:
    for pass_, device in (("forward", A100), ("dgrad", H100)):
        launch = only(plan(pass_, device))
        assert launch.kernel == f"tdc_conv_{pass_}_bf16_128x128"
        assert launch.grid == (128 * 32 * 32 // 128, 1, 1)
        assert (launch.threads, launch.shared_bytes) == (256, 4 * 2 * 128 * 32 * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 4, "height": 8, "width": 8},  # too few tiles for all SMs
        {"out_channels": 64},  # half of a large tile would be empty
    ],
)
def test_what_would_leave_multiprocessors_or_columns_idle_takes_small_tiles(changes: dict[str, int]) -> None:
    launch = only(plan("forward", **changes))
    assert (launch.kernel, launch.threads) == ("tdc_conv_forward_bf16_64x64", 128)


def test_a_tile_that_does_not_fit_shared_memory_is_not_chosen() -> None:
    for device in (SMALL_SHARED, (80, 1, 49152)):
        for dtype, tf32 in ((0, True), (1, False), (2, False)):
            for pass_ in ("forward", "dgrad", "wgrad"):
                for launch in plan(pass_, device, dtype=dtype, tf32=tf32):
                    assert launch.shared_bytes <= device[2]


@pytest.mark.parametrize(
    "pass_, changes",
    [
        ("forward", {"in_channels": 12}),
        ("forward", {"x": ALIGNED + 2}),
        ("forward", {"weight": ALIGNED + 8}),
        ("dgrad", {"out_channels": 12}),
        ("dgrad", {"in_channels": 12}),
        ("wgrad", {"in_channels": 12}),
        ("wgrad", {"dy": ALIGNED + 4}),
    ],
)
def test_what_16_byte_loads_cannot_serve_takes_the_kernels_for_any_channels(pass_: str, changes: dict) -> None:
    assert plan(pass_, **changes)[0].kernel == f"tdc_conv_{pass_}_bf16_64x64_any"


@pytest.mark.parametrize(
    "pass_, changes, kernel",
    [
        ("forward", {"in_channels": 3}, "few_to_many"),
        ("forward", {"out_channels": 3}, "many_to_few"),
        ("dgrad", {"out_channels": 3}, "few_to_many"),
        ("dgrad", {"in_channels": 3}, "many_to_few"),
        ("wgrad", {"in_channels": 3}, "few_wgrad"),
        ("wgrad", {"out_channels": 3}, "few_wgrad"),
    ],
)
def test_image_channels_have_kernels_of_their_own(pass_: str, changes: dict[str, int], kernel: str) -> None:
    assert plan(pass_, **changes)[0].kernel.startswith(f"tdc_conv_{kernel}_bf16_")


def test_tf32_loads_four_channels_at_once() -> None:
    assert only(plan("forward", dtype=0, tf32=True, in_channels=12)).kernel == "tdc_conv_forward_tf32_128x128"


def test_small_images_share_tiles() -> None:
    launch = only(plan("forward", H100, batch=1000, height=7, width=5, num_groups=3, out_channels=256))
    # A tile of 128 rows holds 2 images of 35 pixels, because the table has powers of two only; 2 tiles of channels.
    assert launch.kernel == "tdc_conv_forward_bf16_128x128"
    assert launch.grid == (tile_rows(1000, 3, 2) * 2, 1, 1)


def test_each_parity_of_a_strided_dgrad_is_an_image_of_its_own() -> None:
    launch = only(plan("dgrad", stride_height=2, stride_width=2, height=33))
    # 17 x 16 pixels of the first parity take 3 tiles of 128; the others have no more.
    assert launch.grid == (128 * 3 * 4, 1, 1)


def test_wgrad_splits_its_sum_where_the_weight_is_small() -> None:
    launches = plan("wgrad", H100)
    # 8 experts of 9 taps are 72 tiles, 132 SMs hold two blocks each: 3 splits.
    assert [launch.kernel for launch in launches] == [
        "tdc_conv_wgrad_bf16_128x128",
        "tdc_conv_reduce_bf16",
        "tdc_conv_sample_sums_bf16",
        "tdc_conv_expert_sums_bf16",
    ]
    weight = 8 * 128 * 9 * 128
    assert launches[0].grid == (3 * 72, 1, 1)
    assert launches[1].grid == (weight // 256, 1, 1)
    assert _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100)) == 3 * weight * 4 + 128 * 128 * 4


def test_wgrad_does_not_split_a_large_weight_nor_a_short_sum() -> None:
    for changes in ({"in_channels": 512, "out_channels": 512}, {"batch": 8, "height": 4, "width": 4}):
        kernels = [launch.kernel for launch in plan("wgrad", H100, **changes)]
        assert "tdc_conv_reduce_bf16" not in kernels
        assert _native.cuda_conv_wgrad_workspace(**arguments("wgrad", H100, **changes, dbias=0)) == 0


def test_wgrad_plans_only_what_is_asked_for() -> None:
    assert [launch.kernel for launch in plan("wgrad", dweight=0, dbias=0)] == ["tdc_conv_sample_sums_bf16"]
    assert all("sums" not in launch.kernel for launch in plan("wgrad", dbias=0, dsample_bias=0))
    assert plan("wgrad", dweight=0, dbias=0, dsample_bias=0) == []


def test_a_batch_of_nothing_needs_no_launch() -> None:
    assert plan("forward", batch=0) == plan("dgrad", batch=0) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"device": (75, 68, 65536)}, r"compute capability 7\.5; the kernels need 8\.0 or newer"),
        ({"dtype": 0}, "dtypes are bf16, fp16 and fp32 as tf32"),
        ({"height": 1, "pad_height": 0}, "the filter is larger than the padded image"),
        ({"in_channels": 0}, "a size is out of range"),
        (
            {"batch": 2**20, "height": 64},
            r"more than 2\^30 pixels: x \(1048576, 128, 64, 32\) bf16, weight \(8, 128, 12",
        ),
    ],
)
def test_what_no_kernel_takes_is_refused(changes: dict[str, Any], message: str) -> None:
    for pass_ in ("forward", "dgrad", "wgrad"):
        with pytest.raises(ValueError, match=message):
            plan(pass_, **changes)


def test_a_launch_says_its_shapes() -> None:
    shapes = only(plan("forward")).shapes
    assert shapes == ("x (128, 128, 32, 32) bf16, weight (8, 128, 128, 3, 3), stride (1, 1), padding (1, 1), 8 groups")
