"""Random number generators that are seeded, saved and restored."""

from __future__ import annotations

import random

import numpy as np
import torch

from tdc_fast.training.random_state import derived_seed, random_state, restore_random_state, seeded


def draws() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random(), float(np.random.randn())]


def test_all_generators_return_to_a_saved_state_even_through_a_file(tmp_path):
    draws()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    draws()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


def test_a_seeded_block_repeats_and_leaves_no_trace():
    before = random_state()
    with seeded(derived_seed(0, "a")):
        one = draws()
    with seeded(derived_seed(0, "a")):
        assert draws() == one
    with seeded(derived_seed(0, "b")):
        assert draws() != one
    after = random_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]
