"""Bad input is a ValueError that names the argument, what it was and what it should be; never a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm

int32 = torch.int32
GROUPS = torch.tensor([0, 2, 1, 0])
HOST_TENSORS = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), None, RoutingPlan.from_groups(torch.tensor([0]), 1)
BACKENDS = [name for name, reason in explain("routed_conv2d", *HOST_TENSORS).reasons.items() if reason is None]


def conv_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(4, 6, 5, 5),
        "weight": torch.randn(3, 8, 6, 3, 3),
        "bias": torch.randn(3, 8),
        "plan": RoutingPlan.from_groups(GROUPS, 3),
        "padding": 1,
    }


def norm_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(4, 6, 5, 5),
        "weight": torch.randn(3, 6),
        "bias": torch.randn(3, 6),
        "plan": RoutingPlan.from_groups(GROUPS, 3),
        "num_groups": 3,
    }


def plan_with_experts(*experts: int) -> RoutingPlan:
    return RoutingPlan.from_groups(GROUPS, 3, torch.tensor(experts, dtype=int32))


def broken_plan(*offsets: int) -> RoutingPlan:
    plan = RoutingPlan.from_groups(GROUPS, 3)
    plan.offsets = torch.tensor(offsets, dtype=int32)
    return plan


BAD_CONV = {
    "rank of x": ("x", {"x": torch.zeros(4, 6, 5)}, r"\(4, 6, 5\).*\(B, C, H, W\)"),
    "dtype of x": ("x", {"x": torch.zeros(4, 6, 5, 5, dtype=torch.int64)}, "int64.*float32"),
    "no pixels": ("x", {"x": torch.zeros(4, 6, 0, 5)}, r"\(4, 6, 0, 5\).*at least 1"),
    "image below the filter": ("x", {"x": torch.zeros(4, 6, 2, 5), "padding": 0}, r"\(4, 6, 2, 5\).*3x3 filter"),
    "rank of weight": ("weight", {"weight": torch.zeros(8, 6, 3, 3)}, r"\(8, 6, 3, 3\).*\(E, C_out, C_in, R, S\)"),
    "channels of weight": ("weight", {"weight": torch.zeros(3, 8, 5, 3, 3)}, r"\(3, 8, 5, 3, 3\).*6 channels"),
    "no experts": ("weight", {"weight": torch.zeros(0, 8, 6, 3, 3)}, "E of at least 1"),
    "dtype mix": ("weight", {"weight": torch.zeros(3, 8, 6, 3, 3).double()}, "float64.*float32.*autocast"),
    "device mix": ("weight", {"weight": torch.zeros(3, 8, 6, 3, 3, device="meta")}, "meta.*cpu"),
    "shape of bias": ("bias", {"bias": torch.zeros(8)}, r"\(8,\).*\(3, 8\)"),
    "dtype of bias": ("bias", {"bias": torch.zeros(3, 8).bfloat16()}, "bfloat16.*float32"),
    "shape of sample_bias": ("sample_bias", {"sample_bias": torch.zeros(3, 8)}, r"\(3, 8\).*\(4, 8\)"),
    "shape of residual": ("residual", {"residual": torch.zeros(4, 8, 3, 3)}, r"\(4, 8, 3, 3\).*\(4, 8, 5, 5\)"),
    "broadcast residual": ("residual", {"residual": torch.zeros(1, 8, 5, 5)}, r"\(1, 8, 5, 5\).*\(4, 8, 5, 5\)"),
    "not a plan": ("plan", {"plan": GROUPS}, "Tensor.*RoutingPlan"),
    "plan of another batch": ("plan", {"plan": RoutingPlan.from_groups(GROUPS[:3], 3)}, "batch_size=3.*4 samples"),
    "offsets past the batch": ("plan", {"plan": broken_plan(0, 2, 3, 9)}, r"\[0, 2, 3, 9\].*4 samples"),
    "offsets that fall": ("plan", {"plan": broken_plan(0, 3, 2, 4)}, r"\[0, 3, 2, 4\]"),
    "offsets below zero": ("plan", {"plan": broken_plan(-1, 2, 3, 4)}, r"\[-1, 2, 3, 4\]"),
    "too few offsets": ("plan", {"plan": broken_plan(0, 4)}, r"\(4,\)"),
    "expert out of range": ("weight_index", {"plan": plan_with_experts(0, 3, 1)}, r"got 3;.*\[0, 3\)"),
    "negative expert": ("weight_index", {"plan": plan_with_experts(0, -1, 1)}, r"got -1;.*\[0, 3\)"),
    "width past the inputs": ("in_widths", {"in_widths": torch.tensor([6, 7, 0], dtype=int32)}, "got 7.*6 channels"),
    "width past the outputs": ("out_widths", {"out_widths": torch.tensor([9, 0, 0], dtype=int32)}, "got 9.*8 channels"),
    "negative width": ("in_widths", {"in_widths": torch.tensor([6, -1, 0], dtype=int32)}, "got -1.*from 0"),
    "too few widths": ("out_widths", {"out_widths": torch.tensor([6, 1], dtype=int32)}, r"\(2,\).*\(3,\)"),
    "dtype of widths": ("out_widths", {"out_widths": torch.tensor([6, 1, 1])}, "int64.*int32"),
    "stride 0": ("stride", {"stride": 0}, "got 0.*at least 1"),
    "stride of three numbers": ("stride", {"stride": (1, 1, 1)}, "pair"),
    "x that is no tensor": ("x", {"x": [[1.0]]}, "a torch tensor$"),
    "no weight": ("weight", {"weight": None}, "a torch tensor$"),
    "bias that is no tensor": ("bias", {"bias": [1.0]}, "a torch tensor or None"),
    "widths that are no tensor": ("in_widths", {"in_widths": [1, 2, 3]}, "a torch tensor or None"),
    "sparse x": ("x", {"x": torch.zeros(4, 6, 5, 5).to_sparse()}, "sparse_coo.*to_dense"),
    "negative padding": ("padding", {"padding": (1, -1)}, r"\(1, -1\).*at least 0"),
}

BAD_NORM = {
    "rank of x": ("x", {"x": torch.zeros(4, 6)}, r"\(4, 6\).*\(B, C, H, W\)"),
    "groups that do not divide": ("num_groups", {"num_groups": 4}, "got 4.*6 channels"),
    "no groups": ("num_groups", {"num_groups": 0}, "got 0"),
    "shape of weight": ("weight", {"weight": torch.zeros(6)}, r"\(6,\).*\(E, 6\)"),
    "channels of weight": ("weight", {"weight": torch.zeros(3, 5)}, r"\(3, 5\).*\(3, 6\)"),
    "shape of bias": ("bias", {"bias": torch.zeros(2, 6)}, r"\(2, 6\).*\(3, 6\)"),
    "dtype mix": ("bias", {"bias": torch.zeros(3, 6).double()}, "float64.*float32"),
    "shape of scale": ("scale", {"scale": torch.zeros(4, 6, 1, 1)}, r"\(4, 6, 1, 1\).*\(4, 6\)"),
    "shape of shift": ("shift", {"shift": torch.zeros(3, 6)}, r"\(3, 6\).*\(4, 6\)"),
    "no bias": ("bias", {"bias": None}, "a torch tensor$"),
    "scale that is no tensor": ("scale", {"scale": 2.0}, "a torch tensor or None"),
    "half a group": ("num_groups", {"num_groups": 1.5}, "an integer"),
    "eps that is no number": ("eps", {"eps": "tiny"}, "tiny.*positive"),
    "eps": ("eps", {"eps": 0.0}, "got 0.0.*positive"),
    "activation": ("activation", {"activation": "relu"}, "relu.*silu"),
    "plan of another batch": ("plan", {"plan": RoutingPlan.from_groups(GROUPS[:3], 3)}, "batch_size=3.*4 samples"),
    "offsets past the batch": ("plan", {"plan": broken_plan(0, 2, 3, 9)}, r"\[0, 2, 3, 9\].*4 samples"),
    "offsets that fall": ("plan", {"plan": broken_plan(0, 3, 2, 4)}, r"\[0, 3, 2, 4\]"),
    "expert out of range": ("weight_index", {"plan": plan_with_experts(0, 3, 1)}, r"got 3;.*\[0, 3\)"),
    "width past the channels": ("widths", {"widths": torch.tensor([6, 8, 0], dtype=int32)}, "got 8.*6 channels"),
    "negative width": ("widths", {"widths": torch.tensor([6, -2, 0], dtype=int32)}, "got -2.*from 0"),
    "half a norm group": ("widths", {"widths": torch.tensor([6, 3, 0], dtype=int32)}, "got 3.*multiples of the 2"),
}


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("case", BAD_CONV)
def test_a_bad_convolution_is_refused_by_name(case: str, backend: str | None) -> None:
    argument, change, message = BAD_CONV[case]
    with pytest.raises(ValueError, match=f"^{argument}: got .*") as caught:
        routed_conv2d(**(conv_arguments() | change), backend=backend)
    assert caught.match(message)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("case", BAD_NORM)
def test_a_bad_group_norm_is_refused_by_name(case: str, backend: str | None) -> None:
    argument, change, message = BAD_NORM[case]
    with pytest.raises(ValueError, match=f"^{argument}: got .*") as caught:
        routed_group_norm(**(norm_arguments() | change), backend=backend)
    assert caught.match(message)


def test_a_backend_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="^backend: got 3; expected the name"):
        routed_conv2d(**conv_arguments(), backend=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^backend: got 3; expected the name"):
        routed_group_norm(**norm_arguments(), backend=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_that_change_after_a_good_call_are_checked_again(backend: str) -> None:
    """Even behind the back of torch's version counter."""
    widths = torch.tensor([8, 8, 8], dtype=int32)
    arguments = conv_arguments()
    routed_conv2d(**arguments, out_widths=widths, backend=backend)
    widths.numpy()[1] = 1000
    with pytest.raises(ValueError, match="out_widths: got 1000"):
        routed_conv2d(**arguments, out_widths=widths, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_is_checked_too(backend: str) -> None:
    for arguments, operator, name in (
        (conv_arguments(), routed_conv2d, "out_widths"),
        (norm_arguments(), routed_group_norm, "widths"),
    ):
        widths = torch.full((3,), 6, dtype=int32)
        arguments["x"].requires_grad_()
        y = operator(**arguments, **{name: widths}, backend=backend)
        widths.numpy()[1] = 1000
        with pytest.raises(ValueError, match=f"{name}: got 1000"):
            y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_nothing_gives_nothing_and_zero_gradients(backend: str) -> None:
    plan = RoutingPlan.from_groups(GROUPS[:0], 3)
    conv, norm = conv_arguments() | {"plan": plan}, norm_arguments() | {"plan": plan}
    for arguments, operator, channels in ((conv, routed_conv2d, 8), (norm, routed_group_norm, 6)):
        arguments["x"] = arguments["x"][:0].requires_grad_()
        arguments["weight"].requires_grad_()
        arguments["bias"].requires_grad_()
        y = operator(**arguments, backend=backend)
        assert y.shape == (0, channels, 5, 5)
        y.sum().backward()
        assert arguments["x"].grad.shape == arguments["x"].shape
        assert not arguments["weight"].grad.any() and not arguments["bias"].grad.any()
