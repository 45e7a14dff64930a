"""Dense leaves are torch's layers plus what the routed operators fuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tdc_fast.nn.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    TokenConv1d,
    from_tokens,
    group_count,
    to_tokens,
)


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
