"""The tests that need a GPU run every kernel of the Hopper form: none runs for the first time where a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tdc_fast.ops import cuda_launch, native
from tdc_fast.ops.cuda_device import Facts
from tests.cases import ConvCase
from tests.gpu import sanitized
from tests.gpu.problems import FEW_SMS, on_sms
from tests.gpu.shapes import HOPPER_CASES

pytestmark = pytest.mark.skipif(native.module is None, reason="the native module is not built")
SMS, SHARED = 132, 232448  # of an H200
PLANE = 1 << 40
ADDRESSES = {
    "forward": ("x", "weight", "bias", "sample_bias", "residual", "y", "tiles"),
    "dgrad": ("dy", "weight", "dx", "tiles"),
    "wgrad": ("x", "dy", "dweight", "dbias", "dsample_bias"),
}
SECOND = {"forward": "x2", "dgrad": "dx2", "wgrad": "x2"}


def launched(case: ConvCase, sms: int) -> Iterator[str]:
    """The kernels of a case, forward and backward, in bf16."""
    sizes: dict[str, Any] = {
        "dtype": 1, "tf32": False, "batch": case.routing.batch, "height": case.size[0], "width": case.size[1],
        "in_channels": case.in_channels, "out_channels": case.out_channels, "x2_channels": case.x2_channels,
        "upsample": case.upsample, "num_groups": case.routing.num_groups, "num_experts": case.routing.num_experts,
    }  # fmt: skip
    for name, (height, width) in {"filter": case.filter, "stride": case.stride, "pad": case.padding}.items():
        sizes |= {f"{name}_height": height, f"{name}_width": width}
    common = {"offsets": PLANE, "weight_index": PLANE, "in_widths": 0, "out_widths": 0, "workspace": PLANE}
    for direction, names in ADDRESSES.items():
        own = dict.fromkeys(names, PLANE) | ({SECOND[direction]: PLANE} if case.x2_channels else {})
        planner = getattr(native.module, f"cuda_launches_conv_{direction}")
        for launch in planner(**own, **common, **sizes, hopper=True, device=(90, sms, SHARED)):
            yield launch.kernel


def every_kernel() -> set[str]:
    families = [kernels for family, kernels in native.module.cuda_kernels.items() if "hopper" in family]
    return {kernel for kernels in families for kernel in kernels if "fp16" not in kernel}


def test_the_tests_run_every_kernel_of_the_form() -> None:
    found = {kernel for case in HOPPER_CASES.values() for sms in (SMS, FEW_SMS) for kernel in launched(case, sms)}
    assert not every_kernel() - found, "add cases to HOPPER_CASES, whose few SMs choose other tiles than all do"
    assert found - {kernel for case in HOPPER_CASES.values() for kernel in launched(case, SMS)}


def test_the_sanitizer_watches_every_kernel_of_the_form() -> None:
    cases = sanitized.cases_of("hopper")
    found = {
        kernel
        for case, few in cases
        if isinstance(case, ConvCase)
        for kernel in launched(case, FEW_SMS if few else SMS)
    }
    assert not every_kernel() - found, "add cases to OF_HOPPER"


def test_few_sms_are_what_planners_see() -> None:
    class OfH200:
        name = "stand-in"

        def device_facts(self, device: torch.device) -> Facts:
            return 90, SMS, SHARED

        def run(self, launches: Any, device: torch.device) -> None:
            raise AssertionError("nothing runs")

    host = torch.device("cpu")
    with cuda_launch.use_launcher(OfH200()):
        with on_sms(True):
            assert cuda_launch.launcher_facts(host) == (90, FEW_SMS, SHARED)
        assert cuda_launch.launcher_facts(host) == (90, SMS, SHARED)
