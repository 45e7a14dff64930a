"""Denoisers for inference: weights in 16 bits give what autocast gives; a dense model runs as one expert if asked."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.nn.inference import ForInference, denoiser_in, for_inference
from tdc_fast.nn.packing import pack_experts
from tests.nn.test_casts import Casts
from tests.nn.test_packing import GROUPS, PRUNED, batch, shuffled_plan, unet
from tests.operators import Recorded
from tests.tolerance import max_error

BF16 = torch.bfloat16


def under_autocast(model: nn.Module) -> Tensor:
    x, t, y = batch()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        return model(x, t, y=y).float()


@pytest.mark.parametrize("kind", ["dense", "packed", "pruned"])
def test_weights_that_were_cast_once_give_the_bits_of_autocast(kind: str) -> None:
    model: nn.Module = unet()
    if kind != "dense":
        model = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED) if kind == "pruned" else None)
    model.eval()
    expected = under_autocast(model)
    x, t, y = batch()
    prepared = for_inference(copy.deepcopy(model), BF16)
    with torch.no_grad(), Casts() as casts:
        out = prepared(x, t, y=y)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    assert not shapes & {shape for _, shape in casts.copied} and not casts.at_once, "weights are cast again"
    dtypes = {name: p.dtype for name, p in prepared.named_parameters()}
    assert dtypes["model.label_emb.weight" if kind == "dense" else "model.model.label_emb.weight"] == torch.float32
    assert dtypes["model.out.2.weight" if kind == "dense" else "model.model.out.2.weight"] == BF16


def test_float32_on_the_cpu_runs_on_its_routed_kernels_where_a_model_convolves() -> None:
    model, (x, t, y) = unet().train(), batch()
    prepared = for_inference(model)
    assert isinstance(prepared, ForInference) and prepared.on_routed_kernels and not model.training
    with torch.no_grad(), Recorded() as called:
        out = prepared(x, t, y=y)
    assert called["routed_conv2d"] and not called["convolution"]
    with torch.no_grad():
        torch.testing.assert_close(out, model(x, t, y=y), rtol=1e-4, atol=1e-4)
    packed, linear = pack_experts(unet(), GROUPS), nn.Sequential(nn.Linear(2, 2))
    assert for_inference(packed) is packed and for_inference(linear) is linear
    wide = unet().double()
    assert for_inference(wide) is wide
    plain = unet()
    assert for_inference(plain, routed_kernels=False) is plain and denoiser_in(plain, torch.float32) is plain


def test_a_model_with_layers_that_have_no_kernel_stays_on_torchs(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with caplog.at_level(logging.INFO, "tdc_fast.inference"):
        assert for_inference(model) is model
    assert "Sequential stays on torch's kernels: some of its layers have no routed kernel" in caplog.text


def test_a_dense_model_runs_as_one_expert_where_asked_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = unet().eval()
    x, t, y = batch()
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double(), t, y=y), under_autocast(model)
    with caplog.at_level(logging.INFO, "tdc_fast.inference"):
        fast = for_inference(copy.deepcopy(model), routed_kernels=True)
        low = for_inference(model, BF16, routed_kernels=True)
    assert [r.message for r in caplog.records] == [
        f"UNet runs on the routed kernels, as one expert, in torch.{name}" for name in ("float32", "bfloat16")
    ]
    with torch.no_grad(), Recorded() as called:
        out = low(x, t, y=y)
    assert called["routed_conv2d"] and not called["convolution"]
    assert max_error(out, exact) <= 2 * max_error(plain, exact)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, t, y=y), exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients_arrive_at_the_fp32_weights(use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with fast kernels too, with a model whose layers are computed again in the backward or not."""
    monkeypatch.setattr("tdc_fast.nn.inference.kernels_serve", lambda device, dtype: True)
    model = unet(use_checkpoint=use_checkpoint)
    x, t, y = batch()
    with Recorded() as called:
        denoiser_in(model, BF16)(x, t, y=y).square().mean().backward()
    assert bool(called["routed_conv2d"]) is not use_checkpoint
    expected = unet()
    expected.load_state_dict(model.state_dict())
    expected(x, t, y=y).square().mean().backward()
    largest = max(float(other.grad.norm()) for other in expected.parameters())
    for (name, ours), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.dtype == torch.float32, name
        assert (ours.grad - other.grad).norm() <= 0.1 * other.grad.norm() + 1e-3 * largest, name


def test_a_model_that_cannot_be_packed_stays_on_torchs_kernels_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    with caplog.at_level(logging.INFO, "tdc_fast.inference"):
        assert for_inference(model) is model
    assert "Sequential stays on torch's kernels: module '1': got 'BatchNorm2d'" in caplog.text


def test_what_it_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^dtype: got torch.float64; expected torch.float32, torch.bfloat16"):
        for_inference(unet(), torch.float64)
    prepared = for_inference(unet(), BF16)
    assert isinstance(prepared, ForInference)
    with pytest.raises(ValueError, match="^model: got 'one for inference in torch.bfloat16'"):
        for_inference(prepared, BF16)
    odd = nn.Sequential(nn.LSTM(2, 2))
    with pytest.raises(ValueError, match="^module '0': got 'LSTM'"):
        for_inference(odd, BF16, routed_kernels=True)
    assert odd[0].weight_ih_l0.dtype == torch.float32  # refused before anything was cast
