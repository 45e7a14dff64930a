"""Groups of any sizes leave the blocks of Hopper's convolutions about equal work, in every layer of both UNets.

The kernels' schedules run in the emulator with the planners' parameters (hopper_schedules_kernels.cuh) and say what
each block takes, in clocks of a model: products at the tensor core's rate, and for the rest of a tile what the planners
count (cuda/conv/hopper_model.h).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from bench.gpu.conv import MIXED
from bench.gpu.layers import UNETS, all_layers, unet_layers
from tdc_fast import _native
from tests.emulator.harness import AT_RUNTIME, EmulatedLibrary, emulated
from tests.emulator.harness import plain_only as pytestmark  # noqa: F401  the name is what pytest looks for
from tests.native.test_conv_hopper_model import START
from tests.native.test_conv_launch import H100, arguments

REST = 2_700  # clocks of a part of a unit of wgrad, besides its products
CUTS = 34_000  # clocks that cuts anywhere in the line of wgrad cost more than equal parts of units
MAX_RATIO = 1.15  # times what even groups take
GROUPS = 8


@dataclass(frozen=True)
class Layer:
    in_channels: int
    out_channels: int
    height: int
    width: int
    filter: int
    stride: int
    upsample: int = 1

    def sizes(self) -> dict[str, int]:
        across = 1 if self.width == 1 else self.filter
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "height": self.height,
            "width": self.width,
            "filter_height": self.filter,
            "filter_width": across,
            "stride_height": self.stride,
            "stride_width": self.stride,
            "pad_height": self.filter // 2,
            "pad_width": across // 2,
            "upsample": self.upsample,
        }


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    """The layers of both UNets; two blocks of each level have every one of them."""
    found, _ = all_layers({n: unet_layers(n, {**flags, "num_res_blocks": 2}, 64) for n, flags in UNETS.items()})
    made = {Layer(c.in_channels, c.out_channels, c.height, c.width, c.filter, c.stride) for c in found}
    sides = ((256, 4), (256, 8), (256, 16), (512, 8), (384, 16), (256, 32))
    made |= {Layer(channels, channels, side, side, 3, 1, upsample=2) for channels, side in sides}
    assert len(made) > 60
    return sorted(made, key=str)


@pytest.fixture(scope="module")
def library() -> EmulatedLibrary:
    return emulated("hopper_schedules", AT_RUNTIME)


def clocks(
    library: EmulatedLibrary,
    layer: Layer,
    pass_: str,
    samples: list[int],
    blocks: int = 0,
    width: float | Sequence[float] = 1.0,
    rest: int = REST,
) -> list[int]:
    """What each block of a launch takes, or of so many blocks; nothing where another form serves.

    width: the live share of the channels on both sides, of all groups or of each.
    rest: clocks of a part of a unit of wgrad besides its patches; 0: products alone, of tiles, too.
    """
    offsets = torch.tensor([0, *torch.tensor(samples).cumsum(0).tolist()], dtype=torch.int32)
    none = {"weight_index": 0, "in_widths": 0, "out_widths": 0, "sample_bias": 0, "residual": 0, "dsample_bias": 0}
    given = arguments(pass_, H100, batch=sum(samples), num_groups=len(samples), num_experts=len(samples))
    given |= {name: value for name, value in none.items() if name in given} | layer.sizes()
    given |= {"offsets": offsets.data_ptr(), "workspace": 1 << 20}
    live = torch.tensor([width] * len(samples) if isinstance(width, float) else width)
    widths = torch.tensor([[layer.in_channels], [layer.out_channels]]).mul(live).int()
    if live.min() < 1:
        given |= {"in_widths": widths[0].data_ptr(), "out_widths": widths[1].data_ptr()}
    launches = getattr(_native, f"cuda_launches_conv_{pass_}")(**given, hopper=True)
    for launch in launches:
        if f"schedule_{launch.kernel}" not in library.kernels:
            continue
        taken = torch.zeros(blocks or launch.grid[0], dtype=torch.int64)
        params = launch.params + bytes(-len(launch.params) % 64)
        params += struct.pack("=Q2i48x", taken.data_ptr(), len(taken), rest)
        library.launch(f"schedule_{launch.kernel}", (1, 1, 1), 64, 96 * len(samples), params, 0)
        return taken.tolist()
    assert all("hopper" not in launch.kernel for launch in launches)
    return []


def shares(batch: int, groups: int) -> list[int]:
    return [batch // groups + (i < batch % groups) for i in range(groups)]


def half_in_one(batch: int) -> list[int]:
    return [batch // 2, *shares(batch - batch // 2, GROUPS - 1)]


def ratios(library: EmulatedLibrary, layers: list[Layer], pass_: str, batch: int) -> dict[Layer, float]:
    """What half of the batch in one group costs, in times of even groups."""
    found = {}
    for layer in layers:
        even = clocks(library, layer, pass_, shares(batch, GROUPS))
        if even:
            uneven = clocks(library, layer, pass_, half_in_one(batch))
            found[layer] = (START + max(uneven)) / (START + max(even))
    return found


@pytest.mark.parametrize("batch", [64, 128])
def test_wgrad_of_uneven_groups_costs_little_more_than_of_even_ones(
    library: EmulatedLibrary, layers: list[Layer], batch: int
) -> None:
    found = ratios(library, layers, "wgrad", batch)
    assert len(found) > 60 and max(found.values()) <= MAX_RATIO, max(found.items(), key=lambda item: item[1])
    if batch == 64:
        with library.planted("HOPPER_UNITS_END_AT_ONCE"):
            assert max(ratios(library, layers, "wgrad", batch).values()) > MAX_RATIO


@pytest.mark.parametrize("pass_, batch", [("forward", 64), ("dgrad", 64), ("forward", 128), ("dgrad", 128)])
def test_tiles_of_uneven_groups_cost_little_more_but_on_images_of_16_pixels(
    library: EmulatedLibrary, layers: list[Layer], pass_: str, batch: int
) -> None:
    """On 16 pixels what is left of a group are 1 to 6 of the 8 samples of a tile, which cost half of it or all."""
    found = ratios(library, layers, pass_, batch)
    dear = {layer: ratio for layer, ratio in found.items() if ratio > MAX_RATIO}
    assert len(found) > 60 and len(dear) <= 4, dear
    assert all(layer.height * layer.width == 16 for layer in dear) and max(found.values()) <= 1.29, dear


@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_blocks_share_all_tiles(library: EmulatedLibrary, layers: list[Layer], pass_: str) -> None:
    for layer in layers:
        for samples in (half_in_one(64), [3, 0, 17, 1, 1, 40, 2, 0]):
            taken = clocks(library, layer, pass_, samples)
            assert sum(taken) == sum(clocks(library, layer, pass_, samples, blocks=4096)), (layer, samples)


def test_what_is_left_of_groups_goes_to_blocks_without_a_whole_tile(library: EmulatedLibrary) -> None:
    """128 samples of 8x8: 120 whole tiles, and of seven groups one or two samples, four tiles each, for 132 blocks."""
    layer = Layer(512, 512, 8, 8, 3, 1)
    assert max(ratios(library, [layer], "dgrad", 128).values()) <= 1.05
    with library.planted("HOPPER_REST_NOT_SHARED"):
        assert max(ratios(library, [layer], "dgrad", 128).values()) > MAX_RATIO


def most_over_mean(library: EmulatedLibrary, layers: list[Layer], width: float | Sequence[float]) -> dict[Layer, float]:
    """Clocks of wgrad that the busiest block takes more than 1.1 times the mean of all, with even groups."""
    found = {}
    for layer in layers:
        if taken := clocks(library, layer, "wgrad", shares(128, GROUPS), width=width):
            found[layer] = max(taken) - 1.1 * sum(taken) / H100[1]
    assert len(found) > 60
    return found


@pytest.mark.parametrize("widths", [(0.75,), MIXED, (1.0, 0.5)])
def test_wgrad_of_any_widths_leaves_blocks_equal_work(
    library: EmulatedLibrary, layers: list[Layer], widths: Sequence[float]
) -> None:
    """Of units of few live channels a part has more patches. Equal parts of equal units may leave SMs idle."""
    found = most_over_mean(library, layers, given := tuple(widths) * (GROUPS // len(widths)))
    assert max(found.values()) <= CUTS + 3 * REST, max(found.items(), key=lambda item: item[1])
    with library.planted("HOPPER_EQUAL_PATCHES"):
        assert max(most_over_mean(library, layers, given).values()) > 3 * CUTS


def test_wgrad_of_equal_units_leaves_blocks_idle_only_where_cuts_cost_more(
    library: EmulatedLibrary, layers: list[Layer]
) -> None:
    found = most_over_mean(library, layers, 1.0)
    assert max(found.values()) <= CUTS + 3 * REST, max(found.items(), key=lambda item: item[1])
    with library.planted("HOPPER_BLOCKS_STAY_IDLE"):
        assert max(most_over_mean(library, layers, 1.0).values()) > 10 * CUTS


@pytest.mark.parametrize("layer, batch, working", [
    (Layer(128, 128, 32, 32, 3, 1), 128, 120),
    (Layer(256, 256, 16, 16, 3, 1), 128, 96),
    (Layer(256, 256, 8, 8, 3, 1), 256, 96),
    (Layer(256, 256, 64, 64, 3, 1), 64, 132),
    (Layer(128, 192, 16, 16, 3, 1), 128, 132),
])  # fmt: skip
def test_equal_units_are_cut_into_equal_parts_where_a_prototype_was_faster_so(
    library: EmulatedLibrary, layer: Layer, batch: int, working: int
) -> None:
    """The first three were measured on an H200: 71, 76 and 48 us against 78, 82 and 59 on all SMs.

    Units of the last one are not equal: of its 192 output channels some have 128 and some 64.
    """
    taken = clocks(library, layer, "wgrad", shares(batch, GROUPS))
    assert sum(clocks > 0 for clocks in taken) == working


def shares_of_products(library: EmulatedLibrary, layers: list[Layer], pass_: str, width: float) -> dict[Layer, float]:
    """The share of the products that is left at a width, of layers that the form serves."""
    found = {}
    for layer in layers:
        whole, part = (sum(clocks(library, layer, pass_, shares(128, GROUPS), width=w, rest=0)) for w in (1.0, width))
        if whole:
            found[layer] = part / whole
    assert len(found) > 30
    return found


@pytest.mark.parametrize("pass_", ["forward", "dgrad"])
def test_three_quarters_of_the_channels_take_little_more_than_nine_sixteenths_of_the_products(
    library: EmulatedLibrary, layers: list[Layer], pass_: str
) -> None:
    """Of 384 channels 288 are left, and in tiles of 128 the 32 in the last one count as 64; those of 192 suit them."""
    for layer, share in shares_of_products(library, layers, pass_, 0.75).items():
        results = layer.out_channels if pass_ == "forward" else layer.in_channels
        in_wide_tiles = layer.filter == 3 and layer.stride == layer.upsample == 1 and layer.height in (16, 32)
        assert 0.5625 <= share <= (0.62 if results % 384 or in_wide_tiles else 0.625), layer


@pytest.mark.parametrize("width, least, most, of_128", [(0.75, 0.5625, 0.834, 0.75), (0.5, 0.25, 0.25, 0.25)])
def test_products_of_wgrad_fall_with_the_widths(
    library: EmulatedLibrary, layers: list[Layer], width: float, least: float, most: float, of_128: float
) -> None:
    """Output channels count in multiples of 64, as a warpgroup has them; so do inputs in units of 256 and 384."""
    found = shares_of_products(library, layers, "wgrad", width)
    assert least <= min(found.values()) and max(found.values()) <= most
    assert all(found[layer] == of_128 for layer in found if layer.in_channels == layer.out_channels == 128)


def test_every_other_turn_goes_backwards(library: EmulatedLibrary) -> None:
    """With stride 2 the planes of dx, which differ in taps, come one after the other."""
    layer = Layer(256, 256, 8, 8, 3, 2)
    assert max(ratios(library, [layer], "dgrad", 128).values()) <= 1.05
    with library.planted("HOPPER_TURNS_FORWARD"):
        assert max(ratios(library, [layer], "dgrad", 128).values()) > MAX_RATIO
