"""Denoisers of diffusers, with random weights: packed, pruned, searched, and taken apart into experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

from diffusers import DiTTransformer2DModel, Transformer2DModel, UNet2DConditionModel, UNet2DModel  # noqa: E402

from tdc_fast import TimestepGroups, pack_experts  # noqa: E402
from tdc_fast.diffusion import create_diffusion  # noqa: E402
from tdc_fast.nn.macs import measure_macs  # noqa: E402
from tdc_fast.nn.per_group import PerGroup  # noqa: E402
from tdc_fast.nn.units import units_of  # noqa: E402
from tdc_fast.nn.width_plan import WidthPlan  # noqa: E402
from tdc_fast.pruning import plan_pruning  # noqa: E402
from tests.models.test_iddpm import randomise  # noqa: E402
from tests.nn.test_blocks import shuffled, without_dead_channels  # noqa: E402
from tests.validating import validate_every_plan  # noqa: E402

GROUPS = TimestepGroups.uniform(1000, 3)
T = torch.tensor([900, 10, 500, 333, 700])
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
LEVELS = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1}
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
CROSS_DOWN, CROSS_UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
TOKENS = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 3, "sample_size": 8, "num_layers": 1}


def unet() -> UNet2DModel:
    attention = {"down_block_types": DOWN, "up_block_types": UP, "attention_head_dim": 8}
    return UNet2DModel(**LEVELS, **attention, norm_num_groups=4)


def resampling_unet() -> UNet2DModel:
    """Scale and shift, classes, and resampling in residual blocks."""
    types = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    types["up_block_types"] = ("AttnUpBlock2D", "ResnetUpsampleBlock2D")
    return UNet2DModel(
        **LEVELS, **types, norm_num_groups=4, resnet_time_scale_shift="scale_shift", num_class_embeds=3,
        downsample_type="resnet", upsample_type="resnet", attention_head_dim=8,
    )  # fmt: skip


def conditional_unet() -> UNet2DConditionModel:
    blocks = {"down_block_types": CROSS_DOWN, "up_block_types": CROSS_UP}
    return UNet2DConditionModel(**LEVELS, **blocks, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6)


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**TOKENS, num_embeds_ada_norm=3)


def transformer() -> Transformer2DModel:
    return Transformer2DModel(
        **TOKENS, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=3, activation_fn="geglu",
        attention_bias=True, norm_elementwise_affine=False,
    )  # fmt: skip


def simple_cross_unet() -> UNet2DConditionModel:
    """Attention to text that is normalised there; it asks for the class of the norm, so it runs once per group."""
    types = {"down_block_types": ("SimpleCrossAttnDownBlock2D",), "up_block_types": ("SimpleCrossAttnUpBlock2D",)}
    return UNet2DConditionModel(
        **{**LEVELS, "block_out_channels": (32,)}, **types, mid_block_type=None, attention_head_dim=8,
        cross_attention_dim=32, cross_attention_norm="group_norm",
    )  # fmt: skip


LABELS, TEXT = torch.tensor([0, 2, 1, 0, 2]), torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(4))
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], int]] = {  # model, conditions, units
    "unet": (unet, {}, 8 + 4),
    "resampling unet": (resampling_unet, {"class_labels": LABELS}, 10 + 4),
    "conditional unet": (conditional_unet, {"encoder_hidden_states": TEXT}, 8 + 4 * 3),
    "dit": (dit, {"class_labels": LABELS}, 2),
    "transformer": (transformer, {"class_labels": LABELS}, 2),
}


def made(name: str, seed: int = 0) -> Any:
    return randomise(MODELS[name][0](), seed).eval()


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def dense(model: Any, name: str, chosen: Any) -> Tensor:
    """The model's own output for some of the samples."""
    conditions = {key: value[chosen] for key, value in MODELS[name][1].items()}
    return model(images()[chosen], timestep=T[chosen], **conditions).sample


