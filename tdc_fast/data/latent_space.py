"""The latent space of an autoencoder: whose it is, its shape, and how its values are scaled for a denoiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.errors import brief, invalid

LOG_VARIANCE = (-30.0, 20.0)
"""Between these diffusers limits the log variance of a latent."""


@dataclass(frozen=True)
class LatentSpace:
    """What a run on latents must know so that its samples can be decoded, and only by the right autoencoder.

    A denoiser sees (z - mean) * scale of the encoder's latent z, as in diffusers: `mean` is `latents_mean` or
    `shift_factor`, `scale` is `scaling_factor`, over `latents_std` where there is one.

    Attributes:
        autoencoder: its class of diffusers.
        encoder_hash: sha256 of what makes latents of images: encoder and `quant_conv`.
        autoencoder_hash: sha256 of all its weights.
        channels: C of the latents.
        size: H = W of the latents.
        image_channels: channels of the images.
        image_size: height and width of the images in pixels.
        mean: what is subtracted of each channel, C numbers.
        scale: what the difference is multiplied by, C numbers.
    """

    autoencoder: str
    encoder_hash: str
    autoencoder_hash: str
    channels: int
    size: int
    image_channels: int
    image_size: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents z of the encoder (B, C, H, W) as a denoiser sees them."""
        mean, scale = (self._by_channel(values, latents) for values in (self.mean, self.scale))
        return (latents - mean) * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`, for the decoder."""
        mean, scale = (self._by_channel(values, latents) for values in (self.mean, self.scale))
        return latents / scale + mean

    def _by_channel(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self)
        return {**values, "mean": list(self.mean), "scale": list(self.scale)}

    @classmethod
    def from_dict(cls, values: Any, argument: str, source: str) -> LatentSpace:
        """The space that `to_dict` described.

        Args:
            values: the description.
            argument: what named the file that it is from, for errors.
            source: that file, for errors.

        Raises:
            ValueError: it is damaged; names the source.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or values.keys() != fields:
            raise invalid(argument, source, f"the file as it was written; its latent space is {brief(values)}")
        counts = [values[name] for name in ("channels", "size", "image_channels", "image_size")]
        texts = [values[name] for name in ("autoencoder", "encoder_hash", "autoencoder_hash")]
        numbers = [values[name] for name in ("mean", "scale")]
        whole = (
            all(type(value) is int and value > 0 for value in counts)
            and all(isinstance(value, str) for value in texts)
            and all(_is_finite_list(value, counts[0]) for value in numbers)
            and all(value != 0 for value in numbers[1])
        )
        if not whole:
            raise invalid(argument, source, f"the file as it was written; its latent space is {brief(values)}")
        lists = {name: tuple(float(value) for value in values[name]) for name in ("mean", "scale")}
        return cls(**{**values, **lists})


def sampled(moments: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
    """A latent (B, C, H, W) of each image, drawn from its own generator.

    Args:
        moments: means and log variances, float32 (B, 2C, H, W).
        generators: one of each image.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    shape = tuple(mean.shape[1:])
    noise = np.stack([generator.standard_normal(shape, np.float32) for generator in generators])
    return mean + (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp() * torch.from_numpy(noise)


def _is_finite_list(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )
