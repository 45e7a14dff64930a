"""The digits classifier is good enough to be a feature space, and the same each time."""

from __future__ import annotations

import torch

from tdc_fast.evaluation.classifier import digits_uint8, train_classifier


def test_it_names_held_out_digits_and_is_deterministic():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = train_classifier(epochs=12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.accuracy > 0.96
    torch.manual_seed(4)
    second = train_classifier(epochs=12)
    images, _ = digits_uint8()
    assert torch.equal(first.model(images[:50]), second.model(images[:50]))
    assert first.model(images[:50]).shape == (50, 64)


def test_digits_keep_their_seventeen_grey_levels():
    images, labels = digits_uint8()
    assert images.shape == (1797, 1, 8, 8)
    assert images.unique().numel() == 17
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert sorted(labels.unique().tolist()) == list(range(10))
