"""The Hopper form of the convolution, run in the emulator, equals one convolution per group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast.kernels.problems import ConvTensors
from tdc_fast.ops import hopper as hopper_backend
from tdc_fast.ops.checks import conv_problem
from tests.cases import ConvCase
from tests.emulator.conv import (
    DTYPES,
    MASK_PLANTS,
    RING_PLANTS,
    STORE_PLANTS,
    TILES_THAT_ARE_OVER_AT_ONCE,
    assert_a_mask_is_missed,
    assert_accurate,
    assert_messages_are_waited_for,
    conv_case,
    emulator,
    hopper_settings,
    results,
    uneven,
)
from tests.emulator.harness import AT_RUNTIME, SANITIZED, SCHEDULES, EmulatorError, EmulatorLauncher, plain_only
from tests.generated import examples

pytestmark = pytest.mark.usefixtures("nan_filled_memory")
# The two passes have one source; sanitizers look at addresses, in which they do not differ.
FAMILIES = ("conv_hopper_forward",) if SANITIZED else ("conv_hopper_forward", "conv_hopper_dgrad")
GRADIENTS = () if SANITIZED else ("x", "x2")


@contextmanager
def hopper(multiprocessors: int = 3, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    """A Hopper GPU with few SMs, so that a block computes several tiles."""
    builds = dict.fromkeys(FAMILIES, AT_RUNTIME)
    with emulator((90, multiprocessors, 232448), FAMILIES, **builds) as launcher:
        launcher.schedule = schedule
        yield launcher


def case_of(**changes: Any) -> ConvCase:
    return conv_case(**{"in_channels": 64, "out_channels": 64, "size": (16, 16)} | changes)


# Changes to a case, and the tiles that forward and dgrad must take.
EDGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "images of two tiles, several blocks of channels": (
        {
            "routing": uneven(0, 1),
            "size": (32, 16),
            "in_channels": 72,
            "out_channels": 256,
            "out_widths": (256, 250),
        },
        "16x16x128",
        "16x16x128",
    ),
    "large tiles clipped on both sides": ({"routing": uneven(1, 1), "size": (9, 11)}, "16x16x128", "16x16x128"),
    "small tiles clipped on one side": (
        {"routing": uneven(5, 0, 1), "size": (9, 8), "out_widths": (57, 64, 64)},
        "8x8x2x64",
        "8x8x2x64",
    ),
    "small tiles of one sample": (
        {
            "routing": uneven(1, 0, 1, 1, weight_index=(0, 1, 1, 2)),
            "size": (15, 8),
            "in_channels": 72,
            "x2_channels": 8,
            "in_widths": (72, 8, 37, 66),
            "out_widths": (64, 64, 41, 3),
        },
        "16x8x64",
        "16x8x64",
    ),
    "wide tiles": ({"routing": uneven(1, 1, 1), "out_channels": 192}, "16x16x192", "16x16x128"),
    "tall tiles of 64 channels": (
        {"routing": uneven(1, 1), "size": (25, 9), "in_widths": (64, 24), "out_widths": (64, 37)},
        "32x16x64",
        "32x16x64",
    ),
    "small images share a tile": (
        {"routing": uneven(5, 0, 1, 2), "size": (8, 8), "out_channels": 128},
        "8x8x2x64",
        "8x8x2x64",
    ),
    "widths of no multiple": (
        {
            "routing": uneven(1, 1, 1, 1, 0, weight_index=(0, 0, 1, 1, 1)),
            "size": (9, 9),
            "in_channels": 152,
            "out_channels": 144,
            "in_widths": (37, 152, 0, 100, 8),
            "out_widths": (90, 3, 64, 129, 0),
        },
        "16x16x192",
        "16x8x64",
    ),
    "widths of no multiple in small images": (
        {
            "routing": uneven(2, 7, 3),
            "size": (8, 8),
            "in_channels": 80,
            "out_channels": 128,
            "in_widths": (65, 16, 47),
            "out_widths": (77, 128, 64),
        },
        "8x8x4x128",
        "8x8x4x128",
    ),
    "three quarters of a tile's columns, two inputs": (
        {
            "routing": uneven(1, 1),
            "size": (9, 11),
            "in_channels": 168,
            "x2_channels": 96,
            "out_channels": 128,
            "in_widths": (168, 66),
            "out_widths": (96, 97),
        },
        "16x16x128",
        "16x16x128",
    ),
    "two inputs whose seam is no multiple of 64": (
        {"routing": uneven(1), "size": (9, 11), "in_channels": 200, "x2_channels": 112, "out_channels": 72},
        "16x8x64",
        "16x16x128",
    ),
    "two inputs with widths on both sides of the seam": (
        {
            "routing": uneven(2, 1, 1, 1),
            "size": (8, 8),
            "in_channels": 152,
            "x2_channels": 80,
            "in_widths": (37, 72, 77, 152),
            "out_widths": (64, 17, 64, 0),
        },
        "8x8x2x64",
        "8x8x4x128",
    ),
    "more groups than lanes of a warp": (
        {
            "routing": uneven(*[0] * 35, 1, *[0] * 10, 2, 1),
            "size": (8, 8),
            "in_widths": (64, 48, 8) * 16,
            "extras": ("bias",),
        },
        "8x8x2x64",
        "8x8x2x64",
    ),
    "nothing is added": ({"routing": uneven(2), "size": (8, 9), "extras": ()}, "8x8x2x64", "8x8x2x64"),
}
# fp16 differs from bf16 in products and rounding, not in layout.
IN_FP16 = ("two inputs with widths on both sides of the seam", "three quarters of a tile's columns, two inputs")
if SANITIZED:
    EDGE_CASES = [(edge, "bf16") for edge in ("large tiles clipped on both sides", IN_FP16[0])]
else:
    EDGE_CASES = [(edge, "bf16") for edge in EDGES] + [(edge, "fp16") for edge in IN_FP16]


@pytest.mark.parametrize("edge, dtype", EDGE_CASES)
def test_tile_edges_are_as_accurate_as_torch(edge: str, dtype: str) -> None:
    changes, forward, dgrad = EDGES[edge]
    with hopper() as launcher:
        assert_accurate(case_of(**changes), DTYPES[dtype], GRADIENTS, backend="hopper")
    expected = [f"tdc_conv_hopper_forward_{dtype}_{forward}", f"tdc_conv_hopper_dgrad_{dtype}_{dgrad}"]
    assert launcher.launched == expected[: len(FAMILIES)]


@st.composite
def cases(draw: st.DrawFn) -> ConvCase:
    """One input or two, of any sizes that the form serves."""
    settings = draw(hopper_settings(of_group=2, of_batch=3, eights=(8, 18)))
    size = draw(st.integers(9, 18)), draw(st.integers(8, 12))  # 8x8 may take the form of rows
    return case_of(size=size, **settings)


def test_any_case_is_as_accurate_as_torch() -> None:
    @given(case=cases(), schedule=st.sampled_from(SCHEDULES))
    @examples(1 if SANITIZED else 3)
    def check(case: ConvCase, schedule: int) -> None:
        with hopper(schedule=schedule) as launcher:
            assert_accurate(case, torch.bfloat16, GRADIENTS, backend="hopper")
        assert all("hopper" in kernel for kernel in launcher.launched)

    check()


@plain_only
def test_any_widths_of_tall_tiles_are_as_accurate_as_torch() -> None:
    @given(width=st.tuples(*[st.integers(1, 64)] * 2), extras=st.sampled_from([("bias", "sample_bias"), ("residual",)]))
    @examples(3)
    def check(width: tuple[int, int], extras: tuple[str, ...]) -> None:
        own = {"in_widths": width[:1], "out_widths": width[1:], "extras": extras}
        with hopper(1) as launcher:
            assert_accurate(case_of(routing=uneven(1), size=(25, 9), **own), torch.bfloat16, GRADIENTS, "hopper")
        assert all(kernel.endswith("32x16x64") for kernel in launcher.launched)

    check()


# More steps than stages, two tiles for one block, two inputs, a ragged depth, a residual.
ALL_PARTS = case_of(routing=uneven(1, 1), in_channels=72, x2_channels=8, out_channels=72)


@plain_only
def test_results_do_not_depend_on_which_thread_goes_first() -> None:
    found = []
    for schedule in (1, 3):
        with hopper(1, schedule):
            found.append(results(ALL_PARTS, torch.bfloat16, ("x", "x2"), backend="hopper"))
    first, other = found
    assert set(first) == {"y", "dx", "dx2"}
    for name, value in first.items():
        assert torch.equal(other[name], value), name


@plain_only
def test_what_is_not_live_is_not_multiplied() -> None:
    """Depth counts in steps of 16, columns in 64, patches one by one: a tile of 2 samples has one per warpgroup."""
    case = case_of(
        routing=uneven(1, 1, 3),
        size=(8, 8),
        in_channels=128,
        out_channels=256,
        in_widths=(128, 33, 64),
        out_widths=(256, 64, 129),
        extras=(),
    )
    columns = {0: 256, 1: 64, 2: 128 + 64}  # of each group
    depths, patches = {0: 128, 1: 48, 2: 64}, {0: 1, 1: 1, 2: 3}
    with hopper() as launcher, torch.no_grad():
        before = launcher.multiply_adds()
        results(case, torch.bfloat16, (), backend="hopper")
        done = launcher.multiply_adds() - before
    assert done == sum(9 * 64 * patches[g] * depths[g] * columns[g] for g in range(3))


@plain_only
def test_three_quarters_of_the_channels_take_nine_sixteenths_of_the_products() -> None:
    widths = {"in_widths": (96,), "out_widths": (96,)}
    case = case_of(routing=uneven(1), size=(9, 9), in_channels=128, out_channels=128, extras=(), **widths)
    with hopper(1) as launcher:
        before = launcher.multiply_adds()
        results(case, torch.bfloat16, ("x",), backend="hopper")
        done = launcher.multiply_adds() - before
    assert all(kernel.endswith("16x16x128") for kernel in launcher.launched)
    assert done == 2 * 9 * 256 * 96 * 96


@plain_only
def test_tall_tiles_multiply_half_of_their_columns_or_three_quarters() -> None:
    case = case_of(routing=uneven(1, 1, 1), size=(25, 9), in_widths=(16,) * 3, out_widths=(32, 33, 49), extras=())
    with hopper(1) as launcher:
        before = launcher.multiply_adds()
        results(case, torch.bfloat16, (), backend="hopper")
        done = launcher.multiply_adds() - before
    assert launcher.launched == ["tdc_conv_hopper_forward_bf16_32x16x64"]
    assert done == 9 * 512 * 16 * (32 + 48 + 64)


@plain_only
def test_blocks_get_equal_work_whatever_the_widths_and_sizes_of_groups() -> None:
    """The deepest tiles come first, so that a block that gets one of them gets fewer of the others."""
    case = case_of(
        routing=uneven(1, 1, 1, 1, 1, 1),
        in_channels=128,
        in_widths=(128, 16, 64, 16, 64, 128),
        size=(16, 9),
        extras=(),
    )
    with hopper(2) as launcher, torch.no_grad():
        before = launcher.multiply_adds()
        results(case, torch.bfloat16, (), backend="hopper")
        mean = (launcher.multiply_adds() - before) / 2
        assert launcher.busiest_block() <= 1.1 * mean


@plain_only
def test_a_block_gets_more_tiles_than_there_are_messages() -> None:
    case = case_of(size=(8, 8), **TILES_THAT_ARE_OVER_AT_ONCE)
    with hopper(1, 3) as launcher:
        assert_messages_are_waited_for(launcher, case)


PLANTS = {
    **RING_PLANTS,
    **MASK_PLANTS,
    **STORE_PLANTS,
    "HOPPER_WRONG_PREFETCH": "the block ends without the load of 2 boxes that it prefetched",
}


@plain_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_reported(plant: str) -> None:
    residual = {"extras": ("bias",)} if plant == "HOPPER_NO_STORE_WAIT" else {}
    wanted = ("x",) if plant in MASK_PLANTS else ()  # only dgrad masks
    case = case_of(routing=uneven(1, 1), in_channels=72, out_channels=72, **residual)
    with hopper(1, 3) as launcher, launcher.planted(plant), pytest.raises(EmulatorError, match=PLANTS[plant]):
        results(case, torch.bfloat16, wanted, backend="hopper")


@plain_only
@pytest.mark.parametrize("wanted", [(), ("x",)], ids=["forward", "dgrad"])
@pytest.mark.parametrize("plant", ["HOPPER_WRONG_TAP", "HOPPER_WRONG_LINE"])
def test_a_planted_bug_spoils_the_result(plant: str, wanted: tuple[str, ...]) -> None:
    case = case_of(routing=uneven(1), size=(8, 8))
    with hopper() as launcher, launcher.planted(plant), pytest.raises(AssertionError):
        assert_accurate(case, torch.bfloat16, wanted, backend="hopper")


@plain_only
@pytest.mark.parametrize("wanted", [(), ("x",)], ids=["forward", "dgrad"])
def test_sums_of_another_tile_are_not_those_of_one_without_channels(wanted: tuple[str, ...]) -> None:
    widths = {"out_widths" if wanted else "in_widths": (64, 0)}
    case = case_of(routing=uneven(1, 1), size=(8, 8), extras=("bias",), **widths)
    with hopper(1) as launcher:
        assert_accurate(case, torch.bfloat16, wanted, backend="hopper")
        with launcher.planted("HOPPER_OLD_SUMS"), pytest.raises(AssertionError):
            assert_accurate(case, torch.bfloat16, wanted, backend="hopper")


@plain_only
@pytest.mark.parametrize("wanted", [(), ("x",)], ids=["forward", "dgrad"])
@pytest.mark.parametrize(
    "channels, live, size, tile",
    [(128, 97, (9, 9), "16x16x128"), (64, 33, (25, 9), "32x16x64")],
)
def test_columns_for_one_channel_fewer_spoil_the_result(
    channels: int, live: int, size: tuple[int, int], tile: str, wanted: tuple[str, ...]
) -> None:
    widths = {"in_widths": (live,), "out_widths": (64,)} if wanted else {"in_widths": (64,), "out_widths": (live,)}
    case = case_of(routing=uneven(1), size=size, in_channels=channels, out_channels=channels, extras=(), **widths)
    with hopper(1) as launcher:
        assert_accurate(case, torch.bfloat16, wanted, backend="hopper")
        with launcher.planted("HOPPER_NARROW_COLUMNS"), pytest.raises(AssertionError):
            assert_accurate(case, torch.bfloat16, wanted, backend="hopper")
    assert all(kernel.endswith(tile) for kernel in launcher.launched)


@plain_only
@pytest.mark.parametrize("plant, error", [("HOPPER_ONE_PATCH", AssertionError), ("HOPPER_SHARED_TWICE", EmulatorError)])
def test_a_planted_bug_in_what_is_left_of_groups_is_found(plant: str, error: type[Exception]) -> None:
    """Five whole tiles of four samples and six with one or two, for three blocks."""
    case = case_of(routing=uneven(21, 1, 1, 1, 2, 1), size=(8, 8), out_channels=128)
    with hopper() as launcher, launcher.planted(plant), pytest.raises(error):
        assert_accurate(case, torch.bfloat16, (), backend="hopper")


@plain_only
def test_values_of_a_gradient_past_its_width_spoil_the_result_without_the_mask() -> None:
    with hopper(1) as launcher:
        assert_a_mask_is_missed(launcher, case_of(routing=uneven(1, 1), size=(8, 8), out_widths=(37, 64), extras=()))


@plain_only
def test_a_block_of_the_wrong_input_spoils_the_result() -> None:
    case = case_of(routing=uneven(1), size=(8, 8), in_channels=128, x2_channels=64)
    with hopper(1) as launcher, launcher.planted("HOPPER_WRONG_INPUT"), pytest.raises(AssertionError):
        assert_accurate(case, torch.bfloat16, (), backend="hopper")


@pytest.mark.parametrize("garbage", [-(2**31), -7, 5, 2**31 - 1])
def test_no_number_in_device_memory_leads_out_of_bounds(garbage: int) -> None:
    """Sanitizers check what is read and written; the values do not matter."""
    case = case_of(routing=uneven(1, 0, 1), size=(8, 8))
    tensors = {name: t.detach() for name, t in case.tensors(torch.bfloat16).items()}
    groups = case.routing.num_groups
    wrong = [torch.full((n,), garbage, dtype=torch.int32) for n in (groups + 1, groups, groups, groups)]
    for sound in range(4):
        routing = list(wrong)
        routing[sound] = torch.zeros_like(routing[sound])
        tiles = case.routing.plan().tiles
        t = ConvTensors(tensors["x"], tensors["weight"], routing[0], tiles, *routing[1:])
        problem = conv_problem("routed_conv2d", t, case.stride, case.padding)
        with hopper() as launcher:
            y = hopper_backend.conv2d(problem, t)
            if not SANITIZED:
                hopper_backend.conv2d_dgrad(problem, torch.ones_like(y), t)
        assert [kernel.split("_")[3] for kernel in launcher.launched] == ["forward", "dgrad"][: len(FAMILIES)]
