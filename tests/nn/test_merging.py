"""Experts merged into one dense model: by the formula, with pruned channels where the base has them."""

from __future__ import annotations

import pytest
import torch

from tdc_fast import pack_experts
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.merging import Merging, expert_states, full_state, merge_states
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.nn.units import units_of
from tests.models.test_iddpm import randomise
from tests.nn import test_blocks as blocks
from tests.nn import test_packing as packing


def _fine_tuned(packed: RoutedModel) -> RoutedModel:
    """Experts with weights of their own."""
    generator = torch.Generator().manual_seed(3)
    for expert in range(packed.num_experts):
        state = packed.expert_state(expert)
        noise = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        packed.load_expert_state(expert, {name: value + noise[name] for name, value in state.items()})
    return packed.eval()


@torch.no_grad()
@pytest.mark.parametrize("scale_shift", [False, True])
def test_an_expert_with_zeros_in_the_channels_that_it_lacks_computes_what_it_does(scale_shift):
    base = packing.unet(use_scale_shift_norm=scale_shift).eval()
    packed = _fine_tuned(pack_experts(base, packing.GROUPS, packing.shuffled_plan(base, packing.PRUNED)))
    x, t, y = packing.batch()
    for expert, state in enumerate(expert_states(packed, base, "zero")):
        base.load_state_dict(state)
        torch.testing.assert_close(base(x, t, y), packed.expert(expert)(x, t, y), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_experts_of_models_of_others_get_their_channels_back_too():
    base = randomise(blocks.Net()).eval()
    widths = [{}, {unit.name: unit.widths()[1] for unit in units_of(base)}, dict.fromkeys(blocks.WIDTHS[2], 0)]
    packed = _fine_tuned(pack_experts(base, blocks.GROUPS, blocks.shuffled(base, widths)))
    x, context = blocks.inputs()
    for expert, state in enumerate(expert_states(packed, base, "zero")):
        base.load_state_dict(state)
        expected = packed.expert(expert)(x, blocks.T, context)
        torch.testing.assert_close(base(x, blocks.T, context), expected, rtol=1e-4, atol=1e-4)


def test_channels_that_an_expert_lacks_have_the_bases_weights():
    base, other = packing.unet(), packing.unet(seed=9)
    untrained = pack_experts(base, packing.GROUPS, packing.shuffled_plan(base, packing.PRUNED))
    own, changed = base.state_dict(), other.state_dict()
    for state in expert_states(untrained, base, "base"):
        assert all(torch.equal(value, own[name]) for name, value in state.items())
    for with_other, with_zeros in zip(
        expert_states(untrained, other), expert_states(untrained, other, "zero"), strict=True
    ):
        for name, value in with_other.items():  # no weight of either is zero
            assert torch.equal(value, torch.where(with_zeros[name] != 0, own[name], changed[name])), name


def test_an_average_and_task_arithmetic_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    base, *experts = [{"w": torch.randn(3, 2, generator=generator), "steps": torch.tensor(n)} for n in range(4)]
    a, b, c = (expert["w"].double() for expert in experts)

    def merged(**settings) -> torch.Tensor:
        state = merge_states(base, experts, Merging(**settings))
        assert state["w"].dtype == torch.float32 and state["steps"] == 0  # what is no float is the base's
        return state["w"].double()

    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(merged(), (a + b + c) / 3, **close)
    torch.testing.assert_close(merged(weights=(1, 0, 3)), (a + 3 * c) / 4, **close)
    origin = base["w"].double()
    task = origin + 0.5 * (2 * (a - origin) - (b - origin) + 0.25 * (c - origin))
    torch.testing.assert_close(merged(method="task_arithmetic", weights=(2, -1, 0.25), scale=0.5), task, **close)
    torch.testing.assert_close(merged(method="task_arithmetic"), merged(), **close)
    assert torch.equal(merged(method="task_arithmetic", scale=0.0), origin)
    assert torch.equal(merged(weights=(0, 1, 0)), b)


def test_experts_that_are_the_base_give_the_base_bit_for_bit():
    state = packing.unet().state_dict()
    merging = Merging(method="task_arithmetic", scale=7.0, weights=(0.3, 5, -2))
    assert all(torch.equal(value, state[name]) for name, value in merge_states(state, [state] * 3, merging).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0, 2.0)}, "weights: got .*one number for each of the 3 experts"),
        ({"weights": (1.0, -1.0, 1.0)}, "weights: .*at least 0"),
        ({"weights": (0.0, 0.0, 0.0)}, "weights: .*above"),
        ({"weights": (1.0, float("nan"), 1.0), "method": "task_arithmetic"}, "weights: .*finite"),
        ({"scale": 0.5}, "scale: got 0.5; expected 1, or --method task_arithmetic"),
        ({"method": "median"}, "method: got 'median'"),
        ({"missing": "mean"}, "missing: got 'mean'"),
    ],
)
def test_settings_that_make_no_model_are_refused_by_name(settings, message):
    state = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        merge_states(state, [state] * 3, Merging(**settings))


def test_experts_of_another_architecture_and_sums_without_a_value_are_refused():
    state = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="at least one"):
        merge_states(state, [], Merging())
    with pytest.raises(ValueError, match=r"experts\[1\]: got 'v'"):
        merge_states(state, [state, {"v": torch.ones(2)}], Merging())
    with pytest.raises(ValueError, match=r"experts\[0\]\['w'\]: got \(3,\); expected shape \(2,\)"):
        merge_states(state, [{"w": torch.ones(3)}], Merging())
    huge = {"w": torch.full((2,), 3e38)}
    with pytest.raises(FloatingPointError, match="w would hold infinities"):
        merge_states(state, [huge, huge], Merging(method="task_arithmetic", weights=(1, 1)))


def test_a_state_of_a_whole_expert_is_taken_as_it_is():
    base: UNet = packing.unet()
    state = {name: value + 1 for name, value in base.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in full_state(base, state, None, "zero").items())
