"""Checkpoints: improved-diffusion's file names, each file with its description and checksum beside it.

One checkpoint of step s is `model{s}.pt`, `ema_{rate}_{s}.pt` and `opt{s}.pt` (readable by anything that reads
improved-diffusion's) and `state{s}.pt` (random numbers, data position and the rest that an exact continuation needs).
Every `X.pt` has `X.json`: configuration, stage, step, run identity, size and sha256. `state{s}.json` is written
last: without it the process died while writing, and the checkpoint does not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, sha256_of, write_error, write_json
from tdc_fast.errors import invalid
from tdc_fast.text_files import read_json

FORMAT = 1


def model_file(step: int) -> str:
    """File name of the raw weights."""
    return f"model{step:06d}.pt"


def ema_file(rate: str, step: int) -> str:
    """File name of the averaged weights of a rate, as written on the command line."""
    return f"ema_{rate}_{step:06d}.pt"


def optimizer_file(step: int) -> str:
    """File name of the optimizer's state."""
    return f"opt{step:06d}.pt"


def state_file(step: int) -> str:
    """File name of the rest of the training state."""
    return f"state{step:06d}.pt"


def step_of(path: str | Path) -> int:
    """The step in a checkpoint's file name.

    Raises:
        ValueError: there is none. Training must not silently restart at step 0 because of a file name.
    """
    found = re.fullmatch(r"(?:model|opt|state|ema_.+_)(\d{6,})\.pt", Path(path).name)
    if not found:
        raise invalid("checkpoint", str(path), "a name such as model010000.pt, from which the step can be read")
    return int(found.group(1))


