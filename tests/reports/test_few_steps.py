"""Few sampling steps: experts that they leave idle are named, and the spacing of the steps can be chosen."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast import TimestepGroups
from tdc_fast.diffusion import create_diffusion, sample
from tdc_fast.diffusion.samplers import sampling_steps
from tests.generated import examples

GROUPS = TimestepGroups.uniform(1000, 8)


class Experts:
    """Stands for a packed model of eight experts."""

    groups = GROUPS

    def __call__(self, x, t, **kwargs):
        return x


def said(sampler: str, steps: int | None, respacing: str = "", **more) -> list[str]:
    diffusion = create_diffusion(1000, timestep_respacing=respacing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(diffusion, Experts(), (1, 1, 2, 2), sampler=sampler, steps=steps, **more)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("sampler", "idle"), [("ddpm", 4), ("ddim", 4), ("dpm++2m", 5)])
def test_few_steps_count_the_experts_that_they_leave_idle(sampler, idle):
    (message,) = said(sampler, 4)
    assert f"4 sampling steps leave {idle} of 8 experts idle" in message


def test_the_idle_experts_are_named_with_their_timesteps():
    (message,) = said("ddim", 4)  # timesteps 0, 250, 500, 750
    assert "idle: 1 (t 125 to 249), 3 (t 375 to 499), 5 (t 625 to 749), 7 (t 875 to 999)" in message


def test_a_respaced_process_is_judged_by_its_original_timesteps():
    (message,) = said("ddpm", None, "ddim4")
    assert "idle: 1 (t 125 to 249)" in message


def test_steps_that_reach_every_expert_are_not_warned_of():
    assert not said("ddim", 8) and not said("ddpm", 8) and not said("ddim", 50)


def test_the_default_spacing_is_that_of_the_sampler():
    diffusion = create_diffusion(1000)
    assert sampling_steps(diffusion, "ddim", 4) == sampling_steps(diffusion, "ddpm", 4, "leading") == (0, 250, 500, 750)
    assert sampling_steps(diffusion, "ddpm", 4) == sampling_steps(diffusion, "ddim", 4, "linspace")
    assert sampling_steps(diffusion, "ddpm", 4) == (0, 333, 666, 999)
    assert sampling_steps(diffusion, "ddim", 4, "trailing") == (249, 499, 749, 999)
    assert sampling_steps(diffusion, "dpm++2m", 4, "trailing") == (249, 499, 749, 999)


@examples(60)
@given(total=st.integers(1, 300), data=st.data(), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_every_spacing_visits_distinct_rising_timesteps(total, data, spacing):
    steps = data.draw(st.integers(1, total))
    for sampler in ("ddpm", "ddim", "dpm++2m"):
        visited = sampling_steps(create_diffusion(total, noise_schedule="cosine"), sampler, steps, spacing)
        assert len(visited) == steps and sorted(set(visited)) == list(visited)
        assert visited[0] >= 0 and visited[-1] < total
    if spacing == "trailing" or (spacing == "linspace" and steps > 1):
        assert visited[-1] == total - 1


def test_an_unknown_spacing_is_refused_by_name():
    with pytest.raises(ValueError, match="spacing: got 'even'; expected one of auto, leading"):
        sample(create_diffusion(100), Experts(), (1, 1, 2, 2), spacing="even")


def test_every_step_is_announced():
    count = []
    diffusion = create_diffusion(100)
    sample(diffusion, lambda x, t: torch.zeros_like(x), (1, 1, 2, 2), steps=5, on_step=lambda: count.append(1))
    assert len(count) == 5
