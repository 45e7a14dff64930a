"""improved-diffusion's `--resume_checkpoint`: continue from model{step}.pt and the files beside it."""

from __future__ import annotations

from pathlib import Path

from tdc_fast.distributed import on_all, world
from tdc_fast.errors import invalid
from tdc_fast.runs.checkpoint import (
    ema_file,
    finished_steps,
    model_file,
    optimizer_file,
    state_file,
    step_of,
)
from tdc_fast.runs.weights import load_weights, read_description
from tdc_fast.training.loop import StageLoop

SAME_DRAWS = (
    "data_dir",
    "latents",
    "image_size",
    "class_cond",
    "batch_size",
    "seed",
    "heldout",
    "heldout_seed",
    "groups",
    "schedule_sampler",
)


def continue_from(path: Path, loop: StageLoop) -> None:
    """Load step, weights, averages and optimizer from a checkpoint of improved-diffusion or of another run.

    A checkpoint of another run of this library also has random numbers and data position; they are loaded if data,
    batch size and seed are the same, else they start from the seed.

    Args:
        path: the weights, model{step}.pt.
        loop: receives the state.

    Raises:
        ValueError: the name has no step, a file beside it is missing or damaged, or the flags describe another model.
            Nothing is restarted silently.
    """
    exact = world().from_first(lambda: _checked(path, loop))
    step, directory = step_of(path), path.parent
    try:
        loop.restore(directory, step, exact=exact)
    except ValueError as error:
        raise on_all(
            invalid("resume_checkpoint", str(path), f"files of the same model and optimizer beside it: {error}")
        ) from error
    if not exact and world().first:  # MACs spent before, as samples of this network
        spent = (read_description(path) or {}).get("macs")
        samples = step * loop.stage.batch_size if spent is None else round(spent / loop.stage.macs_per_sample[0])
        loop.samples_per_group[0] = samples
    rest = "" if exact else "; data order and random numbers start from the seed"
    print(f"continuing from {path} at step {step}{rest}")


def _checked(path: Path, loop: StageLoop) -> bool:
    """Whether random numbers and data position can be loaded too, once the files are found to fit."""
    step = step_of(path)
    directory = path.parent
    if path.name != model_file(step):
        raise invalid("resume_checkpoint", str(path), f"the weights' own file, {directory / model_file(step)}")
    config = loop.run.config
    needed = [model_file(step), *(ema_file(rate, step) for rate in config.ema_rates), optimizer_file(step)]
    for name in needed:
        if not (directory / name).is_file():
            raise invalid(
                "resume_checkpoint",
                str(path),
                f"{name} beside it; without it averages or optimizer would restart (see --ema_rate, or use --base)",
            )
    load_weights(path, config, loop.model, "resume_checkpoint")
    return step in finished_steps(directory) and _same_draws(directory / state_file(step), loop)


def _same_draws(path: Path, loop: StageLoop) -> bool:
    description = read_description(path) or {}
    made_with = description.get("config", {})
    return all(made_with.get(name) == getattr(loop.run.config, name) for name in SAME_DRAWS)