@pytest.mark.parametrize("name", MODELS)
def test_every_sample_gets_its_own_expert(name: str) -> None:
    experts = [made(name, seed) for seed in range(3)]
    routed = pack_experts(experts, GROUPS)
    assert not any(isinstance(leaf, PerGroup) for leaf in routed.routed_leaves().values())
    expected = torch.cat([dense(experts[g], name, [i]) for i, g in enumerate(GROUPS.group_of(T))])
    out = routed(images(), T, **MODELS[name][1])
    assert type(out) is type(experts[0](images()[:1], timestep=T[:1], **{k: v[:1] for k, v in MODELS[name][1].items()}))
    torch.testing.assert_close(out.sample, expected, **CLOSE)
    torch.testing.assert_close(routed(images(), T, **MODELS[name][1], return_dict=False)[0], expected, **CLOSE)
    torch.testing.assert_close(dense(routed.expert(1), name, slice(0, 5)), dense(experts[1], name, slice(0, 5)))


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_expert_is_the_base_without_its_dead_channels(name: str) -> None:
    base = made(name)
    units = units_of(base)
    assert len(units) == MODELS[name][2]
    some = {unit.name: unit.widths()[(index % 3) * (len(unit.widths()) - 1) // 2] for index, unit in enumerate(units)}
    plan = shuffled(base, [{}, some, {unit.name: 0 for unit in units}], GROUPS)
    routed = pack_experts(base, GROUPS, plan)
    found = routed(images(), T, **MODELS[name][1]).sample
    sizes = []
    for index in range(3):
        mine, expert = GROUPS.group_of(T) == index, routed.expert(index)
        expected = dense(without_dead_channels(base, plan, index), name, mine)
        torch.testing.assert_close(found[mine], expected, **CLOSE)
        torch.testing.assert_close(dense(expert, name, mine), expected, **CLOSE)
        assert type(expert) is type(base)
        sizes.append(sum(parameter.numel() for parameter in expert.parameters()))
    assert sizes[0] > sizes[1] > sizes[2]


def test_attention_that_asks_for_the_class_of_its_norm_is_packed() -> None:
    experts, text = [randomise(simple_cross_unet(), seed) for seed in range(3)], torch.randn(5, 3, 32)
    routed = pack_experts(experts, GROUPS)
    expected = [experts[g](images()[[i]], T[[i]], text[[i]]).sample for i, g in enumerate(GROUPS.group_of(T))]
    torch.testing.assert_close(routed(images(), T, text).sample, torch.cat(expected), **CLOSE)


def test_gradient_checkpointing_of_diffusers_recomputes_under_its_own_plan() -> None:
    name = "conditional unet"
    routed = pack_experts([made(name, seed).train() for seed in range(3)], GROUPS)
    model = copy.deepcopy(routed)

    def gradients(model: Any) -> list[Tensor]:
        first = model(images(), T, **MODELS[name][1]).sample
        second = model(images()[:3], T[2:], encoder_hidden_states=TEXT[:3]).sample
        (first.square().sum() + second.square().sum()).backward()
        return [parameter.grad for parameter in model.parameters()]

    model.model.enable_gradient_checkpointing()
    for found, expected in zip(gradients(model), gradients(routed), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_search_finds_widths_below_the_budget() -> None:
    """Taylor importance, measured MACs and candidates in one routed batch, straight on a model of diffusers."""
    base, diffusion, groups = made("unet"), create_diffusion(), TimestepGroups.uniform(1000, 2)
    found = plan_pruning(base, groups, diffusion, [images()[:2]], k=0.6, agent="evolution", rounds=2, candidates=2)
    routed, x = pack_experts(base, groups, found.plan), images()[:2]
    assert min(found.plan.macs) < 0.9 * found.base_macs
    for index, (start, _) in enumerate(groups):
        t, expert = torch.full((2,), start), routed.expert(index)
        assert measure_macs(expert, x, t) == 2 * found.plan.macs[index] <= 2 * found.plan.budgets[index]
        torch.testing.assert_close(routed(x, t).sample, expert(x, t).sample, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_diffusers_feed_only_zeros_past_the_widths_of_their_experts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two routed layers they have layers of their own."""
    make, conditions, _ = MODELS[name]
    base, checked = randomise(make()), validate_every_plan(monkeypatch)
    packed = pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, [1.0, 0.5, 0.0]))
    with torch.no_grad():
        packed(torch.randn(5, 3, 8, 8), T, **conditions)
    assert "in_widths" in checked


def test_a_norm_of_one_timestep_for_the_whole_batch_is_refused_by_path() -> None:
    """VQ-Diffusion's transformer takes its scale and shift along the batch."""
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4}
    model = Transformer2DModel(**shape, num_vector_embeds=12, num_embeds_ada_norm=100)
    with pytest.raises(ValueError, match=r"module 'transformer_blocks.0.norm1': got 'AdaLayerNorm'; expected a norm"):
        pack_experts(model, TimestepGroups.uniform(100, 4))
