"""Small autoencoders of diffusers for 8x8 grey images, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdc_fast.data.dataset import load_dataset

SETTINGS: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def random_autoencoder(kind: str = "AutoencoderKL", seed: int = 0, **changes: Any) -> Any:
    """An AutoencoderKL or VQModel with random weights; latents are 4x4 of 2 channels."""
    import diffusers

    torch.manual_seed(seed)
    return getattr(diffusers, kind)(**{**SETTINGS, **changes}).eval()


def trained_autoencoder(steps: int = 80) -> Any:
    """One that reconstructs the digits roughly, its scale and shift measured on them; two seconds."""
    model = random_autoencoder().train()
    images = load_dataset("digits").images(slice(0, 512)).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(steps):
        batch = images[torch.randint(512, (32,))]
        latents = model.encode(batch).latent_dist
        loss = (model.decode(latents.sample()).sample - batch).square().mean() + 1e-4 * latents.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        latents = model.eval().encode(images).latent_dist.mean
    model.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return model


def write_digits(path: Path, count: int = 24, *, labels: bool = True) -> Path:
    """The first digits as uint8 in an .npz."""
    data = load_dataset("digits", class_cond=True)
    pixels = ((data.images(slice(0, count)).permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
    assert data.labels is not None
    np.savez(path, arr_0=pixels, **({"arr_1": data.labels[:count]} if labels else {}))
    return path
