"""The `hopper` backend: `cuda` with the Hopper form of the convolution where that serves; `explain` says where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm
from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.ops import cuda_launch, native
from tdc_fast.ops.backends import explain_problem
from tests.emulator.harness import EmulatorLauncher

pytestmark = pytest.mark.skipif(native.module is None, reason="the native module is not built")
H200, A100 = (90, 132, 232448), (80, 108, 166912)


def explained(facts: tuple[int, int, int] = H200, size: int = 16, filter_size: int = 3, channels: int = 64, **settings):
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x = torch.empty(2, channels, size, size, dtype=torch.bfloat16)
    weight = torch.empty(2, 64, 64, filter_size, filter_size, dtype=torch.bfloat16)
    with cuda_launch.use_launcher(EmulatorLauncher(facts=facts)):
        return explain(routed_conv2d, x, weight, None, plan, padding=filter_size // 2, **settings)


def test_explain_says_which_form_serves() -> None:
    assert explained().forms == {"hopper": "in the Hopper form"}
    small = explained(size=7)
    assert small.reasons["hopper"] is None
    reason = "its 3x3 filters have images from 8x8 on, or whose number of pixels divides 64"
    assert small.forms["hopper"].endswith(f"the Hopper form does not serve this, {reason}")
    assert f"  hopper: supported, {small.forms['hopper']}" in str(small).splitlines()
    assert "3x3 filters" in explained(filter_size=5).forms["hopper"]
    assert explained(filter_size=1, size=4).forms == {"hopper": "in the Hopper form"}
    assert explained(stride=2).forms == {"hopper": "in the Hopper form"}
    assert "its filters of stride 2 have images from 4x4 on" in explained(size=3, stride=2).forms["hopper"]


def test_explain_says_that_two_inputs_are_not_upsampled_in_the_hopper_form() -> None:
    assert explained(upsample=2).forms == {"hopper": "in the Hopper form"}
    half = torch.empty(2, 32, 16, 16, dtype=torch.bfloat16)
    reason = "it upsamples one input of 3x3 filters with padding 1 and stride 1"
    assert explained(channels=32, x2=half, upsample=2).forms["hopper"].endswith(reason)
    assert explained(channels=32, x2=half).forms == {"hopper": "in the Hopper form"}


@pytest.mark.parametrize("op", ["routed_conv2d", "routed_conv2d_dgrad", "routed_conv2d_wgrad"])
def test_image_channels_have_a_form_of_their_own_which_comes_first_on_a_gpu(op: str) -> None:
    cpu = torch.device("cpu")
    first = ConvProblem(op, cpu, torch.bfloat16, 4, 16, 16, 3, 64, (3, 3), (1, 1), (1, 1), 16, 16, 2, 2)
    with cuda_launch.use_launcher(EmulatorLauncher(facts=H200)):
        for layer in (first, replace(first, in_channels=320, out_channels=6)):
            found = explain_problem(op, layer)
            assert found.forms["cuda"] == found.forms["hopper"] == "in the form of few channels"
            assert list(found.reasons) == ["cpu", "cuda", "triton", "hopper", "reference"]
        for other in (
            {"in_channels": 8}, {"out_channels": 60}, {"stride": (2, 2), "out_height": 8, "out_width": 8},
            {"padding": (0, 0), "out_height": 14, "out_width": 14}, {"upsample": 2, "out_height": 32, "out_width": 32},
            {"in_channels": 7, "x2_channels": 3}, {"height": 7, "width": 7, "out_height": 7, "out_width": 7},
            {"dtype": torch.float32, "tf32": True}, {"width": 4096, "out_width": 4096},
            {"filter": (5, 5), "padding": (2, 2)},
        ):  # fmt: skip
            problem = replace(first, **other)
            found = explain_problem(op, problem)
            assert "cuda" not in found.forms and (problem.fused or list(found.reasons)[1] == "triton"), other


def test_norms_are_streams_where_they_are_large() -> None:
    plan = RoutingPlan.from_groups(torch.tensor([0, 1]), 2)
    x = torch.empty(2, 64, 16, 16, dtype=torch.bfloat16)
    affine = torch.empty(2, 64, dtype=torch.bfloat16)
    with cuda_launch.use_launcher(EmulatorLauncher(facts=H200)):
        norm = explain(routed_group_norm, x, affine, affine, plan, num_groups=32)
    assert norm.forms["hopper"].startswith("in the portable form: it is no stream, its 2 chunks are less than two")
    assert norm.backend != "hopper"


def test_it_runs_on_request_alone() -> None:
    assert explained().backend in ("cpu", "cuda")
    assert explained(backend="hopper").backend == "hopper"


def test_another_architecture_is_refused_with_the_reason() -> None:
    reason = explained(A100).reasons["hopper"]
    assert reason == "it is for compute capability 9.0, not 8.0: `cuda` has the other kernels"
