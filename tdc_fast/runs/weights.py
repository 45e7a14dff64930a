"""A finished stage 1 from outside: a weight file of improved-diffusion or our own, checked against its flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import default_channel_mult
from tdc_fast.runs.checkpoint import finished_steps, load_verified, read_description
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.options import DiffusionOptions, ModelOptions

NOT_IN_THE_WEIGHTS = frozenset({"dropout", "use_checkpoint", "in_channels", "sigma_small", "timestep_respacing"})
"""Options of model and diffusion that a split of the base may set anew: its weights mean the same under any of them."""


def find_base_file(path: str | Path) -> Path:
    """The weight file that ``--base`` names: a .pt file, or in a run directory the latest average of its base.

    Raises:
        ValueError: nothing of that kind is there.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise invalid("base", str(path), "an existing .pt file, or a run directory with a base")
    directory = path / "base" if (path / "base").is_dir() else path
    steps = finished_steps(directory)
    averages = sorted(directory.glob(f"ema_*_{steps[-1]:06d}.pt")) if steps else []
    if (path / "config.json").is_file() and steps:
        rate = TrainConfig.from_file(path / "config.json").ema_rates[0]
        averages = [file for file in averages if file.name.startswith(f"ema_{rate}_")]
    if not averages:
        raise invalid("base", str(path), "a directory with a finished checkpoint of the base, or a .pt file")
    return averages[0]


def load_base_file(path: Path, config: TrainConfig, model: nn.Module, argument: str = "base") -> dict[str, Any] | None:
    """Load weights into ``model`` strictly; returns the description beside the file, None for improved-diffusion's.

    Args:
        argument: what named the file, for the errors.

    Raises:
        ValueError: the file is damaged, holds numbers that are not finite, or was made with other flags; names them
        where the weights or the description tell.
    """
    description = read_description(path)
    if description is not None and isinstance(description.get("config"), Mapping):
        _refuse_other_options(path, description["config"], config)
    state = load_verified(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise invalid(argument, str(path), "a state dict: names of parameters and their tensors")
    load_state(path, state, model, config)
    diverged = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if diverged is not None:
        raise invalid(argument, str(path), f"finite weights; {diverged} holds infinities or NaN, as after a divergence")
    return description


def load_state(path: Path, state: Mapping[str, Tensor], model: nn.Module, config: TrainConfig) -> None:
    """``model.load_state_dict(strict=True)`` whose refusal says which flags would fit the file."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    foreign = sorted(state.keys() - own.keys())
    shaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    if not (missing or foreign or shaped):
        model.load_state_dict(dict(state))
        return
    flags = differing_flags(state, config)
    if shaped:
        name = shaped[0]
        example = f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} by the flags"
    else:
        example = f"{missing[0]} is missing there" if missing else f"{foreign[0]} is not in the model of the flags"
    remedy = (
        f"set {' '.join(flags)} as the file was made with"
        if flags
        else "flags of the model that the file was made with"
    )
    raise ValueError(f"{path} does not fit the model of the flags: {example}; {remedy}")


def differing_flags(state: Mapping[str, Tensor], config: TrainConfig) -> list[str]:
    """The flags, with values, that a UNet state dict gives away and that the configuration has otherwise."""
    try:
        found = flags_of(state, config.image_size)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return []
    return [f"--{name} {value}" for name, value in found.items() if not _agrees(name, value, config)]


def flags_of(state: Mapping[str, Tensor], image_size: int) -> dict[str, Any]:
    """What the names and shapes of improved-diffusion's UNet say about the flags it was built with.

    num_heads, dropout and the diffusion's flags leave no trace in them.

    Raises:
        KeyError: it is no such UNet.
    """
    first = state["input_blocks.0.0.weight"]
    channels, in_channels = first.shape[:2]
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))
    levels: list[list[int]] = [[]]
    attention: set[int] = set()
    for index in range(1, count):
        if f"input_blocks.{index}.0.in_layers.2.weight" in state:
            levels[-1].append(state[f"input_blocks.{index}.0.in_layers.2.weight"].shape[0])
            if f"input_blocks.{index}.1.qkv.weight" in state:
                attention.add(image_size >> (len(levels) - 1))
        else:
            levels.append([])
    embedding = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    flags: dict[str, Any] = {
        "in_channels": in_channels,
        "num_channels": channels,
        "channel_mult": ",".join(str(widths[0] // channels) for widths in levels),
        "num_res_blocks": len(levels[0]),
        "attention_resolutions": ",".join(map(str, sorted(attention, reverse=True))),
        "learn_sigma": state["out.2.weight"].shape[0] == 2 * in_channels,
        "class_cond": "label_emb.weight" in state,
        "use_scale_shift_norm": embedding == 2 * levels[0][0],
    }
    if flags["class_cond"]:
        flags["num_classes"] = state["label_emb.weight"].shape[0]
    return flags


def _agrees(name: str, value: Any, config: TrainConfig) -> bool:
    mine = getattr(config, name)
    if name == "in_channels":
        return mine in (0, value)
    if name == "attention_resolutions":
        # Resolutions that no level has change nothing.
        levels = {config.image_size >> level for level in range(12)}
        return {int(r) for r in mine.split(",") if r} & levels == {int(r) for r in str(value).split(",") if r}
    if name == "channel_mult" and not mine:
        mine = ",".join(map(str, default_channel_mult(config.image_size)))
    return bool(mine == value)


def _refuse_other_options(path: Path, made_with: Mapping[str, Any], config: TrainConfig) -> None:
    values = config.to_dict()
    for section in (ModelOptions, DiffusionOptions):
        for field in dataclasses.fields(section):
            name = field.name
            if name in made_with and name not in NOT_IN_THE_WEIGHTS and made_with[name] != values[name]:
                raise invalid(name, values[name], f"{made_with[name]!r}, with which {path} was made")


def cpu_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's own copy on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if torch.is_tensor(value)}
