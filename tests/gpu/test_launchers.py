"""The kernels that nvcc built ahead of time and those that NVRTC compiles here are the same: equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tdc_fast import RoutingPlan
from tdc_fast.ops import cuda_device, cuda_launch, cuda_native, cuda_nvrtc, native
from tests.cases import ConvCase, NormCase, upstream
from tests.emulator.harness import EmulatorLauncher, emulated
from tests.gpu.problems import Target, gradients, moved, on_device, routed
from tests.gpu.shapes import CONV_CASES, NORM_CASES

CASES = {
    "conv": CONV_CASES["widths"],
    "strided conv": CONV_CASES["stride 2"],
    "conv of two inputs": CONV_CASES["two inputs, odd seam"],
    "norm": NORM_CASES["widths"],
    "norm of two inputs": NORM_CASES["two inputs, odd seam"],
}
FAMILIES = {"conv": ("conv_forward", "conv_dgrad", "conv_wgrad"), "norm": ("group_norm", "group_norm_two")}


def both(device: str, operator: str) -> tuple[Any, Any]:
    """nvcc's and NVRTC's launchers. In the dry run two emulators that schedule threads in opposite orders."""
    if device == "cpu":
        libraries = [emulated(family) for family in ("plan", *FAMILIES[operator])]
        return tuple(EmulatorLauncher(*libraries, schedule=schedule) for schedule in (0, 1))
    arch = cuda_device.device_facts(torch.device("cuda"))[0]
    built = native.module.cuda_architectures
    if not built or not cuda_native.build_covers(built, arch):
        pytest.skip(f"the native module has no kernels for sm_{arch} (built for: {built or 'nothing, without nvcc'})")
    if (reason := cuda_nvrtc.unavailable(arch)) is not None:
        pytest.skip(reason)
    return cuda_native.Native(), cuda_nvrtc.Nvrtc()


@on_device
@pytest.mark.parametrize("name", CASES)
def test_both_give_the_same_bits(name: str, device: str) -> None:
    case: ConvCase | NormCase = CASES[name]
    results = []
    for launcher in both(device, "conv" if isinstance(case, ConvCase) else "norm"):
        with cuda_launch.use_launcher(launcher):
            leaves = moved(case.tensors(torch.bfloat16), device, case.layout)
            y = routed(case, leaves, Target(device, "cuda"))
            results.append(gradients(y, leaves, upstream(case, y.shape, torch.bfloat16)))
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key


@on_device
def test_both_sort_alike(device: str) -> None:
    groups, plans = torch.arange(77, device=device) * 5 % 7, []
    for launcher in both(device, "norm"):
        with cuda_launch.use_launcher(launcher):
            plans.append(RoutingPlan.from_groups(groups, 7))
    for name in ("order", "inverse", "offsets", "groups", "tiles"):
        assert torch.equal(getattr(plans[0], name), getattr(plans[1], name)), name


@pytest.mark.gpu
def test_nvrtc_compiles_once_per_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process (here: a second launcher) loads from the cache what the first one compiled."""
    arch = cuda_device.device_facts(torch.device("cuda"))[0]
    if (reason := cuda_nvrtc.unavailable(arch)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv(cuda_nvrtc.CACHE_VARIABLE, str(tmp_path))
    case, compiled = NORM_CASES["odd"], []
    original = cuda_nvrtc.compile_family
    monkeypatch.setattr(cuda_nvrtc, "compile_family", lambda *a, **k: (compiled.append(a[0]), original(*a, **k))[1])
    for _ in range(2):
        with cuda_launch.use_launcher(cuda_nvrtc.Nvrtc()):
            leaves = moved(case.tensors(torch.bfloat16), "cuda", case.layout)
            routed(case, leaves, Target("cuda", "cuda"))
    assert len(compiled) == len(set(compiled)) and "group_norm" in compiled
