r"""Search the widths of a run's experts: `python -m tdc_fast.prune --run DIR --agent tpe --rounds 8`.

The run must have a finished stage 1 and no trained experts. The search writes widths.json into it, and ``python -m
tdc_fast.train --resume DIR`` then trains the experts. Weights from elsewhere start a new run, with the flags that they
were trained with::

    python -m tdc_fast.prune --base ema_0.9999_500000.pt --run_dir runs/pruned --data_dir images/ --image_size 32 \
        --num_channels 128 --num_res_blocks 3 --batch_size 128 --groups 8 --k 0.6 --stage2_steps 60000 --agent tpe \
        --rounds 8
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("prune"))

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_fast.command_line import parse_flags, run_command, use_threads, value_of
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.pruning.search import Pruning
from tdc_fast.runs.config import TrainConfig, read_options
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.limits import PathText
from tdc_fast.runs.options import SECTIONS, SearchOptions
from tdc_fast.training.pruning import prune_base_file, prune_run, refuse_other_than_search

__all__ = ["main", "prune_base_file", "prune_run"]

_DESCRIPTION = """Search the width of every layer of every expert (proxy-based pruning): for a run whose stage 1 is
finished (--run), or for weights from elsewhere with the flags they were trained with (--base, --run_dir). Writes
widths.json and memory.jsonl into the run directory; python -m tdc_fast.train --resume DIR then trains the experts."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Which run to prune."""

    run: PathText = ""
    """Run directory with a finished stage 1. Flags that are not given come from its configuration; only those of the
    section search may differ from it."""
    config: PathText = ""
    """YAML or JSON file of flag names and values; flags on the command line win."""


_FREE = (*(field.name for field in dataclasses.fields(SearchOptions)), "device", "progress")


def _summary(path: Path, found: Pruning) -> str:
    rows = []
    plan, base_time = found.plan, found.base_latency
    costs, budgets = (plan.macs, plan.budgets) if plan.budgets else (plan.latency, plan.latency_budgets)
    for group, macs in enumerate(plan.macs):
        share = f"{macs / found.base_macs:.4f} of the base's MACs"
        if base_time:
            share += f", {plan.latency[group] / base_time:.4f} of its estimated time"
        scored = [trial.score for trial in found.trials[group] if trial.score is not None]
        best = f", best score {min(scored):.6g} of {len(scored)} candidates" if scored else ""
        rows.append(f"group {group}: {share}, {costs[group] / budgets[group]:.2%} of budget{best}")
    return "\n".join([*rows, f"written: {path / 'widths.json'}", f"next: python -m tdc_fast.train --resume {path}"])


def _prune_command(arguments: list[str]) -> None:
    directory, file = value_of(arguments, "run"), value_of(arguments, "config")
    if directory and value_of(arguments, "run_dir"):
        raise invalid(
            "run_dir",
            value_of(arguments, "run_dir"),
            f"none together with --run {directory}, which is the run directory",
        )
    defaults = RunDirectory.open(directory).config.to_dict() if directory else {}
    defaults |= read_options(file) if file else {}
    TrainConfig.from_dict(defaults)  # refuses a bad key or value of the file by name
    sections = {"prune": PruneOptions, "search": SearchOptions, **SECTIONS}
    values = parse_flags(
        sections, arguments, defaults=defaults, prog="python -m tdc_fast.prune", description=_DESCRIPTION
    )
    for name in ("run", "config"):
        values.pop(name)
    config = TrainConfig.from_dict(values)
    use_threads(config.num_threads)
    if directory:
        refuse_other_than_search(RunDirectory.open(directory).config, config)
        path = Path(directory)
        found = prune_run(path, **{name: values[name] for name in _FREE})
    else:
        run, found = prune_base_file(config)
        path = run.path
    print(_summary(path, found))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, search, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_prune_command, argv, stopped=STOPPED["prune"])
