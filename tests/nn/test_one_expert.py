"""A dense model called as a packed model of one expert: the same values and gradients, the same parameters and keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.nn.one_expert import OneExpert, kernels_serve

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # a dense GroupNorm has fp32 statistics also in fp64


def unet(dropout: float = 0.0) -> UNet:
    torch.manual_seed(0)
    model = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, num_heads=2, channel_mult="1,2", in_channels=1,
        attention_resolutions="4", class_cond=True, num_classes=3, dropout=dropout,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 60, (5,), generator=generator), torch.randint(0, 3, (5,), generator=generator)


def test_values_and_gradients_are_those_of_the_dense_model(batch):
    x, t, y = batch
    model = unet().double()
    one = OneExpert(model)
    results = []
    for call in (model, one):
        model.zero_grad()
        out = call(x, t, y=y)
        out.square().mean().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
    for (name, parameter), ours, dense in zip(model.named_parameters(), results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, dense, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        assert parameter.grad.stride() == parameter.stride(), name  # so that the optimizer reads both in one order


def test_it_reads_the_models_own_parameters_and_adds_none(batch):
    x, t, y = batch
    model = unet().double()
    keys = set(model.state_dict())
    one = OneExpert(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(one(x, t, y=y), model(x, t, y=y), **CLOSE)
        model.load_state_dict(unet().double().state_dict())
        torch.testing.assert_close(one(x, t, y), model(x, t, y), **CLOSE)
    assert set(model.state_dict()) == keys


def test_dropout_follows_the_mode_of_the_dense_model(batch):
    x, t, y = batch
    model = unet(dropout=0.5).double()
    one = OneExpert(model)
    assert not torch.equal(one(x, t, y=y), one(x, t, y=y))
    model.eval()
    assert torch.equal(one(x, t, y=y), one(x, t, y=y))


def test_under_autocast_it_computes_in_bf16(batch):
    x, t, y = batch
    model = unet()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = OneExpert(model)(x.float(), t, y=y)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(out.float(), model(x.float(), t, y=y), rtol=3e-2, atol=3e-2)


def test_without_a_gpu_it_is_not_worth_it():
    assert not kernels_serve(torch.device("cpu"), torch.bfloat16)
