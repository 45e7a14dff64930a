"""Reading weights: files of tensors, checked against their checksums and against the flags of the model.

Every file of weights is read by `load_tensors`, which runs no code, or by `load_verified`, which compares
it with its checksum first. `load_weights` also checks that the file is of the model that the flags describe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.atomic import sha256_of
from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import UNet
from tdc_fast.runs.build import build_unet, place
from tdc_fast.runs.checkpoint import finished_steps
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.unet_flags import differing_flags
from tdc_fast.text_files import read_json

NOT_IN_THE_WEIGHTS = frozenset({"dropout", "use_checkpoint", "in_channels", "sigma_small", "timestep_respacing"})
"""Options of model and diffusion that may differ from those of the base, since the weights do not depend on them."""


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """Read what `torch.save` wrote, without running any code that the file contains.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        ValueError: the file is missing, damaged, or needs code to be unpickled; names it.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise invalid("checkpoint", str(path), "an existing file") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise invalid("checkpoint", str(path), f"a whole file of tensors; it does not load: {reason}") from error


def load_verified(path: Path, device: str | torch.device = "cpu") -> Any:
    """Do `load_tensors` after comparing the file with the checksum in the description beside it, if any.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        ValueError: the file does not load, or has another checksum.
    """
    description = read_description(path)
    if description is not None and path.is_file():
        with open(path, "rb") as file:
            if sha256_of(file) != description.get("sha256"):
                raise invalid(
                    "checkpoint", str(path), "the file its .json describes; the sha256 differs: damaged or foreign"
                )
    return load_tensors(path, device)


def read_description(path: Path) -> dict[str, Any] | None:
    """The description beside a checkpoint file; None if there is none, as for files of improved-diffusion.

    Raises:
        ValueError: the description is damaged.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        description = read_json(beside)
    except ValueError as error:
        raise invalid("checkpoint", str(beside), "a JSON description; it is damaged") from error
    if not isinstance(description, dict):
        raise invalid("checkpoint", str(beside), "a JSON description; it is damaged")
    return description


def find_base_file(path: str | Path) -> Path:
    """The weight file that `--base` names: a .pt file, or in a run directory the latest average of its base.

    Raises:
        ValueError: there is no such file.
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


def load_weights(path: Path, config: TrainConfig, model: nn.Module, argument: str = "base") -> dict[str, Any] | None:
    """Load a file of weights into a model strictly.

    Args:
        path: the file.
        config: the flags that the model was built with.
        model: receives the weights.
        argument: the flag that named the file, for errors.

    Returns:
        The description beside the file; None for improved-diffusion's.

    Raises:
        ValueError: the file is damaged, holds numbers that are not finite, or was made with other flags; names them
            if the weights or the description show them.
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
    """Do `model.load_state_dict(strict=True)`, with an error that names the flags that would fit the file.

    Args:
        path: the file, for errors.
        state: its content.
        model: receives the weights.
        config: the flags that the model was built with.

    Raises:
        ValueError: names or shapes differ.
    """
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


def base_with_weights(run: RunDirectory, state: Mapping[str, Tensor], device: torch.device) -> UNet:
    """The dense base of a run with the given weights, in evaluation mode; random generators are left unchanged."""
    with torch.random.fork_rng():
        model = build_unet(run.config, run.in_channels)
    model.load_state_dict(dict(state))
    return place(model, device).eval()


def cpu_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's own copy on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if torch.is_tensor(value)}


def _refuse_other_options(path: Path, made_with: Mapping[str, Any], config: TrainConfig) -> None:
    values = config.to_dict()
    for section in (ModelOptions, DiffusionOptions):
        for field in dataclasses.fields(section):
            name = field.name
            if name in made_with and name not in NOT_IN_THE_WEIGHTS and made_with[name] != values[name]:
                raise invalid(name, values[name], f"{made_with[name]!r}, with which {path} was made")
