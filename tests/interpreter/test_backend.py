"""The `triton` backend through the public interface: operators, gradients, a whole routed UNet, refusals."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.ops.layout import channel_innermost
from tests.cases import ConvCase, Routing, upstream
from tests.nn.test_packing import GROUPS, shuffled_plan, unet
from tests.tolerance import assert_as_accurate_as_torch

ROUTING = Routing((0, 2, 2, 1, 2), 3, 2, (1, 0, 1))


def conv_case(**changes: Any) -> ConvCase:
    settings = {
        "routing": ROUTING,
        "in_channels": 5,
        "out_channels": 6,
        "size": (4, 5),
        "filter": (3, 3),
        "stride": (2, 1),
        "padding": (1, 1),
        "in_widths": (5, 2, 3),
        "out_widths": (6, 6, 3),
        "extras": ("bias", "sample_bias", "residual"),
        "layout": "contiguous",
        "seed": 3,
    }
    return ConvCase(**(settings | changes))


def routed(case: ConvCase, tensors: dict[str, Tensor], backend: str = "triton") -> Tensor:
    extras = {name: tensors.get(name) for name in ("sample_bias", "residual", "x2")}
    affine = (tensors["weight"], tensors.get("bias"))
    return routed_conv2d(tensors["x"], *affine, case.routing.plan(), **case.settings(), **extras, backend=backend)


def gradients(y: Tensor, tensors: dict[str, Tensor], case: ConvCase | None = None) -> dict[str, Tensor]:
    """The output, and the gradient of every input for some fixed upstream gradient, with NaN where the case is dead."""
    if case is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)
    else:
        dy = upstream(case, y.shape, y.dtype)
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


UPSAMPLED = {"upsample": 2, "stride": (1, 1)}
FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "two inputs": {"x2_channels": 2},
    "upsampled": UPSAMPLED,
    "upsampled 5x1": UPSAMPLED
    | {"filter": (5, 1), "padding": (3, 0), "size": (3, 2), "in_widths": None, "in_channels": 40},
    "upsampled two inputs, through copies": UPSAMPLED | {"x2_channels": 2},
    "upsampled stride 2, through copies": {"upsample": 2, "padding": (1, 3)},
}


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        *(pytest.param(torch.float32, fused, id=f"fp32-{name}") for name, fused in FUSED.items()),
        *(pytest.param(torch.float16, FUSED[name], id=f"fp16-{name}") for name in ("plain", "two inputs", "upsampled")),
    ],
)
def test_a_convolution_and_the_gradients_of_all_its_inputs(
    dtype: torch.dtype, fused: dict[str, Any], nan_filled_memory: None
) -> None:
    case = conv_case(**fused)
    tensors, copies, exact = case.tensors(dtype), case.tensors(dtype), case.tensors(torch.float64)
    ours = gradients(routed(case, tensors), tensors, case)
    torchs = gradients(case.plain(copies), copies, case)
    right = gradients(routed(case, exact, "reference"), exact, case)
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], right[name], name, terms=64)


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7)], ids=["vectors", "tokens"])
def test_a_linear_layer_runs_as_a_1x1_convolution(shape: tuple[int, ...], nan_filled_memory: None) -> None:
    draw = torch.Generator().manual_seed(1)
    plan = ROUTING.plan()
    made = {"x": shape, "weight": (2, 6, 7), "bias": (2, 6), "residual": (*shape[:-1], 6)}
    results = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        draw.manual_seed(1)
        t = {n: torch.randn(s, generator=draw).to(dtype).requires_grad_() for n, s in made.items()}
        widths = {"in_widths": torch.tensor([7, 3, 4], dtype=torch.int32)}
        y = routed_linear(t["x"], t["weight"], t["bias"], plan, residual=t["residual"], backend=backend, **widths)
        results[backend] = gradients(y, t)
    for name, ours in results["triton"].items():
        torch.testing.assert_close(ours.double(), results["reference"][name], rtol=1e-5, atol=1e-5)


def test_weights_and_inputs_may_have_any_strides_and_gradients_have_the_weights_strides() -> None:
    case = conv_case()
    plain = case.tensors(torch.float32)
    expected = gradients(routed(case, plain), plain)
    views = case.tensors(torch.float32)
    views["weight"] = channel_innermost(plain["weight"].detach()).requires_grad_()
    views["bias"] = plain["bias"].detach().t().contiguous().t().requires_grad_()
    views["x"] = plain["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual = gradients(routed(case, views), views)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert actual["dweight"].stride() == views["weight"].stride() != expected["dweight"].stride()
    assert actual["y"].is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_has_zero_gradients(nan_filled_memory: None) -> None:
    plan = RoutingPlan.from_groups(torch.zeros(0, dtype=torch.int64), 2)
    x = torch.zeros(0, 4, 3, 3, requires_grad=True)
    weight, bias = torch.randn(2, 4, 4, 1, 1, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    for y in (
        routed_conv2d(x, weight, bias, plan, backend="triton"),
        routed_group_norm(x, weight[:, 0, :, 0, 0], bias, plan, num_groups=2, backend="triton"),
    ):
        assert y.shape == (0, 4, 3, 3)
        for grad in torch.autograd.grad(y.sum(), (weight, bias)):
            assert torch.equal(grad, torch.zeros_like(grad))


TINY = {"image_size": 4, "in_channels": 1, "out_channels": 2, "channel_mult": (1,), "use_scale_shift_norm": True}


PRUNED = {"input_blocks.1.0": 8, "middle_block.0": 16, "middle_block.1": 16, "output_blocks.0.0": 0}


def step(model: RoutedModel, monkeypatch: pytest.MonkeyPatch, backend: str) -> dict[str, Tensor]:
    """Output and all gradients of one forward and backward; the middle group has no sample."""
    monkeypatch.setenv("TDC_FAST_BACKEND", backend)
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(2, 1, 4, 4, generator=draw).requires_grad_()
    model.zero_grad()
    out = model(x, torch.tensor([999, 3]), y=torch.tensor([0, 4]))
    (out * torch.randn(out.shape, generator=draw)).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, **grads}


def test_a_whole_pruned_unet_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer goes through the backend: a layer that it refused would raise. The embedding is one launch of it.

    Of one level, to save time: what changes the resolution is a convolution of the tests above.
    """
    model = unet(**TINY)
    routed_model = pack_experts(model, GROUPS, shuffled_plan(model, [{}, {}, PRUNED]))
    expected = step(routed_model, monkeypatch, "reference")
    monkeypatch.setattr("tdc_fast.nn.one_input.launches_cost", lambda device: True)
    actual = step(routed_model, monkeypatch, "triton")
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def reasons(dtype: torch.dtype, **changes: Any) -> str | None:
    plan = RoutingPlan.from_groups(torch.zeros(1, dtype=torch.int64), 1)
    settings = {"filter": (3, 3), "stride": 1} | changes
    x = torch.zeros(1, 1, 8, 8, dtype=dtype)
    weight = torch.zeros(1, 1, 1, *settings["filter"], dtype=dtype)
    return explain("routed_conv2d", x, weight, None, plan, stride=settings["stride"]).reasons["triton"]


