"""Dense leaves are torch's layers plus what the routed operators fuse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdc_fast.nn.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    TokenConv1d,
    from_tokens,
    group_count,
    qkv_attention,
    to_tokens,
)
from tests.operators import Recorded
from tests.tolerance import assert_as_accurate_as_torch


def test_norm_groups_are_the_largest_divisor_up_to_32():
    counts = {8: 8, 16: 16, 32: 32, 48: 24, 64: 32, 96: 32, 37: 1, 100: 25, 1: 1}
    assert {channels: group_count(channels) for channels in counts} == counts


def test_a_convolution_adds_a_bias_per_sample_and_a_residual():
    conv, x = Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 4, 4)
    bias, residual = torch.randn(2, 5), torch.randn(2, 5, 4, 4)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x, sample_bias=bias, residual=residual), plain + bias[:, :, None, None] + residual)


def test_a_norm_scales_shifts_and_activates_with_fp32_statistics():
    torch.manual_seed(0)
    norm, x = GroupNorm(2, 4), torch.randn(3, 4, 4, 4) + 50
    scale, shift = torch.randn(3, 4), torch.randn(3, 4)
    plain = F.group_norm(x, 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, scale=scale, shift=shift, activation="silu"), plain * plain.sigmoid())
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    in_fp32 = F.group_norm(x.bfloat16().float(), 2).bfloat16()
    torch.testing.assert_close(low, in_fp32, rtol=2**-8, atol=1e-5)  # statistics in bf16 would be off by 0.1
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        norm(x, activation="relu")


def test_a_single_value_per_norm_group_becomes_the_bias():
    norm = GroupNorm(4, 4)
    torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 4, 1, 1)).flatten(), norm.bias, rtol=0, atol=1e-3)


def test_tokens_are_a_view_of_channels_last_activations():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.data_ptr() == x.data_ptr() and tokens.is_contiguous()
    back = from_tokens(tokens, 4, 5)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x)


def test_a_token_convolution_is_a_1x1_convolution_and_a_linear_layer_adds_a_residual():
    conv, x, residual = TokenConv1d(3, 6), torch.randn(2, 5, 3), torch.randn(2, 5, 6)
    expected = F.conv1d(x.transpose(1, 2), conv.weight, conv.bias).transpose(1, 2)
    torch.testing.assert_close(conv(x, residual=residual), expected + residual)
    linear = Linear(3, 6)
    torch.testing.assert_close(linear(x, residual=residual), F.linear(x, linear.weight, linear.bias) + residual)
    torch.testing.assert_close(torch.cat(linear.chunks(x, 2), -1), linear(x))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_as_accurate_as_its_products_one_by_one(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 64, 4 * 3 * 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, plain = published_attention(qkv.double(), 4), published_attention(qkv, 4)
    assert_as_accurate_as_torch(qkv_attention(qkv, 32), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE)
def test_attention_is_one_fused_kernel_forward_and_one_backward(live: Tensor | None, dtype: torch.dtype) -> None:
    qkv = torch.randn(4, 64, 3 * 3 * 8, dtype=dtype, requires_grad=True)
    with Recorded() as called:
        qkv_attention(qkv, 8, live).sum().backward()
    fused = [f"_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward")]
    assert [called[name] for name in fused] == [1, 1]
    assert not called.keys() & {"bmm", "matmul", "_softmax", "_safe_softmax", "clone", "copy_"}, called


def test_no_head_alive_is_no_attention() -> None:
    qkv = torch.randn(2, 5, 2 * 3 * 4)
    assert not qkv_attention(qkv, 4, torch.zeros(2, 2, dtype=torch.bool)).any()


def test_attention_has_a_forward_mode() -> None:
    qkv = torch.randn(2, 5, 2 * 3 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: qkv_attention(t, 4), [qkv], check_forward_ad=True, fast_mode=True)
