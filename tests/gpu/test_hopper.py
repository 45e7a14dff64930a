"""The Hopper form of the convolution, and norms as streams, on a GPU of compute capability 9.0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tdc_fast import explain, routed_conv2d
from tdc_fast.kernels.problems import NormTensors
from tdc_fast.ops.backends import explain_problem
from tdc_fast.ops.checks import norm_problem
from tdc_fast.ops.hopper import HOPPER_FORM, NORM_FORMS
from tests.cases import ConvCase, NormCase, Routing
from tests.gpu.problems import BF16, FP16, Precision, Target, moved, on_sms, plan_on, routed, settings_on, targets
from tests.gpu.shapes import HOPPER_CASES
from tests.gpu.test_operators import check
from tests.tolerance import assert_as_accurate_as_torch, assert_same

HANGS_AFTER = 60.0  # seconds
on_hopper = pytest.mark.parametrize("target", targets("hopper"))


@pytest.fixture(autouse=True)
def a_hopper_gpu(target: Target) -> None:
    if target.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the form is for compute capability 9.0")


HOPPER = Target("cuda", "hopper")
# On few SMs planners choose large tiles, on all the small ones and clusters.
on_all_sms_and_few = pytest.mark.parametrize(
    ("target", "few", "precision"),
    [
        *(
            pytest.param(HOPPER, few, precision, marks=pytest.mark.gpu, id=f"{precision}, {sms} SMs")
            for few, sms in ((False, "all"), (True, "few"))
            for precision in (BF16, FP16)
        ),
        pytest.param(Target("cpu", "reference"), False, BF16, id="dry-run"),
    ],
)


@on_all_sms_and_few
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_convolution(name: str, target: Target, few: bool, precision: Precision, nan_filled_memory: None) -> None:
    case = HOPPER_CASES[name]
    products = case.upsample**2 * case.filter[0] * case.filter[1] * max(case.in_channels, case.out_channels)
    pixels = case.upsample**2 * case.size[0] * case.size[1]
    with on_sms(few):
        check(case, precision, target, {"y": products, "dx": products, "sums": case.routing.batch * pixels})


WITH_BIAS = ("widths", "widths of no multiple of 16, small images", "images of 2x8 and two inputs with widths")


@on_hopper
@pytest.mark.parametrize("name", WITH_BIAS)
def test_bias_gradients_from_the_launches_of_the_weights(name: str, target: Target, nan_filled_memory: None) -> None:
    """Without a bias per sample; the gradient of the result is NaN in dead channels."""
    case = replace(HOPPER_CASES[name], extras=("bias",))
    products = case.filter[0] * case.filter[1] * max(case.in_channels, case.out_channels)
    pixels = case.size[0] * case.size[1]
    check(case, BF16, target, {"y": products, "dx": products, "sums": case.routing.batch * pixels})


@on_hopper
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_the_form_serves_the_cases(name: str, target: Target) -> None:
    case = HOPPER_CASES[name]
    tensors = {k: t.detach() for k, t in moved(case.tensors(torch.bfloat16), target.device, case.layout).items()}
    inputs = (tensors["x"], tensors["weight"], tensors.get("bias"))
    settings = {"x2": tensors.get("x2"), **settings_on(case, target.device)}
    what = explain(routed_conv2d, *inputs, plan_on(case.routing, target.device), **settings)
    assert what.forms.get("hopper") == (HOPPER_FORM if target.device == "cuda" else None)


def large(samples: tuple[int, ...], channels: int, side: int, **changes: Any) -> ConvCase:
    """A shape that fills the GPU several times over."""
    groups = tuple(group for group, count in enumerate(samples) for _ in range(count))
    routing = Routing(groups, len(samples), len(samples), None)
    case = ConvCase(routing, channels, channels, (side, side), (3, 3), (1, 1), (1, 1), None, None, ("bias",),
                    "channels_last", 5)  # fmt: skip
    return replace(case, **changes)


LARGE: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "even groups": ((16,) * 8, 128, 32, {}),
    "one group": ((128,), 256, 16, {}),
    "half in one group": ((130, 18, 18, 18, 18, 18, 18, 18), 256, 8, {}),
    "64 groups": ((1, 3) * 32, 128, 16, {}),
    "wide tiles": ((3, 5), 192, 64, {}),
    "images of 4x4": ((16,) * 8, 256, 4, {}),
    "two inputs": ((16,) * 8, 256, 16, {"x2_channels": 56}),
    "stride 2": ((16,) * 8, 128, 32, {"stride": (2, 2)}),
    "stride 2 to images of 4x4": ((3, 29, 8), 256, 8, {"stride": (2, 2)}),
    "upsampled": ((16,) * 8, 128, 16, {"upsample": 2}),
}


@on_hopper
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes_are_accurate_and_repeatable(name: str, target: Target, nan_filled_memory: None) -> None:
    samples, channels, side, changes = LARGE[name]
    if target.device == "cpu":
        samples, channels, side = tuple(min(n, 1) for n in samples[:2]), 64, 8
    case = large(samples, channels, side, **changes)
    tensors = {k: t.detach() for k, t in moved(case.tensors(torch.bfloat16), target.device, case.layout).items()}
    plan = plan_on(case.routing, target.device)
    with torch.no_grad():
        y = routed(case, tensors, target, plan)
        torchs = case.plain(tensors)
        exact = case.plain({k: t.float() for k, t in tensors.items()})  # fp32 sums of exact products
        assert_as_accurate_as_torch(y.cpu(), torchs.cpu(), exact.double().cpu(), name, 9 * case.upsample**2 * channels)
        for _ in range(5):
            assert_same(routed(case, tensors, target, plan), y)


@on_hopper
@pytest.mark.parametrize("name", ["half in one group", "images of 4x4"])
def test_gradients_of_large_shapes_repeat_bit_by_bit(name: str, target: Target) -> None:
    samples, channels, side, _ = LARGE[name]
    if target.device == "cpu":
        samples, channels, side = tuple(min(n, 1) for n in samples[:2]), 64, 4
    case = large(samples, channels, side)
    tensors = moved(case.tensors(torch.bfloat16), target.device, case.layout)
    plan = plan_on(case.routing, target.device)
    y = routed(case, tensors, target, plan)
    wanted, dy = [tensors["weight"], tensors["bias"]], torch.ones_like(y)
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for name, one, other in zip(("dweight", "dbias"), first, again, strict=True):
            assert_same(other, one, name)


STREAMS = {
    "whole vectors": ((12, 3, 0, 49), 32, {"channels": 128, "num_groups": 32, "widths": (128, 64, 32, 4)}),
    "two inputs": ((9, 30, 25), 32, {"channels": 384, "num_groups": 32, "x2_channels": 128}),
    "by clusters": ((5, 0, 12, 23), 64, {"channels": 128, "num_groups": 32, "widths": (128, 64, 32, 4)}),
}


@on_hopper
@pytest.mark.parametrize("precision", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", STREAMS)
def test_norms_as_streams_and_by_clusters(
    name: str, precision: Precision, target: Target, nan_filled_memory: None
) -> None:
    samples, side, changes = STREAMS[name]
    if target.device == "cpu":
        samples, side = tuple(min(n, 1) for n in samples), 4
    groups = tuple(group for group, count in enumerate(samples) for _ in range(count))
    routing = Routing(groups, len(samples), len(samples), None)
    settings = {"widths": None, "extras": ("scale", "shift"), "activation": "silu", "layout": "channels_last"}
    case = NormCase(routing=routing, size=(side, side), seed=1, **(settings | changes))
    check(case, precision, target, {"sums": 4 * case.routing.batch * side * side})
    if target.device == "cuda":
        t = {k: v.detach() for k, v in moved(case.tensors(torch.bfloat16), "cuda", case.layout).items()}
        plan = plan_on(routing, "cuda")
        tensors = NormTensors(
            t["x"], t["weight"], t["bias"], plan.offsets, plan.weight_index, None, t["scale"], t["shift"], t.get("x2")
        )
        for op in ("routed_group_norm", "routed_group_norm_backward"):
            what = explain_problem(op, norm_problem(op, tensors, case.num_groups, 1e-5, True))
            assert what.forms["hopper"] == NORM_FORMS[name == "by clusters"], op


@on_hopper
def test_gradients_of_a_stream_repeat_to_the_bit(target: Target) -> None:
    """Of three samples' experts in turn, whose terms the last item of each adds up."""
    samples, side = ((22,) * 3, 32) if target.device == "cuda" else ((1,) * 3, 4)
    groups = tuple(group for group, count in enumerate(samples) for _ in range(count))
    settings = {"widths": None, "extras": ("scale", "shift"), "activation": "silu", "layout": "channels_last"}
    case = NormCase(
        routing=Routing(groups, 3, 3, None), channels=128, num_groups=32, size=(side, side), seed=2, **settings
    )
    tensors = moved(case.tensors(torch.bfloat16), target.device, case.layout)
    y = routed(case, tensors, target, plan_on(case.routing, target.device))
    once, *others = (torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=True) for _ in range(6))
    for other in others:
        for name, ours, expected in zip(tensors, other, once, strict=True):
            assert_same(ours, expected, f"d{name}")


