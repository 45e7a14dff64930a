"""The parts that a configuration describes: device, data, diffusion process and network."""

from __future__ import annotations

import hashlib
import os
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.data.latents import LatentDataset, load_latents
from tdc_fast.diffusion import Diffusion, create_diffusion
from tdc_fast.errors import invalid
from tdc_fast.graphs import captures_on
from tdc_fast.models.iddpm import UNet, create_unet
from tdc_fast.nn.sharing import shared_rows
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.precision import named_dtype

Data = ImageDataset | LatentDataset
"""What a run is trained on."""
M = TypeVar("M", bound=nn.Module)


def build_device(config: TrainConfig) -> torch.device:
    """The device of a run.

    Raises:
        ValueError: torch does not see it.
    """
    return named_device(config.device)


def named_device(name: str) -> torch.device:
    """The device that a flag names.

    Args:
        name: auto, cpu, cuda or cuda:N; auto is a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or torch does not see the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid("device", name, "auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise invalid("device", name, "auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("device", name, f"cpu or auto, as torch sees {torch.cuda.device_count() or 'no'} GPU here")
    return device


def calibration_dtype(config: TrainConfig) -> torch.dtype:
    """The precision in which a run's base is measured.

    Raises:
        ValueError: the device does not compute in it.
    """
    device = build_device(config)
    return named_dtype(config.calibration_dtype, device, config.mixed_precision, "calibration_dtype")


def check_cuda_graph(config: TrainConfig) -> None:
    """Refuse --cuda_graph on where the device has none.

    Raises:
        ValueError: naming the option and the device.
    """
    device = build_device(config)
    if config.cuda_graph == "on" and not captures_on(device):
        raise invalid("cuda_graph", "on", f"auto or off, as the device is {device}; or --device cuda")


def check_shared_layers(config: TrainConfig, in_channels: int) -> None:
    """Refuse a --shared_layers that names no layer of the network.

    Raises:
        ValueError: naming the option and the names that there are.
    """
    if config.shared_layers:
        shared_rows(outline_unet(config, in_channels), config.shared_layers, max(config.groups, 1))


def build_data(config: TrainConfig) -> Data:
    """The images or latents to train on: all of them, or all but the held-out share."""
    return split_data(config)[0]


def split_data(config: TrainConfig) -> tuple[Data, Data | None]:
    """(training images or latents, held-out ones or None) as the configuration splits them.

    Raises:
        ValueError: the data is missing or does not fit the configuration.
    """
    dataset: Data = _load_latents(config) if config.latents else _load_images(config)
    check_label_rows(config, dataset.num_classes, config.latents or config.data_dir)
    if not config.heldout:
        return dataset, None
    try:
        return dataset.split(config.heldout, config.heldout_seed)
    except ValueError as error:
        remedy = f"a share that leaves some of the {len(dataset)} images, or places of photographs, to train on"
        raise invalid("heldout", config.heldout, remedy) from error


def split_digest(config: TrainConfig, dataset: object) -> str | None:
    """A digest of which images are trained on, where some are held out; None otherwise, or where it is not known."""
    indices = getattr(dataset, "indices", None)
    if not config.heldout or not isinstance(indices, np.ndarray):
        return None
    return hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest()


def check_label_rows(config: TrainConfig, classes: int, source: str) -> None:
    """Refuse a label embedding that has too few rows for the data.

    Args:
        config: the configuration.
        classes: classes of the data, numbered from 0 to `classes` - 1.
        source: the data, for errors.

    Raises:
        ValueError: naming the number of rows that is enough.
    """
    if config.num_classes and config.num_classes < config.label_rows_for(classes):
        no_class = ", and one row for no class (label_dropout)" if config.label_dropout else ""
        raise invalid("num_classes", config.num_classes, f"at least the {classes} classes of {source}{no_class}")


def _load_images(config: TrainConfig) -> ImageDataset:
    if not config.data_dir:
        raise invalid("data_dir", "", "a folder of images, an .npz or .npy file, or one of digits, photos")
    return load_dataset(
        config.data_dir,
        image_size=config.image_size,
        class_cond=config.class_cond,
        on_corrupt=config.on_corrupt,
        in_channels=config.in_channels or None,
        background=config.background,
    )


def _load_latents(config: TrainConfig) -> LatentDataset:
    latents = load_latents(config.latents, class_cond=config.class_cond)
    if config.image_size != latents.image_size:
        raise invalid("image_size", config.image_size, f"{latents.image_size}, the size of {config.latents}")
    if config.in_channels not in (0, latents.channels):
        raise invalid("in_channels", config.in_channels, f"{latents.channels}, the channels of {config.latents}")
    return latents


def build_diffusion(config: TrainConfig, timestep_respacing: str = "") -> Diffusion:
    """The diffusion process of a configuration.

    Args:
        config: the configuration.
        timestep_respacing: replaces the configuration's own, unless empty.
    """
    return create_diffusion(
        diffusion_steps=config.diffusion_steps,
        learn_sigma=config.learn_sigma,
        sigma_small=config.sigma_small,
        noise_schedule=config.noise_schedule,
        use_kl=config.use_kl,
        predict_xstart=config.predict_xstart,
        predict_v=config.predict_v,
        rescale_timesteps=config.rescale_timesteps,
        rescale_learned_sigmas=config.rescale_learned_sigmas,
        timestep_respacing=timestep_respacing or config.timestep_respacing,
    )


def place(model: M, device: torch.device) -> M:
    """The model on a device, its weights in channels_last memory."""
    placed: M = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return placed


def build_unet(config: TrainConfig, in_channels: int) -> UNet:
    """The network with new weights, drawn from torch's global generator.

    Args:
        config: the configuration.
        in_channels: channels of the images.
    """
    model = create_unet(
        image_size=config.image_size,
        num_channels=config.num_channels,
        num_res_blocks=config.num_res_blocks,
        num_heads=config.num_heads,
        num_heads_upsample=config.num_heads_upsample,
        attention_resolutions=config.attention_resolutions,
        dropout=config.dropout,
        learn_sigma=config.learn_sigma,
        class_cond=config.class_cond,
        use_checkpoint=config.use_checkpoint,
        use_scale_shift_norm=config.use_scale_shift_norm,
        channel_mult=config.channel_mult,
        num_classes=config.label_rows,
        in_channels=in_channels,
    )
    model.timestep_scale = 1000.0 / config.diffusion_steps if config.rescale_timesteps else 1.0
    return model


def outline_unet(config: TrainConfig, in_channels: int) -> UNet:
    """The network without memory for its weights, on torch's meta device; random generators are left unchanged.

    Args:
        config: the configuration.
        in_channels: channels of the images.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_unet(config, in_channels).to("meta")


def refuse_what_cannot_fit(config: TrainConfig, in_channels: int, device: torch.device, copies: int = 1) -> None:
    """Refuse a network whose weights alone take more than all memory of a device, before it is built.

    Args:
        config: the configuration.
        in_channels: channels of the images.
        device: where the network is to be.
        copies: numbers that are kept per weight, such as 5 for training: the weight, its gradient, two moments of
            AdamW and an average.

    Raises:
        ValueError: naming --num_channels, and what else makes the network smaller.
    """
    parameters = sum(parameter.numel() for parameter in outline_unet(config, in_channels).parameters())
    needed, there = 4 * copies * parameters, _memory(device)
    if there and needed > there:
        raise invalid(
            "num_channels",
            config.num_channels,
            f"a smaller network, also by --channel_mult, --num_res_blocks or --num_classes: {parameters / 1e6:,.0f} "
            f"million weights take {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f} GiB ({device})",
        )


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # as on Windows
        return 0
