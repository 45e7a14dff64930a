"""A packed model is moved and converted as any module is, and a model that cannot be pruned is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.diffusion import create_diffusion
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.ops.layout import is_channel_innermost
from tdc_fast.pruning import prune
from tdc_fast.pruning.costs import unit_costs

GROUPS = TimestepGroups.uniform(100, 3)


def packed() -> RoutedModel:
    torch.manual_seed(0)
    base = create_unet(image_size=8, num_channels=8, num_res_blocks=1, attention_resolutions="4", channel_mult="1,2")
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.1)
    return pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, [1.0, 0.5, 0.0]))


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "channels_last and a dtype": lambda m: m.to(torch.float64, memory_format=torch.channels_last),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "preserved": lambda m: m.to(torch.float32),
    "there and back": lambda m: m.double().float(),
    "share_memory": lambda m: m.share_memory(),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_packed_model_converts_as_a_dense_one(conversion: str) -> None:
    model = packed()
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([99, 3, 50, 20])
    expected = model(x, t)
    expected.sum().backward()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    converted = CONVERSIONS[conversion](model)
    torch.testing.assert_close(converted(x, t).float(), expected, rtol=1e-4, atol=1e-4)
    for name, parameter in converted.named_parameters():
        assert parameter.shape == shapes[name] and parameter.requires_grad and parameter.is_leaf, name
        assert parameter.grad is None or parameter.grad.shape == shapes[name]
        if conversion.startswith("channels_last") and parameter.dim() == 5:
            assert is_channel_innermost(parameter), name
    converted(x, t).sum().backward()


def test_a_packed_model_is_where_its_base_is() -> None:
    with torch.device("meta"):
        base = create_unet(image_size=8, num_channels=8, num_res_blocks=1, attention_resolutions="", channel_mult="1")
    model = pack_experts(base, GROUPS)
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_a_state_dict_of_other_experts_is_refused_wherever_the_model_is() -> None:
    base = create_unet(image_size=8, num_channels=8, num_res_blocks=1, attention_resolutions="", channel_mult="1")
    other = pack_experts(base, TimestepGroups([0, 1, 2, 100])).state_dict()
    model = pack_experts(base, GROUPS)
    for target in (model, copy.deepcopy(model).to("meta")):
        with pytest.raises(RuntimeError, match="group_boundaries: got"):
            target.load_state_dict(other, assign=True)


@pytest.mark.parametrize("base", [nn.Conv2d(3, 3, 1), None, "model", nn.Sequential()], ids=lambda b: type(b).__name__)
def test_a_model_without_pruning_units_is_told_what_it_must_have(base: Any) -> None:
    process = create_diffusion(diffusion_steps=100)
    batches = [torch.zeros(2, 3, 8, 8)]
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("base", lambda: WidthPlan.uniform(base, GROUPS.boundaries, 0.5)),
        ("base", lambda: prune(base, GROUPS, process, batches, k=0.5)),
        ("model", lambda: unit_costs(base, batches[0])),
    ]
    if isinstance(base, nn.Module):
        plan = packed().widths
        calls.append(("base_or_experts", lambda: pack_experts(base, GROUPS, plan)))
    for argument, call in calls:
        with pytest.raises(ValueError, match=rf"^{argument}: got .*; expected an nn.Module with pruning_units\(\)"):
            call()
