"""Autoencoders of diffusers between images and latents. Needs the extra `[diffusers]`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdc_fast.data.latent_space import LatentSpace
from tdc_fast.errors import brief, invalid, require
from tdc_fast.text_files import read_json

CLASSES = ("AutoencoderKL", "VQModel")
_ENCODER = ("encoder.", "quant_conv.")
_BESIDE_WEIGHTS = ("act_fn", "norm_num_groups", "norm_type", "lookup_from_codebook")
"""What decides an autoencoder's function and does not show in the names and shapes of its weights."""


class Autoencoder:
    """An `AutoencoderKL` or `VQModel` of diffusers in evaluation mode, in float32.

    Args:
        model: of one of these classes.

    Attributes:
        model: as given.
        has_moments: whether it encodes an image into a distribution of latents (`AutoencoderKL`), not into one latent.
        factor: pixels per latent position, in each direction.
    """

    def __init__(self, model: Any) -> None:
        if type(model).__name__ not in CLASSES:
            raise invalid("vae", type(model).__name__, f"one of {', '.join(CLASSES)} of diffusers")
        self.model = model.float().eval().requires_grad_(False)
        self.has_moments = type(model).__name__ == "AutoencoderKL"
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        self._hashes: tuple[str, str] | None = None

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
        """Read an autoencoder that diffusers' `save_pretrained` wrote; nothing is downloaded.

        Args:
            folder: with config.json and the weights.
            device: where it goes.

        Raises:
            ValueError: the folder holds no such autoencoder, or its weights are damaged.
            ImportError: diffusers is missing; names the extra.
        """
        diffusers = require("diffusers", "diffusers")
        path = Path(folder)
        name = _class_name(path)
        try:
            model, report = getattr(diffusers, name).from_pretrained(
                str(path), local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise invalid("vae", str(folder), f"whole weights of {name}: {brief(str(error))}") from error
        if report["missing_keys"]:
            raise invalid("vae", str(folder), f"all weights of {name}; {report['missing_keys'][0]} is missing")
        return cls(model.to(device))

    @property
    def latent_channels(self) -> int:
        """C of its latents."""
        config = self.model.config
        return int(getattr(config, "vq_embed_dim", None) or config.latent_channels)

    def space(self, image_size: int, scaling_factor: float = 0.0) -> LatentSpace:
        """Its latent space for images of one size.

        Args:
            image_size: height and width in pixels.
            scaling_factor: replaces that of its configuration; 0 keeps it.

        Raises:
            ValueError: images of that size do not fit, or its configuration has no usable scale.
        """
        if image_size % self.factor:
            raise invalid("image_size", image_size, f"a multiple of {self.factor}, by which the autoencoder divides it")
        encoder_hash, autoencoder_hash = self._hashed()
        mean, scale = _scaling(self.model.config, self.latent_channels, scaling_factor)
        return LatentSpace(
            autoencoder=type(self.model).__name__,
            encoder_hash=encoder_hash,
            autoencoder_hash=autoencoder_hash,
            channels=self.latent_channels,
            size=image_size // self.factor,
            image_channels=int(self.model.config.in_channels),
            image_size=image_size,
            mean=mean,
            scale=scale,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Moments (B, 2C, H, W), mean and log variance, or where there are none latents (B, C, H, W), unscaled.

        Args:
            images: in [-1, 1], float32 (B, channels, pixels, pixels).
        """
        encoded = self.model.encode(images)
        found: Tensor = encoded.latent_dist.parameters if self.has_moments else encoded.latents
        return found

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, channels, pixels, pixels), about in [-1, 1], of unscaled latents (B, C, H, W)."""
        images: Tensor = self.model.decode(latents).sample
        return images

    def refuse_other(self, space: LatentSpace, folder: str) -> str:
        """Refuse to decode latents that another encoder made.

        Args:
            space: the latents'.
            folder: where this autoencoder is from, for the error.

        Returns:
            A note where only the rest differs, as in one whose decoder was tuned further; "" where nothing does.

        Raises:
            ValueError: naming --vae.
        """
        encoder_hash, autoencoder_hash = self._hashed()
        if encoder_hash != space.encoder_hash:
            made = f"the {space.autoencoder} that made the latents ({space.encoder_hash:.12})"
            remedy = f"{made}; the sha256 of this encoder begins with {encoder_hash:.12}: it is another one"
            raise invalid("vae", folder, remedy)
        if autoencoder_hash == space.autoencoder_hash:
            return ""
        return f"{folder} has the encoder that made the latents of the run, and another decoder"

    def _hashed(self) -> tuple[str, str]:
        """sha256 of the encoder and of the whole autoencoder."""
        if self._hashes is None:
            state = self.model.state_dict()
            encoder = {name: value for name, value in state.items() if name.startswith(_ENCODER)}
            config = {name: getattr(self.model.config, name, None) for name in _BESIDE_WEIGHTS}
            about = json.dumps([type(self.model).__name__, config])
            self._hashes = _digest(about, encoder), _digest(about, state)
        return self._hashes


class LatentDecoder:
    """Decodes what a denoiser of latents drew, a few images at a time, as activations of images take much memory.

    Args:
        autoencoder: decodes.
        space: of the latents.
        batch_size: images at once.
    """

    def __init__(self, autoencoder: Autoencoder, space: LatentSpace, batch_size: int = 8) -> None:
        self._autoencoder, self._space, self._batch_size = autoencoder, space, batch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, pixels, pixels) of the images."""
        return self._space.image_channels, self._space.image_size, self._space.image_size

    @classmethod
    def load(cls, folder: str, space: LatentSpace, device: torch.device | str = "cpu") -> LatentDecoder:
        """The decoder in a folder of diffusers; a note is printed where it is not the one that belongs to the encoder.

        Args:
            folder: as for `Autoencoder.load`.
            space: of the latents.
            device: where it computes.

        Raises:
            ValueError: there is none, or its encoder did not make these latents.
        """
        autoencoder = Autoencoder.load(folder, device)
        note = autoencoder.refuse_other(space, folder)
        if note:
            print(f"note: {note}", flush=True)
        return cls(autoencoder, space)

    def __call__(self, latents: Tensor) -> Tensor:
        """Images, about in [-1, 1], of latents as a denoiser draws them (B, C, H, W), from any device."""
        device = next(self._autoencoder.model.parameters()).device
        unscaled = self._space.unscaled(latents.to(device).float()).split(self._batch_size)
        return torch.cat([self._autoencoder.decode(part) for part in unscaled])


def _class_name(folder: Path) -> str:
    """The class in a folder's config.json."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        inside = next((name for name in ("vae", "vqvae") if (folder / name / "config.json").is_file()), "")
        remedy = f"the folder of its autoencoder, {folder / inside}" if inside else "a folder with its config.json"
        raise invalid("vae", str(folder), f"{remedy}, as save_pretrained of diffusers writes it") from error
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if name not in CLASSES:
        raise invalid("vae", str(folder), f"one of {', '.join(CLASSES)} of diffusers; its config.json says {name!r}")
    return str(name)


def _scaling(config: Any, channels: int, scaling_factor: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and scale of each channel, by diffusers' rules for the configuration of an autoencoder."""
    factor = scaling_factor or getattr(config, "scaling_factor", None) or 1.0
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0] * channels, [1.0] * channels
    numbers = [factor, *mean, *std]
    if len(mean) != channels or len(std) != channels or not all(math.isfinite(n) for n in numbers) or 0 in [*std]:
        raise invalid("vae", brief(numbers), f"finite means and scales of {channels} channels in its config.json")
    return tuple(float(value) for value in mean), tuple(float(factor) / float(value) for value in std)


def _digest(about: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()
