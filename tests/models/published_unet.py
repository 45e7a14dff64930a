"""improved-diffusion's UNet from its published structure alone: a listing of its state dict, and a forward on one.

Written against the state dict, with none of the library's modules, so that the two can only agree by being right.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def state_shapes(
    *,
    channels,
    mult,
    blocks,
    attention,
    out_channels,
    in_channels=3,
    classes=None,
    scale_shift=True,
    conv_resample=True,
):
    """{key: shape}; `attention` holds the downsampling factors with attention."""
    shapes: dict[str, tuple[int, ...]] = {}
    emb = 4 * channels

    def layer(name, weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def residual(name, c_in, c_out):
        layer(f"{name}.in_layers.0", (c_in,))
        layer(f"{name}.in_layers.2", (c_out, c_in, 3, 3))
        layer(f"{name}.emb_layers.1", (2 * c_out if scale_shift else c_out, emb))
        layer(f"{name}.out_layers.0", (c_out,))
        layer(f"{name}.out_layers.3", (c_out, c_out, 3, 3))
        if c_in != c_out:
            layer(f"{name}.skip_connection", (c_out, c_in, 1, 1))

    def self_attention(name, c):
        layer(f"{name}.norm", (c,))
        layer(f"{name}.qkv", (3 * c, c, 1))
        layer(f"{name}.proj_out", (c, c, 1))

    layer("time_embed.0", (emb, channels))
    layer("time_embed.2", (emb, emb))
    if classes:
        layer("label_emb", (classes, emb), bias=False)
    layer("input_blocks.0.0", (channels, in_channels, 3, 3))
    skips, c, index, factor = [channels], channels, 1, 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            residual(f"input_blocks.{index}.0", c, m * channels)
            c = m * channels
            if factor in attention:
                self_attention(f"input_blocks.{index}.1", c)
            skips.append(c)
            index += 1
        if level < len(mult) - 1:
            if conv_resample:
                layer(f"input_blocks.{index}.0.op", (c, c, 3, 3))
            skips.append(c)
            index, factor = index + 1, factor * 2
    residual("middle_block.0", c, c)
    self_attention("middle_block.1", c)
    residual("middle_block.2", c, c)
    index = 0
    for level in reversed(range(len(mult))):
        for block in range(blocks + 1):
            residual(f"output_blocks.{index}.0", c + skips.pop(), mult[level] * channels)
            c = mult[level] * channels
            if factor in attention:
                self_attention(f"output_blocks.{index}.1", c)
            if level and block == blocks:
                if conv_resample:
                    layer(f"output_blocks.{index}.{2 if factor in attention else 1}.conv", (c, c, 3, 3))
                factor //= 2
            index += 1
    layer("out.0", (c,))
    layer("out.2", (out_channels, c, 3, 3))
    return shapes


def forward(state, x, t, y=None, *, channels, mult, blocks, heads, norm_groups, scale_shift=True):
    """Output of the network with these weights; resampling with convolutions; `norm_groups(C)` groups per norm."""

    def silu(v):
        return v * torch.sigmoid(v)

    def norm(name, v):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        grouped = v.reshape(len(v), norm_groups(v.shape[1]), -1)
        mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
        shape = (1, -1) + (1,) * (v.dim() - 2)
        return ((grouped - mean) / torch.sqrt(var + 1e-5)).reshape(v.shape) * weight.view(shape) + bias.view(shape)

    def conv(name, v, **settings):
        return F.conv2d(v, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def residual(name, v, emb):
        h = conv(f"{name}.in_layers.2", silu(norm(f"{name}.in_layers.0", v)), padding=1)
        e = linear(f"{name}.emb_layers.1", silu(emb))[:, :, None, None]
        if scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        h = conv(f"{name}.out_layers.3", silu(h), padding=1)
        return (conv(f"{name}.skip_connection", v) if f"{name}.skip_connection.weight" in state else v) + h

    def self_attention(name, v):
        b, c, height, width = v.shape
        flat = v.reshape(b, c, -1)
        qkv = F.conv1d(norm(f"{name}.norm", flat), state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
        q, k, value = qkv.reshape(b * heads, 3 * c // heads, -1).split(c // heads, dim=1)
        scale = 1 / math.sqrt(math.sqrt(c // heads))
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weights, value).reshape(b, c, -1)
        h = F.conv1d(h, state[f"{name}.proj_out.weight"], state[f"{name}.proj_out.bias"])
        return (flat + h).reshape(b, c, height, width)

    def block(name, v, emb):
        for part in range(3):
            path = f"{name}.{part}"
            if f"{path}.in_layers.0.weight" in state:
                v = residual(path, v, emb)
            elif f"{path}.qkv.weight" in state:
                v = self_attention(path, v)
            elif f"{path}.op.weight" in state:
                v = conv(f"{path}.op", v, stride=2, padding=1)
            elif f"{path}.conv.weight" in state:
                v = conv(f"{path}.conv", v.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
            elif f"{path}.weight" in state:
                v = conv(path, v, padding=1)
        return v

    half = channels // 2
    frequencies = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=x.dtype)
    angles = t.to(x.dtype)[:, None] * frequencies
    emb = linear("time_embed.0", torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))
    emb = linear("time_embed.2", silu(emb))
    if y is not None:
        emb = emb + state["label_emb.weight"][y]
    levels = len(mult)
    skips, h = [], x
    for index in range(1 + levels * blocks + levels - 1):
        h = block(f"input_blocks.{index}", h, emb)
        skips.append(h)
    h = block("middle_block", h, emb)
    for index in range(levels * (blocks + 1)):
        h = block(f"output_blocks.{index}", torch.cat([h, skips.pop()], dim=1), emb)
    return conv("out.2", silu(norm("out.0", h)), padding=1)
