"""What widths promise: channels of x at or past them are zeros. Our operators keep it, and a plan can check it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdc_fast import RoutingPlan, TimestepGroups, pack_experts, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.candidates import CandidateModel
from tests.validating import validate_every_plan

GROUPS, WIDTHS = torch.tensor([0, 0, 1, 2]), torch.tensor([8, 4, 0], dtype=torch.int32)


def images() -> Tensor:
    """(4, 8, 3, 3), zeros past the widths of these groups."""
    x = torch.ones(4, 8, 3, 3)
    x[2, 4:], x[3] = 0, 0
    return x


def conv(x: Tensor, plan: RoutingPlan) -> Tensor:
    return routed_conv2d(x, torch.ones(3, 2, 8, 3, 3), None, plan, padding=1, in_widths=WIDTHS)


def conv_of_two(x: Tensor, plan: RoutingPlan) -> Tensor:
    """The widths end in x2, in x, and before it."""
    first, second = x.split([5, 3], dim=1)
    return routed_conv2d(first, torch.ones(3, 2, 8, 1, 1), None, plan, in_widths=WIDTHS, x2=second)


def linear(x: Tensor, plan: RoutingPlan) -> Tensor:
    return routed_linear(x.flatten(2).transpose(1, 2).contiguous(), torch.ones(3, 2, 8), None, plan, in_widths=WIDTHS)


def norm(x: Tensor, plan: RoutingPlan) -> Tensor:
    return routed_group_norm(x, torch.ones(3, 8), torch.ones(3, 8), plan, num_groups=4, widths=WIDTHS)


@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
@pytest.mark.parametrize("operator", [conv, conv_of_two, linear, norm])
def test_a_validating_plan_refuses_what_is_not_zero_past_a_width(
    operator: Callable[[Tensor, RoutingPlan], Tensor], value: float
) -> None:
    plain, checking = (RoutingPlan.from_groups(GROUPS, 3, validate=validate) for validate in (False, True))
    assert torch.equal(operator(images(), plain), operator(images(), checking))
    for sample, channel, live in ((2, 4, 4), (2, 7, 4), (3, 0, 0)):
        wrong = images()
        wrong[sample, channel, 1, 2] = value
        second = operator is conv_of_two and channel >= 5
        where = f"channel {channel - 5 * second} of sample {sample}'; expected zeros: its group"
        said = f"x{'2' * second}: got .* in {where}"
        with pytest.raises(ValueError, match=f"{said} {sample - 1} has {live} live channels .*widths"):
            operator(wrong, checking)
        operator(wrong, plain)
    living = images()
    living[:2] = value  # a live channel may hold anything
    operator(living, checking)


def test_plans_that_come_from_a_validating_one_check_as_well() -> None:
    plan = RoutingPlan.from_groups(GROUPS, 3, validate=True)
    wrong = images()
    wrong[2, 7] = 1
    assert plan.merged([0, 0, 1], 2).validate and plan.repeated(2, 3).validate
    with pytest.raises(ValueError, match="channel 7 of sample 2"):
        conv(wrong, plan.with_weight_index([0, 1, 1]))


def test_what_a_transform_holds_is_passed_over_and_the_rest_is_checked() -> None:
    wrong = images()
    wrong[2, 5] = 1
    first, second = wrong.split([5, 3], dim=1)
    plan = RoutingPlan.from_groups(GROUPS, 3, validate=True)

    def result(x: Tensor, x2: Tensor) -> Tensor:
        return routed_conv2d(x, torch.ones(3, 2, 8, 1, 1), None, plan, in_widths=WIDTHS, x2=x2)

    torch.func.jvp(lambda x2: result(first, x2), (second,), (second,))
    with pytest.raises(ValueError, match="x2: got '1.0 in channel 0 of sample 2'"):
        torch.func.jvp(lambda x: result(x, second), (first,), (first,))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All plans validate; what they checked."""
    return validate_every_plan(monkeypatch)


def unet(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    net = create_unet(
        image_size=8, num_channels=16, num_res_blocks=1, num_heads=2, channel_mult="1,2", in_channels=1,
        attention_resolutions="4", **changes,
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("low_precision", [False, True])
def test_a_unet_feeds_only_zeros_past_the_widths_of_its_experts(
    checked: list[str], scale_shift: bool, low_precision: bool
) -> None:
    base, groups = unet(use_scale_shift_norm=scale_shift, dropout=0.3), TimestepGroups.uniform(8, 4)
    model = pack_experts(base, groups, WidthPlan.uniform(base, groups.boundaries, [1.0, 0.5, 0.0, 0.5])).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        y = model(torch.randn(8, 1, 8, 8), torch.arange(8))
    y.float().square().sum().backward()
    assert checked.count("in_widths") > 8 and checked.count("widths") >= 4
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_candidates_feed_only_zeros_past_their_widths(checked: list[str]) -> None:
    base = unet()
    units = base.pruning_units()
    model = CandidateModel(base, {unit.name: range(unit.num_atoms) for unit in units})
    candidates = [{unit.name: unit.widths()[i % len(unit.widths())] for unit in units} for i in range(3)]
    with torch.no_grad(), model.of_widths(candidates) as denoiser:
        assert denoiser(torch.randn(6, 1, 8, 8), torch.arange(6)).isfinite().all()
    assert checked.count("in_widths") > 8 and checked.count("widths") >= 4
