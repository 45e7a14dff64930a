"""``python -m tdc_fast.train``: train a denoiser as improved-diffusion does, or a TDC model with --groups N.

From Python::

    from tdc_fast.train import TrainConfig, train

    config = TrainConfig(data_dir="digits", image_size=8, num_channels=16, groups=4, stage1_steps=500, stage2_steps=500)
    run = train(config)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from tdc_fast.errors import invalid
from tdc_fast.runs.build import build_data
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.opening import open_run
from tdc_fast.training.cli import parse_command_line
from tdc_fast.training.interrupts import TrainingInterrupted, how_to_continue
from tdc_fast.training.search import build_agents, prunes
from tdc_fast.training.stages import group_timesteps, prune_base, train_base, train_experts

__all__ = ["TrainConfig", "main", "open_run", "train"]


def train(config: TrainConfig, dataset: Any = None) -> RunDirectory:
    """Run all phases that the configuration asks for, or the rest of them with ``config.resume``.

    Args:
        dataset: images to train on instead of what ``config.data_dir`` names, as an
            :class:`~tdc_fast.data.dataset.ImageDataset`.

    Returns:
        The run directory; :func:`tdc_fast.training.load_run` reads models from it.

    Raises:
        ValueError: an impossible configuration, or a checkpoint that is damaged or foreign.
        TrainingInterrupted: stopped by Ctrl-C after saving.
    """
    if not isinstance(config, TrainConfig):
        raise invalid("config", type(config).__name__, "a TrainConfig")
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if dataset is None:
        dataset = build_data(config)
    elif not hasattr(dataset, "image_size"):
        raise invalid("dataset", type(dataset).__name__, "an ImageDataset, such as ImageDataset.from_array(images)")
    elif dataset.image_size != config.image_size:
        raise invalid("image_size", config.image_size, f"{dataset.image_size}, as the images of dataset have")
    elif config.class_cond and dataset.labels is None:
        raise invalid("class_cond", config.class_cond, "False, as dataset has no labels")
    elif dataset.num_classes > config.num_classes:
        raise invalid("num_classes", config.num_classes, f"at least the {dataset.num_classes} classes of dataset")
    if prunes(config):
        build_agents(config)  # what the search needs and is not installed is missed now, not after stage 1
    run = open_run(config, dataset.channels)
    with run.writing():
        print(f"run directory: {run.path}", flush=True)
        skipped = _report_skipped(dataset, 0)
        try:
            base = train_base(run, dataset)
            if config.groups and config.stop_after != "stage1":
                group_timesteps(run, base, dataset)
                widths = prune_base(run, base, dataset)
                if config.stop_after != "pruning":
                    train_experts(run, base, widths, dataset)
        except TrainingInterrupted:
            raise
        except KeyboardInterrupt as interrupt:  # outside the loops, where nothing is lost that a checkpoint would hold
            raise TrainingInterrupted("stopped between two stages; " + how_to_continue(run.path)) from interrupt
        finally:  # a folder too large for memory finds its corrupt files on the way
            _report_skipped(dataset, skipped)
    return run


def _report_skipped(dataset: Any, known: int) -> int:
    """Print how many images were left out, where there are more than `known`; their number."""
    skipped: int = dataset.skipped
    if skipped > known:
        print(f"left out {skipped} corrupt image{'s' if skipped > 1 else ''}", flush=True)
    return skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print; returns the exit status (2 for a refused flag, 130 after Ctrl-C)."""
    try:
        config = parse_command_line(sys.argv[1:] if argv is None else argv)
        run = train(config)
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingInterrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped before the run began", file=sys.stderr)
        return 130
    if config.stop_after == "never":
        print(f"finished: {run.path}")
    else:
        print(f"stopped after {config.stop_after}: {run.path}; --resume {run.path} goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
