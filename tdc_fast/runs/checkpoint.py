"""Checkpoints: improved-diffusion's file names, each file with its description and checksum beside it.

One checkpoint of step s is ``model{s}.pt``, ``ema_{rate}_{s}.pt`` and ``opt{s}.pt`` (readable by anything that reads
improved-diffusion's) and ``state{s}.pt`` (random numbers, data position and the rest that an exact continuation needs).
Every ``X.pt`` has ``X.json``: configuration, stage, step, run identity, size and sha256. ``state{s}.json`` is written
last: a checkpoint without it was being written when the process died, and does not count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tdc_fast.atomic import atomic_file, sha256_of, write_json
from tdc_fast.errors import invalid

FORMAT = 1


def model_file(step: int) -> str:
    return f"model{step:06d}.pt"


def ema_file(rate: str, step: int) -> str:
    return f"ema_{rate}_{step:06d}.pt"


def optimizer_file(step: int) -> str:
    return f"opt{step:06d}.pt"


def state_file(step: int) -> str:
    return f"state{step:06d}.pt"


def step_of(path: str | Path) -> int:
    """The step in a checkpoint's file name.

    Raises:
        ValueError: there is none; a training run must never go back to step 0 because of a name.
    """
    found = re.fullmatch(r"(?:model|opt|state|ema_.+_)(\d{6,})\.pt", Path(path).name)
    if not found:
        raise invalid("checkpoint", str(path), "a name such as model010000.pt, from which the step can be read")
    return int(found.group(1))


def save_checkpoint(directory: Path, step: int, contents: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Write the files of one checkpoint, the state file's description last.

    Args:
        contents: file name -> object for ``torch.save``; must hold ``state_file(step)``.
        description: JSON values that go into every description (configuration, stage, identity).
    """
    directory.mkdir(parents=True, exist_ok=True)
    commit = state_file(step)
    described = {}
    (directory / commit).with_suffix(".json").unlink(missing_ok=True)  # an older checkpoint of the same step
    for name, content in contents.items():
        with atomic_file(directory / name) as file:
            torch.save(content, file)
            file.flush()
            described[name] = {
                "format": FORMAT,
                "file": name,
                "bytes": file.seek(0, 2),
                "sha256": sha256_of(file),
                "step": step,
                **description,
            }
    described[commit]["files"] = {name: described[name]["sha256"] for name in contents}
    for name in sorted(contents, key=lambda name: name == commit):
        write_json((directory / name).with_suffix(".json"), described[name])


def finished_steps(directory: Path) -> list[int]:
    """Steps of all checkpoints that were written to the end, ascending."""
    found = (re.fullmatch(r"state(\d{6,})\.json", path.name) for path in directory.glob("state*.json"))
    return sorted(int(match.group(1)) for match in found if match)


def find_problem(directory: Path, step: int, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a finished checkpoint, naming the file; None when every file is whole and of this run."""
    marker = (directory / state_file(step)).with_suffix(".json")
    try:
        description = json.loads(marker.read_text())
        files = dict(description["files"])
    except (OSError, ValueError, KeyError, TypeError):
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
    return None


def differing_key(description: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first key whose described value is not the expected one; a configuration's differing flag by its own name."""
    for key, value in expected.items():
        if description.get(key) != value:
            if isinstance(value, Mapping) and isinstance(description.get(key), Mapping):
                return differing_key(description[key], value) or key
            return key
    return None


def choose_checkpoint(directory: Path, expected: Mapping[str, Any], step: int, run: Path) -> int | None:
    """The step to continue from: the latest checkpoint, or the one asked for.

    Args:
        expected: description that the checkpoint must carry (identity and the like).
        step: -1 for the latest, 0 to begin the stage anew, otherwise that checkpoint.
        run: the run directory, for messages.

    Returns:
        The step, or None where the stage has no checkpoint yet.

    Raises:
        ValueError: the checkpoint is damaged, truncated, foreign or not there; names it and offers the last good one.
    """
    steps = finished_steps(directory)
    if step == 0 or (step == -1 and not steps):
        return None
    chosen = steps[-1] if step == -1 else step
    problem = (
        find_problem(directory, chosen, expected) if chosen in steps else f"{directory} has no checkpoint of that step"
    )
    if problem is None:
        return chosen
    good = next((s for s in reversed(steps) if s != chosen and find_problem(directory, s, expected) is None), 0)
    offer = (
        f"the last good checkpoint is step {good}"
        if good
        else "there is no good checkpoint; step 0 begins the stage anew"
    )
    raise ValueError(f"resume: {problem}; {offer}: --resume {run} --resume_step {good}")


def discard_after(directory: Path, step: int) -> None:
    """Uncommit checkpoints later than ``step``: training goes on from there and will write them anew."""
    for later in finished_steps(directory):
        if later > step:
            (directory / state_file(later)).with_suffix(".json").unlink()
