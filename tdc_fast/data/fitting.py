"""Scaling and cropping of images to squares."""

from __future__ import annotations

from typing import Any

import numpy as np

from tdc_fast.errors import invalid

_LONGEST = 4
"""Sides in a ratio above this are cropped before they are scaled: enlarged, a line of pixels would fill the memory."""


def fit_image(image: Any, size: int) -> np.ndarray:
    """Scale and crop an image to a square, as improved-diffusion does.

    It is halved with a box filter while it is at least twice as large, scaled bicubically so that its short side fits,
    and cropped at the centre. An image more than four times as long as wide is cropped to its middle first.

    Args:
        image: a PIL image of mode L, RGB or RGBA.
        size: height and width of the result in pixels.

    Returns:
        Pixels (size, size, C) uint8.
    """
    from PIL.Image import Resampling

    image = _without_far_ends(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    pixels = pixels[top : top + size, left : left + size]
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _without_far_ends(image: Any) -> Any:
    """The middle of an image that is more than four times as long as wide."""
    limit = _LONGEST * min(image.size)
    width, height = min(image.width, limit), min(image.height, limit)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit_images(images: np.ndarray, size: int) -> np.ndarray:
    """Apply `fit_image` to an array of images.

    Args:
        images: (N, H, W, C) uint8; unless C is 3, channels are scaled one by one, as a fourth need not be alpha.
        size: height and width of the result in pixels.

    Returns:
        (N, size, size, C) uint8.
    """
    from PIL import Image

    try:
        fitted = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    except (MemoryError, ValueError) as error:  # numpy has a largest array, too
        raise invalid("image_size", size, f"a size at which {len(images)} images fit the memory") from error
    for image, place in zip(images, fitted, strict=True):
        if images.shape[-1] == 3:
            place[:] = fit_image(Image.fromarray(image), size)
            continue
        for channel in range(images.shape[-1]):
            place[..., channel] = fit_image(Image.fromarray(image[..., channel]), size)[..., 0]
    return fitted


def patch_of(photo: np.ndarray, scale: float, top: int, left: int, size: int) -> np.ndarray:
    """A patch (size, size, 3) of an enlarged photograph, without enlarging the rest of it.

    Args:
        photo: (H, W, 3) uint8.
        scale: how many times larger the photograph is made; 1 takes its own pixels.
        top: first row of the patch in the enlarged photograph.
        left: first column.
        size: height and width of the patch in pixels.
    """
    if scale == 1:
        return photo[top : top + size, left : left + size]
    from PIL import Image

    height, width = photo.shape[:2]
    rows, columns = height / round(height * scale), width / round(width * scale)  # of the photograph, per patch's
    box = (left * columns, top * rows, min((left + size) * columns, width), min((top + size) * rows, height))
    return np.asarray(Image.fromarray(photo).resize((size, size), Image.Resampling.BICUBIC, box=box))