def save_checkpoint(directory: Path, step: int, contents: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Write the files of one checkpoint, the state file's description last.

    Args:
        directory: the stage's directory; it is created if necessary.
        step: step of the checkpoint.
        contents: file name -> object for `torch.save`; must hold `state_file(step)`.
        description: JSON values that go into every description (configuration, stage, identity).

    Raises:
        FloatingPointError: a tensor holds infinities or NaN; names it. Nothing is written then.
        OSError: a file cannot be written, as on a full disk; names it. The checkpoint then does not count.
    """
    for name, content in contents.items():
        diverged = first_non_finite(content)
        if diverged is not None:
            raise FloatingPointError(f"{name} would hold infinities or NaN, in {diverged}")
    directory.mkdir(parents=True, exist_ok=True)
    commit = state_file(step)
    described = {}
    (directory / commit).with_suffix(".json").unlink(missing_ok=True)  # an older checkpoint of the same step
    for name, content in contents.items():
        described[name] = _write(directory / name, content, {"step": step, **description})
    described[commit]["files"] = {name: described[name]["sha256"] for name in contents}
    for name in sorted(contents, key=lambda name: name == commit):
        write_json((directory / name).with_suffix(".json"), described[name])


def save_file(path: Path, content: Any, description: Mapping[str, Any]) -> None:
    """Write one file of weights that is no checkpoint of a run, and its description beside it.

    Args:
        path: a new file, whose name ends in .pt.
        content: object for `torch.save`.
        description: JSON values of the description.

    Raises:
        OSError: a file cannot be written, as on a full disk; names it. Neither is left behind then.
    """
    try:
        write_json(path.with_suffix(".json"), _write(path, content, description))
    except OSError:
        path.unlink(missing_ok=True)  # without its description it would be taken for improved-diffusion's
        raise


def _write(path: Path, content: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    """Write a file; returns its whole description."""
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
            file.flush()
            size, checksum = file.seek(0, 2), sha256_of(file)
    except RuntimeError as error:  # as torch.save reports a full disk
        raise write_error(path, error) from error
    return {"format": FORMAT, "file": path.name, "bytes": size, "sha256": checksum, **description}


def first_non_finite(content: Any) -> str | None:
    """The name of the first tensor with infinities or NaN in what goes into a file, or None.

    The tensors are judged on their device, and one number is read back for all of them.

    Args:
        content: tensors in mappings and sequences.
    """
    named = [(name, value) for name, value in _tensors(content) if value.is_floating_point() and value.numel()]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in named:
        by_device.setdefault(value.device, []).append((name, value))
    for group in by_device.values():
        finite = torch.stack([value.isfinite().all() for _, value in group])
        if not bool(finite.all()):
            return group[finite.tolist().index(False)][0]
    return None


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _tensors(value, f"{name}[{index}]")


def finished_steps(directory: Path) -> list[int]:
    """Steps of all checkpoints that were written to the end, ascending."""
    found = (re.fullmatch(r"state(\d{6,})\.json", path.name) for path in directory.glob("state*.json"))
    return sorted(int(match.group(1)) for match in found if match)


def find_problem(directory: Path, step: int, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a finished checkpoint, naming the file; None if every file is whole and of this run.

    Args:
        directory: the stage's directory.
        step: step of the checkpoint.
        expected: what its description must say.
    """
    marker = (directory / state_file(step)).with_suffix(".json")
    try:
        description = read_json(marker)
        files = dict(description["files"])
    except (OSError, ValueError, KeyError, TypeError):
        files = {}
    if not files or not all(isinstance(name, str) and Path(name).name == name and len(name) < 256 for name in files):
        return f"{marker} is damaged: it is no checkpoint description"
    foreign = differing_key(description, expected)
    if foreign:
        return f"{marker} belongs to another run: its {foreign} differs"
    for name, checksum in files.items():
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        with open(path, "rb") as file:
            if sha256_of(file) != checksum:
                return f"{path} is damaged or from another run: its sha256 is not the one in {marker.name}"
        beside = path.with_suffix(".json")
        if beside != marker and beside.is_file() and not _describes(beside, checksum):
            return f"{beside} is damaged: it does not describe {name}"
    return None


def _describes(description: Path, checksum: str) -> bool:
    try:
        values = read_json(description)
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("sha256") == checksum


def differing_key(description: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first key whose value differs from the expected one, or None.

    Of a configuration it is the differing flag.

    Args:
        description: what a checkpoint says about itself.
        expected: what it must say.
    """
    for key, value in expected.items():
        if description.get(key) != value:
            if isinstance(value, Mapping) and isinstance(description.get(key), Mapping):
                return differing_key(description[key], value) or key
            return key
    return None


def choose_checkpoint(
    directory: Path,
    expected: Mapping[str, Any],
    step: int,
    run: Path,
    check: Callable[[int], None] = lambda step: None,
) -> int | None:
    """The step to continue from: the latest checkpoint, or a chosen one.

    Args:
        directory: the stage's directory.
        expected: what the checkpoint's description must say (its identity and the like).
        step: -1 for the latest, 0 to restart the stage, otherwise that checkpoint.
        run: the run directory, for messages.
        check: raises ValueError if the content of a whole checkpoint does not fit what it is for.

    Returns:
        The step, or None if the stage has no checkpoint yet.

    Raises:
        ValueError: the checkpoint is missing, damaged or of another run; names it and the last good one.
    """
    steps = finished_steps(directory)
    if step == 0 or (step == -1 and not steps):
        return None
    chosen = steps[-1] if step == -1 else step

    def problem_of(candidate: int) -> str | None:
        problem = find_problem(directory, candidate, expected)
        if problem is None:
            try:
                check(candidate)
            except ValueError as error:
                return str(error)
        return problem

    problem = problem_of(chosen) if chosen in steps else f"{directory} has no checkpoint of that step"
    if problem is None:
        return chosen
    good = next((s for s in reversed(steps) if s != chosen and problem_of(s) is None), 0)
    offer = (
        f"the last good checkpoint is step {good}" if good else "there is no good checkpoint; step 0 restarts the stage"
    )
    raise ValueError(f"resume: {problem}; {offer}: --resume {run} --resume_step {good}")


def discard_after(directory: Path, step: int) -> None:
    """Invalidate checkpoints later than `step`, from which training continues and writes them again."""
    for later in finished_steps(directory):
        if later > step:
            (directory / state_file(later)).with_suffix(".json").unlink()