def test_a_refusal_names_its_reason() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1" and reasons(torch.float32) is None and reasons(torch.float16) is None
    assert "float64" in reasons(torch.float64)
    assert "bfloat16 wrongly" in reasons(torch.bfloat16)
    assert "odd filters" in reasons(torch.float32, filter=(2, 3))
    assert "strides 1 and 2" in reasons(torch.float32, stride=3)
    with pytest.raises(ValueError, match="backend: got 'triton'; expected one that supports .*, not torch.float64"):
        x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
        routed_conv2d(x, x[None], None, conv_plan(), backend="triton")


def conv_plan() -> RoutingPlan:
    return RoutingPlan.from_groups(torch.zeros(1, dtype=torch.int64), 1)


def test_norm_groups_too_wide_for_one_program_are_refused() -> None:
    x = torch.zeros(1, 2049, 1, 2)
    reason = explain("routed_group_norm", x, *torch.zeros(2, 1, 2049), conv_plan(), num_groups=1).reasons["triton"]
    assert reason is not None and "at most 2048 channels" in reason


def test_bad_values_in_host_memory_are_named() -> None:
    case = conv_case(in_widths=(5, 2, 6))
    with pytest.raises(ValueError, match="in_widths: got 6"):
        routed(case, case.tensors(torch.float32) | {"x": torch.zeros(5, 5, 4, 5)})
