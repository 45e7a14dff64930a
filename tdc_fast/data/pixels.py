"""Pixel values as uint8 or in [-1, 1], and pictures of many images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1], of any shape and float dtype, to uint8, rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_image(images: Tensor, columns: int = 10, scale: int = 1, gap: int = 1) -> Any:
    """Arrange images in rows on one picture.

    Args:
        images: (M, C, H, W) uint8, C 1 or 3.
        columns: images per row.
        scale: pixels of the picture per pixel of an image, in each direction.
        gap: white pixels between images, before scaling.

    Returns:
        A PIL image.
    """
    from PIL import Image

    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    return picture.resize((picture.width * scale, picture.height * scale), resample=0)


def to_unit_range(pixels: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in [-1, 1]; floats are taken to be in that range already."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 127.5 - 1
    return pixels.astype(np.float32, copy=False)
