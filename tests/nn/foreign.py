"""Denoisers of plain torch modules, as other packages write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Scaled(nn.Module):
    """A parameter of no layer, used in every way that a single sample allows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.tensor(0.5))
        self.tables = nn.ParameterList([nn.Parameter(torch.zeros(dim)) for _ in range(2)])
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * self.gamma + self.shift + self.tables[0] - self.tables[1]


class Block(nn.Module):
    """A transformer block that modulates with a table of its own, so its layers run inside it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.table = nn.Parameter(torch.zeros(2, dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.table[None].chunk(2, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens of 2x2 pixels, a positional parameter at the root, a class table, blocks that may be recomputed."""

    def __init__(self, dim: int = 8, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.patches = nn.Conv2d(2, dim, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 16, dim))
        self.time, self.label = nn.Linear(1, dim), nn.Embedding(5, dim, padding_idx=0)
        self.blocks = nn.ModuleList([Block(dim), Block(dim)])
        self.scaled = Scaled(dim)
        self.out = nn.Linear(dim, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, extra: Any = None) -> dict[str, Tensor]:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.position
        h = h + self.time(t.to(h.dtype)[:, None] / 100)[:, None]
        if y is not None:
            h = h + self.label(y)[:, None]
        for block in self.blocks:
            if self.recompute == "none":
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.recompute == "reentrant")
        h = self.out(self.scaled(h))
        if extra is not None:
            h = h * extra["scale"][0][:, None, None]
        return {"sample": F.fold(h.transpose(1, 2), x.shape[2:], 2, stride=2)}
