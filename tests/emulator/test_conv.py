"""The CUDA convolution kernels, run in the emulator, equal one convolution per group."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tdc_fast import explain, routed_conv2d
from tests.cases import ConvCase, conv_cases
from tests.emulator.conv import (
    DTYPES,
    HALVES,
    MANY_SMS,
    ONE_SM,
    assert_accurate,
    assert_nothing_dead_is_used,
    conv_case,
    differentiable,
    emulator,
    results,
    uneven,
)
from tests.emulator.harness import SANITIZED, SCHEDULES, plain_only
from tests.ops.test_conv2d import gradients, routed

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# Cases that cross the edges of tiles, steps and stages: changes to a case, the device, kernels that must have run.
EDGES: dict[str, tuple[dict[str, Any], tuple[int, int, int], set[str]]] = {
    "several tiles of 64 each way": (
        {"in_channels": 72, "out_channels": 72, "size": (9, 8), "filter": (1, 3), "padding": (0, 1)},
        MANY_SMS,
        {"forward_{}_64x64", "dgrad_{}_64x64"},
    ),
    "several tiles of 128 each way, more steps than stages": (
        {"in_channels": 136, "out_channels": 136, "size": (12, 11), "filter": (1, 1), "padding": (0, 0)},
        ONE_SM,
        {"forward_{}_128x128", "dgrad_{}_128x128", "wgrad_{}_128x128"},
    ),
    "widths inside a tile of 128, of no multiple": (
        {
            "routing": uneven(1, 0, 2, 1, weight_index=(0, 0, 1, 1)),
            "in_channels": 72,
            "out_channels": 136,
            "in_widths": (72, 8, 37, 0),
            "out_widths": (75, 8, 131, 136),
        },
        ONE_SM,
        {"forward_{}_128x128", "dgrad_{}_128x128", "wgrad_{}_128x128"},
    ),
    "widths inside a tile of 64, of no multiple": (
        {
            "routing": uneven(1, 2, 1, weight_index=(0, 0, 0)),
            "in_channels": 40,
            "out_channels": 72,
            "in_widths": (33, 12, 1),
            "out_widths": (3, 70, 0),
        },
        MANY_SMS,
        {"forward_{}_64x64", "dgrad_{}_64x64", "wgrad_{}_64x64"},
    ),
    "small images share a tile": (
        {"routing": uneven(5, 0, 1, 7), "in_channels": 16, "size": (4, 4)},
        MANY_SMS,
        {"forward_{}_64x64"},
    ),
    "single pixels share a tile": (
        {"routing": uneven(70, 0, 30, 3), "size": (1, 1), "filter": (1, 1), "padding": (0, 0)},
        MANY_SMS,
        {"forward_{}_64x64"},
    ),
    "stride 2 in an odd image": (
        {"size": (11, 9), "filter": (5, 3), "stride": (2, 2), "padding": (2, 1), "out_widths": (16, 0, 11)},
        MANY_SMS,
        {"dgrad_{}_64x64"},
    ),
    "stride 2 past a filter of one": (
        {"size": (5, 6), "filter": (1, 1), "stride": (2, 2), "padding": (0, 0)},
        MANY_SMS,
        {"dgrad_{}_64x64"},
    ),
    "large taps": ({"size": (4, 5), "filter": (7, 7), "padding": (3, 3)}, MANY_SMS, {"wgrad_{}_64x64"}),
    "split sums over shared experts": (
        {
            "routing": uneven(3, 0, 2, 1, weight_index=(1, 0, 1, 1)),
            "size": (12, 16),
            "filter": (1, 3),
            "padding": (0, 1),
            "in_widths": (24, 24, 9, 8),
        },
        MANY_SMS,
        {"wgrad_{}_64x64", "reduce_{}"},
    ),
    "any channels": ({"in_channels": 35, "out_channels": 67}, ONE_SM, {"forward_{}_64x64_any", "wgrad_{}_64x64_any"}),
    "few outputs": ({"in_channels": 40, "out_channels": 6}, ONE_SM, {"forward_{}_64x64", "dgrad_{}_64x64_any"}),
    "two inputs, the seam inside a tile of 64 and a step": (
        {"in_channels": 104, "x2_channels": 64, "in_widths": (104, 8, 77), "size": (5, 6)},
        MANY_SMS,
        {"forward_{}_64x64", "dgrad_{}_64x64", "wgrad_{}_64x64"},
    ),
    "two inputs, tiles of 128": (
        {
            "in_channels": 208,
            "out_channels": 136,
            "x2_channels": 72,
            "filter": (1, 1),
            "padding": (0, 0),
            "in_widths": (208, 40, 170),
            "out_widths": (136, 72, 128),
        },
        ONE_SM,
        {"forward_{}_128x128", "dgrad_{}_128x128", "wgrad_{}_128x128"},
    ),
    "two inputs of any channels": (
        {"in_channels": 35, "x2_channels": 12, "in_widths": (35, 0, 25)},
        MANY_SMS,
        {"forward_{}_64x64_any", "dgrad_{}_64x64_any", "wgrad_{}_64x64_any"},
    ),
    "upsampled": ({"upsample": 2}, MANY_SMS, {"forward_{}_64x64", "wgrad_{}_64x64"}),
}
# fp16 differs from bf16 in products and rounding, not in layout.
edge_dtypes = pytest.mark.parametrize("dtype", ["bf16"] if SANITIZED else ["bf16", "tf32"])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_case_is_as_accurate_as_torch(dtype: str, fused: bool) -> None:
    @given(case=conv_cases(fused=fused))
    @settings(max_examples=5 if SANITIZED else 8 if fused else 16, deadline=None, derandomize=True)
    def check(case: ConvCase) -> None:
        assert_accurate(case, DTYPES[dtype])

    with emulator():
        check()


@edge_dtypes
@pytest.mark.parametrize("edge", EDGES)
def test_tile_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, facts, kernels = EDGES[edge]
    with emulator(facts=facts) as launcher:
        assert_accurate(conv_case(**changes), DTYPES[dtype])
    stored = "fp32" if dtype == "tf32" else dtype
    expected = {f"tdc_conv_{k.format(stored if k.startswith('reduce') else dtype)}" for k in kernels}
    assert expected <= set(launcher.launched)


@edge_dtypes
@pytest.mark.parametrize(
    ("channels", "fused"),
    [((40, 72), {}), ((37, 71), {}), ((40, 72), {"x2_channels": 24, "upsample": 2, "size": (3, 4)})],
    ids=["whole chunks", "any channels", "fused"],
)
def test_nothing_dead_is_used(channels: tuple[int, int], fused: dict[str, Any], dtype: str) -> None:
    case = conv_case(
        routing=uneven(1, 2),
        in_channels=channels[0],
        out_channels=channels[1],
        in_widths=(33, 8),
        out_widths=(3, 70),
        **fused,
    )
    with emulator():
        assert_nothing_dead_is_used(case, DTYPES[dtype])


@plain_only
@edge_dtypes
def test_results_do_not_depend_on_which_thread_goes_first(dtype: str) -> None:
    changes, facts, _ = EDGES["split sums over shared experts"]
    with emulator(facts=facts) as launcher:
        first = results(conv_case(**changes), DTYPES[dtype])
        for schedule in SCHEDULES[1:]:
            launcher.schedule = schedule
            again = results(conv_case(**changes), DTYPES[dtype])
            for name, value in first.items():
                assert torch.equal(again[name], value), name


@pytest.mark.parametrize("edge", ["split sums over shared experts", "widths inside a tile of 64, of no multiple"])
def test_a_bias_gradient_comes_out_of_the_launches_of_the_weights(edge: str) -> None:
    """Also of groups without a live input channel; alone it has launches of its own."""
    changes, facts, _ = EDGES[edge]
    case = conv_case(**changes | {"extras": ("bias",), "in_widths": (0, *changes["in_widths"][1:])})
    with emulator(facts=facts) as launcher:
        for wanted in (("weight", "bias"), ("bias",)):
            launcher.launched.clear()
            assert_accurate(case, torch.bfloat16, wanted)
            assert any("sums" in name for name in launcher.launched) == (wanted == ("bias",))


@plain_only
def test_two_inputs_are_read_where_they_are_and_upsampled_as_they_are_read() -> None:
    case = conv_case(x2_channels=8, upsample=2)
    t = case.tensors(torch.bfloat16)
    with emulator():
        said = explain(routed_conv2d, t["x"], t["weight"], None, case.routing.plan(), **case.settings(), x2=t["x2"])
    assert said.reasons["cuda"] is None and "cuda" not in said.copies


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "changes",
    [
        {"in_widths": (24, 0, 9), "out_widths": (16, 3, 10)},
        {"in_channels": 37, "out_channels": 71, "filter": (1, 5), "padding": (0, 1)},
        {"in_channels": 136, "out_channels": 40, "size": (2, 3), "padding": (0, 2)},
    ],
    ids=["widths", "any channels", "several tiles"],
)
def test_the_gradient_of_an_upsampled_image_merges_taps(changes: dict[str, Any], dtype: str) -> None:
    case = conv_case(upsample=2, **changes)
    with emulator() as launcher:
        assert_accurate(case, DTYPES[dtype], ("x",))
    assert [kernel.split("_")[2] for kernel in launcher.launched] == ["forward", "merge", "forward"]


@pytest.mark.parametrize(
    ("dtype", "changes"), [("tf32", {}), ("bf16", {"padding": (1, 3)}), ("bf16", {"x2_channels": 8})]
)
def test_where_taps_are_not_merged_all_products_are_computed(dtype: str, changes: dict[str, Any]) -> None:
    """tf32 would round the sums; more padding than filter; two gradients."""
    with emulator() as launcher:
        assert_accurate(conv_case(upsample=2, **changes), DTYPES[dtype], ("x",))
    assert [kernel.split("_")[2] for kernel in launcher.launched] == ["forward", "dgrad"]


# Side of a tile, rows that a warp takes, a device that makes the planner choose it in every pass over 128 channels.
TILES = {"64x64": (64, 32, (80, 1, 49152)), "128x128": (128, 64, ONE_SM)}
WARP_COLUMNS = STEP = 32


def up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def expected_multiply_adds(case: ConvCase, side: int, warp_rows: int) -> dict[str, int]:
    """Of each pass: rows, columns and depth count in whole warps and steps, dead tiles not at all.

    One sample per group; in dgrad with stride 2 every parity of the image has as many pixels as y, and taps of its own.
    """
    taps, pixels = case.filter[0] * case.filter[1], case.out_size[0] * case.out_size[1]
    ins, outs = case.in_widths or (case.in_channels,) * 2, case.out_widths or (case.out_channels,) * 2
    segments = [(expert, stop - start, ins[g], outs[g]) for g, expert, start, stop in case.routing.segments()]
    expected = dict.fromkeys(("forward", "dgrad", "wgrad"), 0)
    for _, samples, live_in, live_out in segments:
        rows = up(samples * pixels, warp_rows) * taps
        expected["forward"] += rows * up(live_out, WARP_COLUMNS) * up(live_in, STEP)
        expected["dgrad"] += rows * up(live_in, WARP_COLUMNS) * up(live_out, STEP)
    for expert, first_out, first_in in product(
        range(case.routing.num_experts), range(0, case.out_channels, side), range(0, case.in_channels, side)
    ):
        summed = [  # steps of a tile, and the live channels
            (up(samples * pixels, STEP), min(live_in - first_in, side), min(live_out - first_out, side))
            for of, samples, live_in, live_out in segments
            if of == expert and live_in > first_in and live_out > first_out
        ]
        if summed:
            depths, widest_in, widest_out = zip(*summed, strict=True)
            area = up(max(widest_out), warp_rows) * up(max(widest_in), WARP_COLUMNS)
            expected["wgrad"] += taps * sum(depths) * area
    return expected


@plain_only
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="all"),
        pytest.param({"in_widths": (64, 64), "out_widths": (64, 64)}, id="half"),
        pytest.param({"in_widths": (32, 96), "out_widths": (96, 33)}, id="parts of tiles"),
        pytest.param({"in_widths": (128, 0), "out_widths": (128, 128)}, id="no input"),
        pytest.param({"in_widths": (128, 128), "out_widths": (0, 64)}, id="no output"),
        pytest.param(
            {"in_widths": (128, 40), "out_widths": (70, 60), "routing": uneven(1, 1, weight_index=(0, 0))},
            id="one expert at two widths",
        ),
        pytest.param(
            {"in_widths": (64, 128), "out_widths": (128, 64), "stride": (2, 2), "size": (10, 12)}, id="stride 2"
        ),
    ],
)
def test_only_live_channels_and_taps_that_reach_are_multiplied(changes: dict[str, Any], tile: str, dtype: str) -> None:
    side, warp_rows, facts = TILES[tile]
    settings = {"routing": uneven(1, 1), "in_channels": 128, "out_channels": 128, "size": (5, 6), "extras": ()}
    case = conv_case(**(settings | changes))
    done = {}
    with emulator(facts=facts) as launcher:
        for wanted, backward in (("x", "dgrad"), ("weight", "wgrad")):
            tensors = differentiable(case.tensors(DTYPES[dtype]), (wanted,))
            before = launcher.multiply_adds()
            y = routed(case, tensors, backend="cuda")
            between = launcher.multiply_adds()
            torch.autograd.grad(y, tensors[wanted], torch.ones_like(y))
            done |= {"forward": between - before, backward: launcher.multiply_adds() - between}
    assert set(launcher.launched) == {f"tdc_conv_{name}_{dtype}_{tile}" for name in done}
    assert done == expected_multiply_adds(case, side, warp_rows)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_added_to_the_product_is_rounded_with_it_once(dtype: str) -> None:
    """Small integers and quarters: every sum is exact in fp32, so that only the rounding of the result is left."""
    case = conv_case(in_widths=(24, 8, 13), out_widths=(16, 8, 11))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randint(-8, 9, t.shape, generator=generator) * (1 if name in ("x", "weight") else 0.25)).to(t)
        for name, t in case.tensors(DTYPES[dtype]).items()
    }
    with emulator(), torch.no_grad():
        ours = routed(case, tensors, backend="cuda")
    assert torch.equal(ours, routed(case, tensors, backend="reference"))


@pytest.mark.parametrize("channels", [8, 5])
def test_fp32_is_rounded_to_the_nearest_tf32(channels: int) -> None:
    """A tf32 number has 10 bits after the point: 1 + 2^-11 is a tie, which goes up; 1 + 2^-12 goes down."""
    case = conv_case(in_channels=channels, out_channels=channels, filter=(1, 1), padding=(0, 0), extras=())
    high, low = 1 + 2.0**-11, 1 + 2.0**-12
    tensors = {name: torch.full_like(t, high).requires_grad_() for name, t in case.tensors(torch.float32).items()}
    with torch.no_grad():
        tensors["weight"].fill_(0)
        for i in range(channels):
            tensors["weight"][:, i, i] = low
    with emulator():
        ours = gradients(routed(case, tensors, backend="cuda"), tensors, case)
        y = routed(case, tensors, backend="cuda")
        dx, _ = torch.autograd.grad(y, list(tensors.values()), torch.full_like(y, high))
    assert ours["y"].eq(1 + 2.0**-10).all()
    assert dx.eq(1 + 2.0**-10).all()
