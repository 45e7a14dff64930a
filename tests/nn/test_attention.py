"""Attention is improved-diffusion's, in fused kernels where they are the fastest, and has all derivatives."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.models.blocks import AttentionBlock
from tdc_fast.nn.attention import qkv_attention
from tdc_fast.nn.packing import pack_experts
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import GROUPS as PACKED
from tests.nn.test_packing import PRUNED, batch, shuffled_plan, unet
from tests.operators import Recorded
from tests.tolerance import assert_as_accurate_as_torch


def published_attention(qkv: Tensor, heads: int) -> Tensor:
    """improved-diffusion's QKVAttention on (B, T, heads * 3 * dim): q and k are scaled by the fourth root of dim."""
    batch, tokens, channels = qkv.shape
    dim = channels // (3 * heads)
    q, k, v = qkv.transpose(1, 2).reshape(batch * heads, 3 * dim, tokens).split(dim, dim=1)
    scale = 1 / math.sqrt(math.sqrt(dim))
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, heads * dim, tokens).transpose(1, 2)


LIVE = {"all heads": None, "some heads": torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()}


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
@pytest.mark.parametrize("dim", [1, 5, 32])
def test_attention_and_its_gradient_are_improved_diffusions(dim: int, live: Tensor | None) -> None:
    qkv = torch.randn(4, 37, 3 * 3 * dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if live is not None:
        qkv *= live.repeat_interleave(3 * dim, dim=1)[:, None]  # what a routed layer writes into dead heads
    qkv.requires_grad_()
    ours, expected = qkv_attention(qkv, dim, live), published_attention(qkv, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(y, qkv, dy)[0] for y in (ours, expected)]
    if live is not None:
        grads[1] = grads[1] * live.repeat_interleave(3 * dim, dim=1)[:, None]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multiplies", [False, True], ids=["fused", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_as_accurate_as_its_products_one_by_one(
    dtype: torch.dtype, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdc_fast.nn.attention._multiplies_bf16", lambda: multiplies)
    qkv = torch.randn(2, 64, 4 * 3 * 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, plain = published_attention(qkv.double(), 4), published_attention(qkv, 4)
    assert_as_accurate_as_torch(qkv_attention(qkv, 32), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_attention_is_one_fused_kernel_forward_and_one_backward(
    live: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdc_fast.nn.attention._multiplies_bf16", lambda: False)
    qkv = torch.randn(4, 64, 3 * 3 * 8, dtype=dtype, requires_grad=True)
    with Recorded() as called, torch.autocast("cpu", torch.bfloat16):
        qkv_attention(qkv, 8, live).sum().backward()
    fused = [f"_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward")]
    assert [called[name] for name in fused] == [1, 1]
    assert not called.keys() & {"bmm", "matmul", "_softmax", "_safe_softmax", "clone", "copy_"}, called


@pytest.mark.parametrize("tokens", [64, 1089])
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_a_cpu_with_products_of_bf16_takes_them_one_by_one_while_the_scores_are_small(
    live: Tensor | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdc_fast.nn.attention._multiplies_bf16", lambda: True)
    qkv = torch.randn(4, tokens, 3 * 3 * 8, dtype=torch.bfloat16, requires_grad=True)
    with Recorded() as called:
        qkv_attention(qkv, 8, live).sum().backward()
    assert (called["bmm"], called["_softmax"]) == ((6, 1) if tokens == 64 else (0, 0))
    assert called["_scaled_dot_product_flash_attention_for_cpu"] == (tokens != 64)


def test_where_all_heads_are_computed_nobody_asks_which_ones_live(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    routed = pack_experts(model, PACKED, shuffled_plan(model, PRUNED))
    x, t, y = batch(5)
    with Recorded() as asked:
        expected = routed(x, t, y=y)
    monkeypatch.setattr("tdc_fast.models.blocks.picks_heads", lambda device: False)  # as on a GPU
    with Recorded() as called:
        torch.testing.assert_close(routed(x, t, y=y), expected, rtol=1e-4, atol=1e-4)
    assert asked["nonzero"] and asked["lt"] > called["lt"] == 0 and not called["nonzero"]


def test_no_head_alive_is_no_attention() -> None:
    qkv = torch.randn(2, 5, 2 * 3 * 4)
    assert not qkv_attention(qkv, 4, torch.zeros(2, 2, dtype=torch.bool)).any()


def test_attention_has_a_forward_mode() -> None:
    qkv = torch.randn(2, 5, 2 * 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: qkv_attention(t, 4), [qkv], check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
@pytest.mark.parametrize("tokens", [5, 33])
def test_attention_has_second_and_third_derivatives(live: Tensor | None, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, tokens, 3 * 3 * 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: qkv_attention(t, 2, live), [qkv], fast_mode=True)

    def third(attention) -> Tensor:
        value = attention(qkv).sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, qkv, create_graph=True)
            value = (grad * torch.linspace(-1, 1, grad.numel(), dtype=grad.dtype).view_as(grad)).sin().sum()
        return value.detach()

    if live is None:
        expected = third(lambda t: published_attention(t, 3))
        torch.testing.assert_close(third(lambda t: qkv_attention(t, 2)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [9, 64])
def test_a_gradient_that_can_be_differentiated_is_the_ordinary_one(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdc_fast.nn.attention._multiplies_bf16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 2 * 3 * 8, generator=generator).to(dtype).requires_grad_()
    grads = []
    for create_graph in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = qkv_attention(qkv, 8).float().square().sum()
            (grad,) = torch.autograd.grad(loss, qkv, create_graph=create_graph)
        assert grad.requires_grad is create_graph and grad.dtype == dtype
        grads.append(grad.detach())
    rounding = torch.finfo(torch.bfloat16).eps * float(grads[0].abs().max())
    torch.testing.assert_close(*grads, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_block_has_second_derivatives_also_where_it_is_computed_again(use_checkpoint: bool) -> None:
    block = randomise(AttentionBlock(8, 2, use_checkpoint)).double()
    block.norm = nn.Identity()  # whose statistics would be in fp32
    x = torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    step, eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype), 1e-4

    def square_of_gradient(point: Tensor) -> float:
        point = point.detach().requires_grad_()
        return float(torch.autograd.grad(block(point).sin().sum(), point)[0].square().sum())

    slope = (square_of_gradient(x + eps * step) - square_of_gradient(x - eps * step)) / (2 * eps)
    assert float((second * step).sum()) == pytest.approx(slope, rel=1e-6)


def test_a_gradient_penalty_trains_a_whole_unet() -> None:
    model = unet()
    x, t, y = batch(3)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, t, y=y).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n != "out.2.bias")


def test_transforms_of_functions_may_be_nested() -> None:
    qkv = torch.randn(1, 33, 3 * 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(t: Tensor) -> Tensor:
        return qkv_attention(t, 2).sin().sum()

    def along(t: Tensor) -> Tensor:
        return (torch.func.grad(value)(t) * qkv).sum()

    found = torch.func.grad(along)(qkv)
    leaf = qkv.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((grad * qkv).sum(), leaf)[0])


def test_no_memory_is_held_once_the_ordinary_backward_has_run() -> None:
    """What the second derivative needs is freed with what the kernel saved."""
    qkv = torch.randn(2, 64, 3 * 8, requires_grad=True)
    inner = qkv * 1
    kept = weakref.ref(inner)
    out = qkv_attention(inner, 8)
    del inner
    gc.disable()
    try:
        out.sum().backward()
        assert kept() is None
    finally:
        gc.enable()
