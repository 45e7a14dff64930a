from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.diffusion import Diffusion, create_diffusion, named_betas
from tdc_fast.diffusion.respacing import spaced_timesteps


def test_ddim_spacing_is_the_smallest_stride_with_that_many_steps():
    assert spaced_timesteps(1000, "ddim25") == tuple(range(0, 1000, 40))
    assert spaced_timesteps(1000, "ddim250") == tuple(range(0, 1000, 4))
    assert spaced_timesteps(10, "ddim10") == tuple(range(10))


def test_a_count_spreads_evenly_and_keeps_both_ends():
    assert spaced_timesteps(1000, "3") == spaced_timesteps(1000, 3) == (0, 500, 999)  # 499.5 rounds to even
    assert spaced_timesteps(10, "1") == (0,)


def test_counts_divide_the_range_into_sections_the_first_ones_longer():
    # 300 steps in three sections of 100, as improved-diffusion's documentation has it.
    kept = spaced_timesteps(300, "10,15,20")
    assert [sum(start <= t < start + 100 for t in kept) for start in (0, 100, 200)] == [10, 15, 20]
    assert spaced_timesteps(7, [2, 2]) == (0, 3, 4, 6)


@pytest.mark.parametrize("spacing", ["ddim999", "ddim", "ddimx", "1001", "600,1", "", "a,b", [], "0", [-1, 5]])
def test_impossible_spacings_are_refused_by_name(spacing):
    with pytest.raises(ValueError, match="timestep_respacing"):
        spaced_timesteps(1000, spacing)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["linear", "cosine"]), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_a_respaced_process_has_the_same_marginals_and_remembers_the_original_steps(schedule, counts):
    base = create_diffusion(200, noise_schedule=schedule)
    short = base.respaced(counts)
    assert short.num_timesteps == len(short.timestep_map)
    assert short.original_num_timesteps == 200
    np.testing.assert_allclose(short.alphas_cumprod, base.alphas_cumprod[list(short.timestep_map)], rtol=1e-9)


def test_respacing_twice_still_points_into_the_first_process():
    twice = create_diffusion(1000).respaced("ddim100").respaced("ddim10")
    assert twice.timestep_map == tuple(range(0, 1000, 100))


def test_the_denoiser_of_a_respaced_process_sees_original_integer_timesteps():
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    diffusion = Diffusion(named_betas("linear", 1000)).respaced("ddim25")
    diffusion.training_losses(model, torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 24]))
    assert seen[0].tolist() == [0, 40, 960] and seen[0].dtype == torch.int64


def test_flags_of_improved_diffusion_select_the_process():
    process = create_diffusion(learn_sigma=True, noise_schedule="cosine", timestep_respacing="ddim50")
    assert (process.variance, process.loss, process.prediction) == ("learned_range", "rescaled_mse", "epsilon")
    assert process.num_timesteps == 50 and process.timestep_scale == 1.0
    process = create_diffusion(4000, use_kl=True, predict_xstart=True, sigma_small=True)
    assert (process.variance, process.loss, process.prediction) == ("fixed_small", "rescaled_kl", "x0")
    assert process.timestep_scale == 0.25
    process = create_diffusion(500, rescale_timesteps=False, rescale_learned_sigmas=False)
    assert (process.variance, process.loss, process.timestep_scale) == ("fixed_large", "mse", 1.0)
