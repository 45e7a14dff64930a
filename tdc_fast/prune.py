"""Search the widths of a run's experts: ``python -m tdc_fast.prune --run DIR --agent tpe --rounds 8``.

It works on a run whose stage 1 is finished and whose experts are not trained yet, and leaves widths.json where stage 2
finds it: ``python -m tdc_fast.train --resume DIR`` goes on from there. Weights of another program start a run of their
own, with the flags that they were trained with::

    python -m tdc_fast.prune --base ema_0.9999_500000.pt --run_dir runs/pruned --data_dir images/ --image_size 32 \\
        --num_channels 128 --num_res_blocks 3 --groups 8 --k 0.6 --stage2_steps 60000 --agent tpe --rounds 8
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_fast.command_line import parse_flags, run_command, use_threads, value_of
from tdc_fast.errors import invalid
from tdc_fast.pruning.search import Pruning
from tdc_fast.runs.build import build_data
from tdc_fast.runs.config import TrainConfig, read_options, refuse_changed_options
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.options import SECTIONS, SearchOptions
from tdc_fast.training.cost import stage1_steps
from tdc_fast.training.search import build_agents, prunes, refuse_trained_experts
from tdc_fast.training.stages import build_base, group_timesteps, search_widths, train_base

_DESCRIPTION = """Search how wide every layer of every expert is (proxy-based pruning): for a run whose stage 1 is
finished (--run), or for weights from elsewhere with the flags they were trained with (--base, --run_dir). Writes
widths.json and memory.jsonl into the run directory; python -m tdc_fast.train --resume DIR then trains the experts."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What to prune."""

    run: str = ""
    """Run directory with a finished stage 1. Its own configuration supplies every flag that is not given; only those of
    the section search may differ from it."""
    config: str = ""
    """YAML or JSON file of flag names and values; flags on the command line win."""


def prune_run(directory: str | Path, dataset: Any = None, **options: Any) -> Pruning:
    """Search the widths for a run with a finished stage 1 and write them where stage 2 finds them.

    A search of the same settings that was cut off goes on; more rounds add to a finished one.

    Args:
        dataset: calibration images; None loads what the run's configuration names.
        options: fields of :class:`~tdc_fast.runs.options.SearchOptions` (agent, rounds, ...) and ``device``,
            ``progress``; others are the run's.

    Raises:
        ValueError: stage 1 is not finished, experts are trained already, or there is nothing to prune.
        ImportError: naming the extra that installs what the agent needs.
    """
    stored = RunDirectory.open(directory).config
    config = stored.replace(**options)
    _refuse_other_than_search(stored, config)
    run = RunDirectory.open(directory, stored.replace(device=config.device, progress=config.progress))
    return _prune(run, config, dataset or build_data(config))


def prune_base_file(config: TrainConfig, dataset: Any = None) -> tuple[RunDirectory, Pruning]:
    """Begin the run of ``config``, whose ``base`` names weights from elsewhere, and search its widths; go on with it
    where the run directory holds it already.

    Raises:
        ValueError: the weights do not fit the flags, the directory holds another run, or there is nothing to prune.
    """
    from tdc_fast.runs.opening import open_run

    if not config.base:
        raise invalid("base", config.base, "--base FILE with the model's flags, or --run DIR")
    if not config.run_dir:
        raise invalid("run_dir", config.run_dir, "--run_dir DIR, where the run with these weights is to live")
    dataset = dataset or build_data(config)
    _check_prunable(config)
    path = Path(config.run_dir)
    if (path / "config.json").is_file() and RunDirectory.open(path).identity == config.identity:
        config = config.replace(resume=config.run_dir)
    run = open_run(config, dataset.channels)
    return run, _prune(run, config, dataset)


def _prune(run: RunDirectory, config: TrainConfig, dataset: Any) -> Pruning:
    _check_prunable(config)
    refuse_trained_experts(run)
    _check_stage1(run)
    with run.writing():
        state = train_base(run, dataset)
        group_timesteps(run, state, dataset)
        return search_widths(run, config, build_base(run, state), dataset)


def _check_prunable(config: TrainConfig) -> None:
    if not config.groups:
        raise invalid(
            "groups",
            config.groups,
            "a run with --groups N; a plain one is the base of a new run: --base DIR --run_dir NEW --config "
            "DIR/config.json --groups N --stage2_steps STEPS",
        )
    if not prunes(config):
        raise invalid("k", config.k, "below 1, or --budgets: every expert may keep the whole base, nothing is pruned")
    build_agents(config)


def _check_stage1(run: RunDirectory) -> None:
    from tdc_fast.runs.checkpoint import finished_steps

    if run.config.base:
        return
    steps, wanted = finished_steps(run.stage_directory("base")), stage1_steps(run.config)
    if not steps or (wanted is not None and steps[-1] < wanted):
        have = f"step {steps[-1]} of {wanted}" if steps else "no checkpoint"
        raise invalid(
            "run",
            f"{run.path}, whose stage 1 has {have}",
            f"a finished one: python -m tdc_fast.train --resume {run.path} --stop_after stage1 trains it",
        )


def _refuse_other_than_search(stored: TrainConfig, wanted: TrainConfig) -> None:
    """ValueError naming an option that is neither the search's nor free to change, and differs from the run's."""
    own = {field.name: getattr(stored, field.name) for field in dataclasses.fields(SearchOptions)}
    refuse_changed_options(stored, wanted.replace(**own))


_FREE = (*(field.name for field in dataclasses.fields(SearchOptions)), "device", "progress")


def _summary(path: Path, found: Pruning) -> str:
    rows = []
    for group, (macs, budget) in enumerate(zip(found.plan.macs, found.plan.budgets, strict=True)):
        scored = [trial.score for trial in found.trials[group] if trial.score is not None]
        best = f", best score {min(scored):.6g} of {len(scored)} candidates" if scored else ""
        rows.append(
            f"group {group}: {macs / found.base_macs:.4f} of the base's MACs, {macs / budget:.2%} of budget{best}"
        )
    return "\n".join([*rows, f"written: {path / 'widths.json'}", f"next: python -m tdc_fast.train --resume {path}"])


def _prune_command(arguments: list[str]) -> None:
    directory, file = value_of(arguments, "run"), value_of(arguments, "config")
    if directory and value_of(arguments, "run_dir"):
        raise invalid("run_dir", value_of(arguments, "run_dir"), f"none beside --run {directory}, the run itself")
    defaults = RunDirectory.open(directory).config.to_dict() if directory else {}
    defaults |= read_options(file) if file else {}
    TrainConfig.from_dict(defaults)  # refuses an unknown key of the file by name
    sections = {"prune": PruneOptions, "search": SearchOptions, **SECTIONS}
    values = parse_flags(
        sections, arguments, defaults=defaults, prog="python -m tdc_fast.prune", description=_DESCRIPTION
    )
    for name in ("run", "config"):
        values.pop(name)
    config = TrainConfig.from_dict(values)
    use_threads(config.num_threads)
    if directory:
        _refuse_other_than_search(RunDirectory.open(directory).config, config)
        path = Path(directory)
        found = prune_run(path, **{name: values[name] for name in _FREE})
    else:
        run, found = prune_base_file(config)
        path = run.path
    print(_summary(path, found))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, search, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_prune_command, argv, stopped="stopped; the same command continues from memory.jsonl")


if __name__ == "__main__":
    sys.exit(main())