on_cuda = pytest.mark.parametrize("target", [Target("cuda", "hopper")], ids=["hopper"])


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("side, channels", [(16, 128), (4, 256)], ids=["16x16", "4x4, clusters"])
def test_a_captured_convolution_follows_its_inputs(side: int, channels: int, target: Target) -> None:
    """Tensor maps are parameters of the graph's nodes: new contents at the same addresses are what it computes."""
    case = large((3, 0, 5), channels, side)
    tensors = {k: t.detach() for k, t in moved(case.tensors(torch.bfloat16), "cuda", case.layout).items()}
    plan = plan_on(case.routing, "cuda")
    with torch.no_grad():
        routed(case, tensors, target, plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = routed(case, tensors, target, plan)
        for seed in (1, 2):
            torch.manual_seed(seed)
            tensors["x"].normal_()
            graph.replay()
            assert_same(y, routed(case, tensors, target, plan))


@pytest.mark.gpu
@on_cuda
def test_clusters_on_two_streams_at_once_have_equal_bits(target: Target) -> None:
    """Blocks of two launches share the SMs; what a cluster exchanges is its own."""
    case = large((20, 0, 30, 14), 256, 4)
    tensors = {k: t.detach() for k, t in moved(case.tensors(torch.bfloat16), "cuda", case.layout).items()}
    plan = plan_on(case.routing, "cuda")
    with torch.no_grad():
        expected = routed(case, tensors, target, plan)
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(2)], []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(routed(case, tensors, target, plan))
        torch.cuda.synchronize()
    for y in found:
        assert_same(y, expected)
