"""What users write today instead of a routed convolution, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """One expert for the whole batch, weight (C_out, C_in, R, S): less work than routing, so a lower bound."""
    return F.conv2d(x, weight, bias, padding=padding)


def loop(x: Tensor, weight: Tensor, bias: Tensor, groups: Tensor, padding: int) -> Tensor:
    """For each group gather its samples, convolve, scatter the result; weight (N, C_out, C_in, R, S)."""
    y = torch.empty_like(x)
    for g in range(weight.shape[0]):
        index = (groups == g).nonzero().squeeze(1)
        if index.numel():
            y.index_copy_(0, index, F.conv2d(x.index_select(0, index), weight[g], bias[g], padding=padding))
    return y


def grouped(x: Tensor, weight: Tensor, bias: Tensor, groups: Tensor, padding: int) -> Tensor:
    """One grouped convolution, with a copy of the weights per sample and the batch folded into the channels."""
    b, c, h, w = x.shape
    per_sample = weight.index_select(0, groups).flatten(0, 1)
    y = F.conv2d(
        x.reshape(1, b * c, h, w),
        per_sample,
        bias.index_select(0, groups).flatten(),
        padding=padding,
        groups=b,
    )
    return y.reshape(b, -1, *y.shape[2:])
