"""Reading weights: files of tensors, checked against their checksums and against the flags of the model.

Every file of weights is read by `load_tensors`, which runs no code, or by `load_verified`, which compares
it with its checksum first. `read_state` also checks every tensor against the model that the file is for; all weights of
runs and of users come through it. `load_weights` also checks the flags that the file was made with.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.atomic import sha256_of
from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import UNet
from tdc_fast.runs.build import build_unet, place
from tdc_fast.runs.checkpoint import finished_steps, first_non_finite
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.unet_flags import differing_flags, other_project
from tdc_fast.text_files import read_json

NOT_IN_THE_WEIGHTS = frozenset({"dropout", "use_checkpoint", "in_channels", "sigma_small", "timestep_respacing"})
"""Options of model and diffusion that may differ from those of the base, since the weights do not depend on them."""
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of parameter names that torch.compile, FSDP and activation checkpointing add."""


def load_tensors(path: Path, argument: str = "checkpoint") -> Any:
    """Read what `torch.save` wrote, without running any code that the file contains.

    Args:
        path: the file.
        argument: what named the file, for errors.

    Returns:
        The content, with tensors on the CPU.

    Raises:
        ValueError: the file is missing, no regular file, damaged, or needs code to be unpickled; names it.
    """
    if not path.is_file():  # a pipe would be waited for
        raise invalid(argument, str(path), "an existing file")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise invalid(argument, str(path), f"a whole file of tensors; {_why_not_loaded(error)}") from error


