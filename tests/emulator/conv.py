"""Convolutions through the `cuda` backend with the emulator as its launcher, compared with the fp64 reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast.ops import cuda_launch
from tests.cases import ConvCase, Routing, widths_of
from tests.emulator.harness import AT_RUNTIME, SANITIZED, EmulatorError, EmulatorLauncher, emulated
from tests.ops.test_conv2d import gradients, routed
from tests.tolerance import assert_as_accurate_as_torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
if SANITIZED:
    del DTYPES["fp16"]  # is not built there
HALVES = [name for name in DTYPES if name != "tf32"]
FAMILIES = ("conv_forward", "conv_dgrad", "conv_wgrad", "conv_few_images", "conv_few_wgrad")
# (compute capability * 10, SMs, bytes of shared memory of a block). With one SM the planner chooses
# the 128 tile where the channels fill it; with many SMs it chooses small tiles and splits.
ONE_SM, MANY_SMS = (80, 1, 166912), (80, 1000, 166912)


def conv_case(**changes: Any) -> ConvCase:
    settings: dict[str, Any] = {
        "routing": uneven(2, 0, 1),
        "in_channels": 24,
        "out_channels": 16,
        "size": (6, 5),
        "filter": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "in_widths": None,
        "out_widths": None,
        "extras": ("bias", "sample_bias", "residual"),
        "layout": "channels_last",
        "seed": 3,
    }
    return ConvCase(**(settings | changes))


def uneven(*samples: int, weight_index: tuple[int, ...] | None = None) -> Routing:
    """Groups of the given numbers of samples."""
    groups = tuple(group for group, count in enumerate(samples) for _ in range(count))
    return Routing(groups, len(samples), 1 + max(weight_index) if weight_index else len(samples), weight_index)


@st.composite
def hopper_settings(
    draw: st.DrawFn, *, of_group: int, of_batch: int, eights: tuple[int, int], two_inputs: bool = True
) -> dict[str, Any]:
    """All of a generated case of a Hopper form but its images: up to four groups, which may share experts.

    of_group, of_batch: the most samples of a group, and of all.
    eights: the fewest and the most channels on either side, in eights.
    """
    samples = draw(
        st.lists(st.integers(0, of_group), min_size=1, max_size=4).filter(lambda of: 0 < sum(of) <= of_batch)
    )
    experts = draw(st.integers(1, len(samples)))
    index = tuple(draw(st.integers(0, experts - 1)) for _ in samples)
    ins, outs = (8 * draw(st.integers(*eights)) for _ in range(2))
    x2 = {"x2_channels": draw(st.sampled_from([0, 1])) * 8 * draw(st.integers(1, ins // 8 - 1))} if two_inputs else {}
    return {
        "routing": uneven(*samples, weight_index=(*index[:-1], experts - 1)),
        "in_channels": ins,
        "out_channels": outs,
        "in_widths": draw(widths_of(ins, 1, len(samples))),
        "out_widths": draw(widths_of(outs, 1, len(samples))),
        "extras": draw(st.sampled_from([(), ("bias",), ("bias", "sample_bias"), ("residual",)])),
        "seed": draw(st.integers(0, 99)),
        **x2,
    }


@contextmanager
def emulator(
    facts: tuple[int, int, int] = MANY_SMS, families: Iterable[str] = FAMILIES, **plants: str
) -> Iterator[EmulatorLauncher]:
    """The launcher of the kernels of some families; within the block fp32 products may be rounded to tf32.

    plants: family = bug builds that family with a bug planted; else bugs can be planted at run time, so that one
        build serves all tests.
    """
    libraries = [emulated(family, plants.get(family, AT_RUNTIME)) for family in families]
    launcher = EmulatorLauncher(*libraries, facts=facts)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with cuda_launch.use_launcher(launcher):
            yield launcher
    finally:
        torch.set_float32_matmul_precision(before)


def results(
    case: ConvCase, dtype: torch.dtype, wanted: Iterable[str] | None = None, backend: str = "cuda"
) -> dict[str, Tensor]:
    """The output and the gradients of some inputs, of all by default, from the kernels."""
    tensors = differentiable(case.tensors(dtype), wanted)
    return outcome(routed(case, tensors, backend=backend), tensors, case)


def assert_accurate(
    case: ConvCase, dtype: torch.dtype, wanted: Iterable[str] | None = None, backend: str = "cuda"
) -> None:
    """The kernels' results for a case are as near to fp64 as torch's."""
    ours = results(case, dtype, wanted, backend)
    plain, exact = (differentiable(case.tensors(d), wanted) for d in (dtype, torch.float64))
    torchs = outcome(case.plain(plain), plain, case)
    reference = outcome(routed(case, exact, backend="reference"), exact, case)
    taps, pixels = case.upsample**2 * case.filter[0] * case.filter[1], case.out_size[0] * case.out_size[1]
    for name in ours:
        of_products = name in ("y", "dx", "dx2")
        terms = taps * max(case.in_channels, case.out_channels) if of_products else case.routing.batch * pixels
        assert_as_accurate_as_torch(ours[name], torchs[name], reference[name], f"{name} of {case}", max(terms, 64))


def assert_nothing_dead_is_used(case: ConvCase, dtype: torch.dtype) -> None:
    """Dead weights, biases and upstream gradients do not change a bit of the results; dead outputs are zeros.

    case: with a bias and one per sample, and an expert for each group.
    """
    inputs = ("x", "x2") if case.x2_channels else ("x",)
    live_in, live_out = case.in_widths or (), case.out_widths or ()

    def computed(filler: float) -> dict[str, Tensor]:
        tensors = case.tensors(dtype)
        with torch.no_grad():
            for group in range(case.routing.num_groups):
                tensors["weight"][group, live_out[group] :] = filler
                tensors["weight"][group, :, live_in[group] :] = filler
                tensors["bias"][group, live_out[group] :] = filler
        y = routed(case, tensors, backend="cuda")
        dy = torch.ones_like(y)
        for group, _, start, stop in case.routing.segments():
            dy[start:stop, live_out[group] :] = filler
        names = (*inputs, "weight", "bias", "sample_bias")
        grads = dict(zip(names, torch.autograd.grad(y, [tensors[n] for n in names], dy), strict=True))
        dx = torch.cat([grads.pop(name) for name in inputs], dim=1)
        return {"y": y.detach(), "dx": dx, **{f"d{name}": grad for name, grad in grads.items()}}

    zeros, nans = computed(0.0), computed(float("nan"))
    for name, value in zeros.items():
        assert torch.equal(nans[name], value), name
    for group, expert, start, stop in case.routing.segments():
        dead = (
            nans["y"][start:stop, live_out[group] :],
            nans["dx"][start:stop, live_in[group] :],
            nans["dsample_bias"][start:stop, live_out[group] :],
            nans["dbias"][expert, live_out[group] :],
            nans["dweight"][expert, live_out[group] :],
            nans["dweight"][expert, :, live_in[group] :],
        )
        assert all(not values.any() for values in dead)


def differentiable(tensors: dict[str, Tensor], wanted: Iterable[str] | None) -> dict[str, Tensor]:
    return {n: t if wanted is None else t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}


def outcome(y: Tensor, tensors: dict[str, Tensor], case: ConvCase) -> dict[str, Tensor]:
    return gradients(y, {name: t for name, t in tensors.items() if t.requires_grad}, case)


def assert_a_mask_is_missed(launcher: EmulatorLauncher, case: ConvCase) -> None:
    """Asserts that dx is right though dy has values past the width, and wrong without the mask of those.

    case: with a width of output channels that is no multiple of 16.
    """
    assert_accurate(case, torch.bfloat16, ("x",), backend="hopper")
    with launcher.planted("HOPPER_NO_MASK"), pytest.raises(AssertionError):
        assert_accurate(case, torch.bfloat16, ("x",), backend="hopper")


# Planted bugs that several Hopper forms have, and what the emulator says of them: in the ring of stages, in the mask of
# what is in a stage, and in the epilogue's stores.
RING_PLANTS = {
    "HOPPER_NO_EMPTY_WAIT": "arrivals in a phase|race on byte|in flight",
    "HOPPER_NO_FULL_WAIT": "in flight|race on byte",
    "HOPPER_WRONG_PHASE": "deadlock",
    "HOPPER_WRONG_BYTES": "race on byte|in flight|deadlock",
    "HOPPER_EARLY_RELEASE": r"race on byte \d+ of the dynamic shared memory.*: a copy .* writes .* what a product",
}
MASK_PLANTS = {
    "HOPPER_NO_ASYNC_FENCE": "a product of warp .* and no async_fence is between",
    "HOPPER_NO_MASK_BARRIER": r"race on byte \d+ of the dynamic shared memory|no async_fence is between",
}
STORE_PLANTS = {
    "HOPPER_NO_STORE_FENCE": "a store of thread .* and no async_fence is between",
    "HOPPER_NO_STORE_WAIT": "race on byte .* what a store of thread",
    "HOPPER_NO_RESIDUAL_WAIT": "race on byte .* a copy .* what a store of thread",
}
# Of six groups one has live channels: the producer is as far ahead of the warps that multiply as it may be.
TILES_THAT_ARE_OVER_AT_ONCE: dict[str, Any] = {
    "routing": uneven(1, 1, 1, 1, 1, 1), "out_widths": (0, 0, 64, 0, 0, 0), "extras": ("bias",),
}  # fmt: skip


def assert_messages_are_waited_for(launcher: EmulatorLauncher, case: ConvCase) -> None:
    """Asserts that a block may have more tiles than the ring of messages holds, and is caught without its wait."""
    assert_accurate(case, torch.bfloat16, (), backend="hopper")
    message = r"race on byte \d+ of the dynamic shared memory: thread 0 writes|deadlock"
    with launcher.planted("HOPPER_NO_MESSAGE_WAIT"), pytest.raises(EmulatorError, match=message):
        results(case, torch.bfloat16, (), backend="hopper")
