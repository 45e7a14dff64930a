"""On a GPU the error of every operator and backend against fp64 is at most twice that of torch's own in that dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.ops.dead_channels import note_widths
from tests.cases import ConvCase, NormCase, Routing, upstream
from tests.gpu.networks import no_synchronisation
from tests.gpu.problems import (
    BF16,
    FP16,
    FP32,
    TF32,
    Precision,
    Target,
    gradients,
    moved,
    on_every_backend,
    on_fast_backends,
    plan_on,
    refusal,
    routed,
    settings_on,
    truncated_to_tf32,
)
from tests.gpu.shapes import CONV_CASES, CONV_FORMS, NORM_CASES, NORM_FORMS, UNEVEN, norm
from tests.tolerance import assert_as_accurate_as_torch

CONVOLUTIONS = [(name, BF16) for name in CONV_CASES] + [(n, p) for p in (FP16, FP32, TF32) for n in CONV_FORMS]
NORMS = [(name, BF16) for name in NORM_CASES] + [(name, p) for p in (FP16, FP32) for name in NORM_FORMS]


def named(cases: list[tuple[str, Precision]]):
    return pytest.mark.parametrize(("name", "precision"), cases, ids=[f"{p}-{n.replace(' ', '_')}" for n, p in cases])


def inputs(case: ConvCase | NormCase, precision: Precision) -> dict[str, Tensor]:
    """The case's values. For TF32 they get low bits that TF32 drops; the values drawn in bf16 have none."""
    tensors = {name: t.detach() for name, t in case.tensors(precision.dtype).items()}
    if precision.tf32:
        generator = torch.Generator().manual_seed(7)
        noise = {name: 1 + 1e-3 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        tensors = {name: t * noise[name] for name, t in tensors.items()}
    return tensors


def torchs_own(case: ConvCase | NormCase, tensors: dict[str, Tensor], dy: Tensor, precision: Precision, device: str):
    """What torch computes in that dtype on that device.

    For TF32, exact products of truncated inputs, as on tensor cores: cuDNN has no TF32 kernel for many of the shapes
    and would be exact there.
    """
    if not precision.tf32:
        leaves = moved(tensors, device, case.layout)
        return gradients(case.plain(leaves), leaves, dy)
    products = ("x", "weight")
    leaves = {k: truncated_to_tf32(t) if k in products else t for k, t in tensors.items()}
    leaves = moved(leaves, "cpu", "channels_last")
    return gradients(case.plain(leaves), leaves, truncated_to_tf32(dy))


def check(case: ConvCase | NormCase, precision: Precision, target: Target, terms: dict[str, int]) -> None:
    with precision.active():
        tensors = inputs(case, precision)
        wide = moved({k: t.double() for k, t in tensors.items()}, "cpu", "channels_last")
        result = case.plain(wide)
        dy = upstream(case, result.shape, precision.dtype)
        exact = gradients(result, wide, dy.double())
        torchs = torchs_own(case, tensors, dy, precision, target.device)
        leaves = moved(tensors, target.device, case.layout)
        reason = refusal(case, leaves, target)
        if target.backend == "cuda" and isinstance(case, ConvCase) and precision == FP32:
            assert reason and "tf32" in reason
            pytest.skip(f"as documented: {reason}")
        assert reason is None, f"{target.backend} should serve {case} in {precision}: {reason}"
        ours = gradients(routed(case, leaves, target), leaves, dy)
    for key in ours:
        what = f"{key} of {case} in {precision}"
        assert_as_accurate_as_torch(ours[key], torchs[key], exact[key], what, max(64, terms.get(key, terms["sums"])))
        dead = (exact[key] == 0) & (torchs[key] == 0)
        assert not ours[key][dead].any(), f"{what}: dead channels are not exactly zero"


@on_every_backend
@named(CONVOLUTIONS)
def test_convolution(name: str, precision: Precision, target: Target, nan_filled_memory: None) -> None:
    case = CONV_CASES[name]
    products = case.filter[0] * case.filter[1] * max(case.in_channels, case.out_channels)
    pixels = case.out_size[0] * case.out_size[1]
    check(case, precision, target, {"y": products, "dx": products, "sums": case.routing.batch * pixels})


@on_every_backend
@named(NORMS)
def test_group_norm(name: str, precision: Precision, target: Target, nan_filled_memory: None) -> None:
    case = NORM_CASES[name]
    # Terms are products of dy, 1 + scale and the slope of SiLU, about 2 in size: as noisy as four of size 1.
    check(case, precision, target, {"sums": 4 * case.routing.batch * case.size[0] * case.size[1]})


@on_fast_backends
@pytest.mark.parametrize("upsample", [1, 2])
def test_a_gradient_known_to_be_zero_in_dead_channels_needs_no_mask(upsample: int, target: Target) -> None:
    """What a convolution gets from a norm of the same widths, with and without the note that says so."""
    generator, numbers = torch.Generator().manual_seed(0), (136, 40, 0, 104)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(target.device, torch.bfloat16)

    x = random(UNEVEN.batch, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight, affine, plan = random(4, 136, 64, 3, 3), (random(4, 136), random(4, 136)), plan_on(UNEVEN, target.device)
    dy = random(UNEVEN.batch, 136, 8 * upsample, 8 * upsample)
    found = []
    for noted in (True, False):
        of_conv, of_norm = (torch.tensor(numbers, dtype=torch.int32, device=target.device) for _ in range(2))
        if noted:
            note_widths(of_conv, numbers), note_widths(of_norm, numbers)
        settings = {"padding": 1, "upsample": upsample, "out_widths": of_conv, "backend": target.backend}
        y = routed_conv2d(x, weight, None, plan, **settings)
        y = routed_group_norm(y, *affine, plan, num_groups=17, widths=of_norm, backend=target.backend)
        found.append(torch.autograd.grad(y, x, dy)[0])
    torch.testing.assert_close(*found)


@on_every_backend
@pytest.mark.parametrize("tokens", [None, 5], ids=["rows", "tokens"])
def test_linear(tokens: int | None, target: Target, nan_filled_memory: None) -> None:
    generator, middle = torch.Generator().manual_seed(0), () if tokens is None else (tokens,)
    shapes = {
        "x": (UNEVEN.batch, *middle, 48),
        "weight": (4, 80, 48),
        "bias": (4, 80),
        "residual": (UNEVEN.batch, *middle, 80),
    }
    values = {k: torch.randn(shape, generator=generator).to(torch.bfloat16) for k, shape in shapes.items()}
    dy = torch.randn(shapes["residual"], generator=generator).to(torch.bfloat16)

    def run(dtype: torch.dtype, device: str, ours: bool) -> dict[str, Tensor]:
        t = {k: v.to(device, dtype).requires_grad_() for k, v in values.items()}
        if ours:
            y = routed_linear(
                t["x"], t["weight"], t["bias"], plan_on(UNEVEN, device), residual=t["residual"], backend=target.backend
            )
        else:
            pieces = [
                F.linear(t["x"][start:stop], t["weight"][e], t["bias"][e]) + t["residual"][start:stop]
                for _, e, start, stop in UNEVEN.segments()
            ]
            y = torch.cat(pieces)
        return gradients(y, t, dy.to(dtype))

    ours, torchs = run(torch.bfloat16, target.device, True), run(torch.bfloat16, target.device, False)
    exact = run(torch.float64, "cpu", False)
    for key in ours:
        assert_as_accurate_as_torch(ours[key], torchs[key], exact[key], key)


@on_every_backend
@pytest.mark.parametrize(
    "case", [CONV_CASES["several tiles and K-steps"], NORM_CASES["scale, shift and SiLU"]], ids=["conv", "norm"]
)
def test_the_same_bits_twice(case: ConvCase | NormCase, target: Target, nan_filled_memory: None) -> None:
    """Forward and every gradient: no float atomics, no order of additions that depends on timing."""
    leaves = moved(case.tensors(torch.bfloat16), target.device, case.layout)
    runs = []
    for _ in range(2):
        y = routed(case, leaves, target)
        runs.append(gradients(y, leaves, upstream(case, y.shape, torch.bfloat16)))
    for key in runs[0]:
        assert torch.equal(runs[0][key], runs[1][key]), key


@on_every_backend
def test_a_norms_backward_may_run_again(target: Target, nan_filled_memory: None) -> None:
    """Its blocks count each other: every run finds zeros, none adds up before all have written."""
    on_gpu = target.device == "cuda"
    samples, size = ((100, 0, 3, 97), (32, 32)) if on_gpu else ((1, 0, 2, 1), (4, 4))
    groups = tuple(group for group, count in enumerate(samples) for _ in range(count))
    case = norm(Routing(groups, 4, 5, (4, 1, 0, 2)), 128, 32, size)
    leaves = moved(case.tensors(torch.bfloat16), target.device, case.layout)
    y = routed(case, leaves, target)
    dy = upstream(case, y.shape, torch.bfloat16).to(target.device)
    runs = [torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True) for _ in range(20 if on_gpu else 2)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(again, runs[0], strict=True))
    exact = {k: t.detach().double().requires_grad_() for k, t in leaves.items()}
    right = torch.autograd.grad(case.plain(exact), [exact["weight"], exact["bias"]], dy.double())
    for ours, expected in zip((runs[0][list(leaves).index(k)] for k in ("weight", "bias")), right, strict=True):
        # The one rounding to bf16 and, relative to the largest, the noise of fp32 sums.
        torch.testing.assert_close(ours.double(), expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))
        assert not ours[[1, 3]].any()


@on_fast_backends
@pytest.mark.parametrize("name", ["widths", "stride 2", "scale, shift and SiLU"])
def test_plan_forward_and_backward_never_wait_for_the_gpu(name: str, target: Target) -> None:
    case = NORM_CASES[name] if name == "scale, shift and SiLU" else CONV_CASES[name]
    leaves = moved(case.tensors(torch.bfloat16), target.device, case.layout)
    settings = settings_on(case, target.device)
    groups = torch.tensor(case.routing.groups, device=target.device)
    dy = upstream(case, routed(case, leaves, target).shape, torch.bfloat16).to(target.device)

    def step() -> tuple[Tensor, ...]:
        plan = RoutingPlan.from_groups(groups, case.routing.num_groups)
        y = routed(case, leaves, target, plan, settings)
        return torch.autograd.grad(y, list(leaves.values()), dy)

    expected = step()
    with no_synchronisation(target.device):
        grads = step()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
