"""CUDA kernels in the emulator, launched by a repeated call, compute what the backend's own launches compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.stand_in_gpu import dense_memory, with_tiles
from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm
from tdc_fast.ops import backends, call_cache, checks, cuda_launch
from tdc_fast.ops.replay import Replayed
from tests.emulator.conv import FAMILIES, MANY_SMS
from tests.emulator.harness import AT_RUNTIME, EmulatorLauncher, emulated, plain_only

# A call that is repeated with the addresses of an earlier one has other results, which needs no sanitizer to be seen.
pytestmark = [pytest.mark.usefixtures("repeating"), plain_only]
BATCH, GROUPS = 4, 2


def results() -> list[Tensor]:
    """Outputs and gradients of convolutions and group norms of random numbers."""
    plan = with_tiles(RoutingPlan.from_groups(torch.tensor([0, 1, 0, 1]), GROUPS))
    found = []

    def run(operator: Any, shapes: tuple[tuple[int, ...], ...], **settings: Any) -> None:
        tensors = [dense_memory(*shape).requires_grad_() for shape in shapes]
        second = {"x2": tensors[3]} if len(tensors) > 3 else {}
        y = operator(*tensors[:3], plan, **settings, **second, backend="cuda")
        dy = dense_memory(*y.shape)
        found.extend([y, *torch.autograd.grad(y, tensors, dy)])

    run(routed_conv2d, ((BATCH, 16, 5, 6), (GROUPS, 24, 16, 3, 3), (GROUPS, 24)), padding=1)
    run(routed_group_norm, ((BATCH, 16, 5, 6), (GROUPS, 16), (GROUPS, 16)), num_groups=4, activation="silu")
    x, x2 = (BATCH, 16, 3, 2), (BATCH, 8, 3, 2)
    run(routed_conv2d, (x, (GROUPS, 8, 24, 3, 3), (GROUPS, 8), x2), padding=1, upsample=2)
    run(routed_group_norm, (x, (GROUPS, 24), (GROUPS, 24), x2), num_groups=2)
    return [t.detach() for t in found]


def test_a_repeated_call_computes_what_its_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_check_tiles", lambda *_: None)  # a plan in host memory has none
    launcher = EmulatorLauncher(
        *(emulated(family, AT_RUNTIME) for family in (*FAMILIES, "group_norm", "group_norm_two")), facts=MANY_SMS
    )
    with cuda_launch.use_launcher(launcher):
        for seed in (0, 1, 2, 3):
            torch.manual_seed(seed)
            repeated = results()
        calls = [call.run for call in call_cache.cached_calls()]
        assert len(calls) == 10
        assert not any(isinstance(call, Replayed) and call.never_repeats for call in calls)
        backends.forget()
        torch.manual_seed(3)
        assert all(map(torch.equal, repeated, results()))


@pytest.mark.parametrize("size", [3, 1])
def test_a_repeated_call_of_the_hopper_form_describes_its_own_tensors(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its addresses are in descriptions of tensor maps, which a launcher for a GPU encodes again."""
    monkeypatch.setattr(checks, "_check_tiles", lambda *_: None)
    families: tuple[str, ...] = ("conv_hopper_rows", "conv_hopper_rows_wgrad")
    if size == 3:
        families = ("conv_hopper_forward", "conv_hopper_dgrad", "conv_hopper_wgrad")
    libraries = [emulated(family, AT_RUNTIME) for family in (*families, "conv_wgrad")]
    launcher = EmulatorLauncher(*libraries, facts=(90, 132, 232448))

    def once(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        plan = with_tiles(RoutingPlan.from_groups(torch.tensor([0, 1]), GROUPS))
        shapes = ((2, 64, 8, 8), (GROUPS, 64, 64, size, size), (GROUPS, 64))
        tensors = [dense_memory(*shape).bfloat16().requires_grad_() for shape in shapes]
        y = routed_conv2d(*tensors, plan, padding=size // 2, backend="hopper")
        dy = dense_memory(*y.shape).bfloat16()
        return [y.detach(), *torch.autograd.grad(y, tensors, dy)]

    with cuda_launch.use_launcher(launcher):
        first, *_, repeated = [once(seed) for seed in (0, 1, 2, 3)]
        calls = [call.run for call in call_cache.cached_calls()]
        assert len(calls) == 3
        assert not any(isinstance(call, Replayed) and call.never_repeats for call in calls)
        backends.forget()
        assert all(map(torch.equal, repeated, once(3)))
        assert not torch.equal(first[0], repeated[0])