def _why_not_loaded(error: Exception) -> str:
    """Why torch refused a file, without torch's advice to run the code in it."""
    text = str(error)
    needed = re.search(r"GLOBAL ([\w.]+)", text)
    if needed:
        return (
            f"it needs {needed[1]}, and reading that could run code that the file brings along; ask for, or save, "
            "the state dict alone: torch.save(model.state_dict(), path)"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or a pickle that torch.save did not write"
    return f"it does not load: {text.splitlines()[0] if text else type(error).__name__}"


def load_verified(path: Path, argument: str = "checkpoint") -> Any:
    """Do `load_tensors` after comparing the file with the checksum in the description beside it, if any.

    Args:
        path: the file.
        argument: what named the file, for errors.

    Raises:
        ValueError: the file does not load, or has another checksum.
    """
    description = read_description(path)
    if description is not None and path.is_file():
        with open(path, "rb") as file:
            if sha256_of(file) != description.get("sha256"):
                raise invalid(
                    argument, str(path), "the file its .json describes; the sha256 differs: damaged or foreign"
                )
    elif path.is_file():
        _check_record_sums(path, argument)
    return load_tensors(path, argument)


def _check_record_sums(path: Path, argument: str) -> None:
    """Compare the records of a file that lies alone with the CRC-32 that `torch.save` stores with each.

    `torch.load` does not. torch can be told to leave the sums out; then none agrees, which is no damage.
    """
    if not zipfile.is_zipfile(path):
        return
    damaged, agreeing = [], 0
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                try:
                    with archive.open(record) as file:
                        while file.read(1 << 20):
                            pass
                    agreeing += record.file_size > 0
                except zipfile.BadZipFile:
                    damaged.append(record.filename)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise invalid(argument, str(path), f"a whole file of tensors; its archive is damaged: {error}") from error
    if damaged and agreeing:
        raise invalid(argument, str(path), f"a whole file; the CRC-32 of its record {damaged[0]} differs: damaged")


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
    """Load a file of weights into the model that flags describe, strictly.

    Args:
        path: the file.
        config: the flags that the model was built with.
        model: receives the weights.
        argument: the flag that named the file, for errors.

    Returns:
        The description beside the file; None for improved-diffusion's.

    Raises:
        ValueError: as `read_state`, or the file was made with other flags; names them if the weights or the description
            show them.
    """
    description = read_description(path)
    if description is not None and isinstance(description.get("config"), Mapping):
        _refuse_other_options(path, description["config"], config)
    model.load_state_dict(read_state(path, model.state_dict(), argument, config))
    return description


def read_state(
    path: Path, expected: Mapping[str, Tensor], argument: str = "checkpoint", config: TrainConfig | None = None
) -> dict[str, Tensor]:
    """Read a state dict, and check it against the model that it is for, before anything is loaded into that.

    Args:
        path: the file.
        expected: the model's own state dict.
        argument: what named the file, for errors.
        config: the flags that the model was built with, if the file may have been made with others.

    Returns:
        The tensors on the CPU.

    Raises:
        ValueError: the file is damaged, is no state dict of dense tensors, has other names, shapes or dtypes than the
            model, or holds infinities or NaN; names the file and the tensor.
    """
    state = load_verified(path, argument)
    if not isinstance(state, Mapping):
        raise invalid(argument, str(path), f"a state dict: names of parameters and their tensors, not {_kind(state)}")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_dense(value):
            raise invalid(argument, str(path), f"a state dict of dense tensors; {name} is {_kind(value)}")
    state = _without_wrappers(path, state, expected)
    _check_names_and_shapes(path, state, expected, config)
    for name, value in state.items():
        check_like(argument, path, name, value, expected[name])
    return dict(state)


def _without_wrappers(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state with the names that parameters have in the model itself, not in wrappers of it; prints a note."""
    if state.keys() == expected.keys():
        return state
    found: set[str] = set()

    def bare(name: str) -> str:
        found.update(WRAPPERS.intersection(name.split(".")))
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        while parts[0] == "module" and len(parts) > 1:  # of DataParallel and DistributedDataParallel
            found.add(parts.pop(0))
        return ".".join(parts)

    renamed = {bare(name): value for name, value in state.items()}
    if not found or len(renamed) != len(state):
        return state
    shown = ", ".join(f"'{name}.'" for name in sorted(found))
    print(f"note: {path} was saved from a wrapped model; {shown} is left out of its names", file=sys.stderr, flush=True)
    return renamed


def check_like(argument: str, path: Path, name: str, value: Any, expected: Tensor) -> None:
    """Check one tensor of a file.

    Args:
        argument: what named the file, for errors.
        path: the file.
        name: of the tensor.
        value: what the file holds under that name.
        expected: a tensor of the right shape and dtype.

    Raises:
        ValueError: it is not a dense tensor of that shape and dtype with finite numbers.
    """
    if not _is_dense(value) or value.shape != expected.shape or value.dtype != expected.dtype:
        wanted = f"{_kind(expected)} of shape {tuple(expected.shape)}"
        have = f"{_kind(value)} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _kind(value)
        raise invalid(argument, str(path), f"{name} as {wanted}; it is {have}")
    check_finite(argument, path, {name: value})


def check_finite(argument: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError, naming the file and the tensor, where one of them holds infinities or NaN."""
    name = first_non_finite(tensors)
    if name is not None:
        raise invalid(argument, str(path), f"finite weights; {name} holds infinities or NaN, as after a divergence")


def _is_dense(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.is_nested:
        return False
    return value.layout is torch.strided


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = (
        "meta"
        if value.is_meta
        else "nested"
        if value.is_nested
        else str(value.layout).removeprefix("torch.").replace("strided", "")
    )
    return " ".join(filter(None, ["a", kind, str(value.dtype).removeprefix("torch."), "tensor"]))


def _check_names_and_shapes(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: TrainConfig | None
) -> None:
    missing = sorted(expected.keys() - state.keys())
    foreign = sorted(state.keys() - expected.keys())
    shaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if not (missing or foreign or shaped):
        return
    other = other_project(state)
    if other:
        raise ValueError(f"{path} does not fit: it is {other}; only improved-diffusion's UNet can be loaded")
    flags = differing_flags(state, config) if config is not None else []
    owner = "the model of the flags" if config is not None else "the model"
    if shaped:
        name = shaped[0]
        example = f"{name} is {tuple(state[name].shape)} there and {tuple(expected[name].shape)} in {owner}"
    else:
        example = f"{missing[0]} is missing there" if missing else f"{foreign[0]} is not in {owner}"
    if flags:
        remedy = f"set {' '.join(flags)} as the file was made with"
    else:
        remedy = "flags of the model that the file was made with" if config is not None else "the file was changed"
    raise ValueError(f"{path} does not fit {owner}: {example}; {remedy}")


def base_with_weights(run: RunDirectory, weights: Mapping[str, Tensor] | Path, device: torch.device) -> UNet:
    """The dense base of a run in evaluation mode; random generators are left unchanged.

    Args:
        run: the run.
        weights: its state dict, or a file of the run that is read by `read_state`.
        device: where the model goes.
    """
    with torch.random.fork_rng():
        model = build_unet(run.config, run.in_channels)
    model.load_state_dict(read_state(weights, model.state_dict()) if isinstance(weights, Path) else dict(weights))
    return place(model, device).eval()


def cpu_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's own copy on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items() if torch.is_tensor(value)}


def _refuse_other_options(path: Path, made_with: Mapping[str, Any], config: TrainConfig) -> None:
    values = config.to_dict()
    without = NOT_IN_THE_WEIGHTS | (set() if config.class_cond else {"num_classes"})
    for section in (ModelOptions, DiffusionOptions):
        for field in dataclasses.fields(section):
            name = field.name
            wanted = config.label_rows if name == "num_classes" else values[name]
            if name in made_with and name not in without and made_with[name] != wanted:
                raise invalid(name, values[name], f"{made_with[name]!r}, with which {path} was made")
