"""`python -m bench.paper main|stages|settings|variants|agents|all`: the paper's tables at small scale.

It may be stopped at any time; the same command continues. Runs go to --runs, tables to --out. With --budget_in latency
the budgets of pruned experts are shares of the base's time, and the tables tell both. `--study images` makes the main
table on your own images, in --minutes: see bench/paper/images.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

from bench.files import ROOT
from bench.paper.images import images_main
from bench.paper.recipes import STUDIES, TIMED, Study
from bench.paper.run import cpu_minutes, protocol, refuse_what_time_forbids, run_rows
from bench.paper.summary import summarise, write_table
from bench.paper.tables import TABLES, Table, with_merged
from tdc_fast.atomic import write_json
from tdc_fast.command_line import parse_flags, run_command, split_names
from tdc_fast.errors import invalid
from tdc_fast.experiments.assemble import describe_environment
from tdc_fast.experiments.folder import begun_with
from tdc_fast.experiments.measure import load_reference
from tdc_fast.runs.limits import PathText, Within, comma_numbers
from tdc_fast.runs.options import TimeOptions, time_options

IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class TablesOptions(TimeOptions):
    """The paper's tables on a built-in data set."""

    study: str = "digits"
    """Data and denoiser: digits, digits-wide, photos, photos-long; images has other flags: --study images --help."""
    seeds: Annotated[int, Within(1, 10**4)] = 3
    """Training seeds, from 0 on."""
    samples: Annotated[int, Within(2, 10**7)] = 5000
    """Images per draw for the Fréchet distance."""
    draws: Annotated[int, Within(1, 10**4)] = 1
    """Draws per model."""
    scale: float = 1.0
    """Length of training; 1 is what the study says."""
    merged: str = ""
    """Comma list of scales: further rows, with the experts of each TDC row merged into one dense model; 1 is their
    average, others are task arithmetic."""
    processes: Annotated[int, Within(0, 2**10)] = 0
    """Worker processes of one thread each; 0 starts one per core."""
    runs: PathText = str(ROOT / "runs" / "paper")
    """Folder for the runs."""
    out: PathText = str(ROOT / "bench" / "results" / "paper")
    """Folder for the tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train and measure, write; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_tables, argv, stopped="stopped; the same command continues where it was")


def _tables(arguments: list[str]) -> None:
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--study")
    named, others = chosen.parse_known_args(arguments)
    if named.study == IMAGES:  # it has flags of its own
        table, flags = (others[0], others[1:]) if others and not others[0].startswith("-") else ("main", others)
        images_main(table, flags)
        return
    names, flags = split_names(arguments)
    values = parse_flags(
        {"tables": TablesOptions}, flags, defaults={}, prog="python -m bench.paper TABLE", description=__doc__ or ""
    )
    options = TablesOptions(**values)
    if len(names) != 1 or names[0] not in (*TABLES, "all"):
        raise invalid("table", " ".join(names), f"one of {', '.join(TABLES)}, or all")
    if options.study not in STUDIES:
        raise invalid("study", options.study, f"one of {', '.join(sorted(STUDIES))}, or {IMAGES}")
    if not 0 < options.scale <= 1000:
        raise invalid("scale", options.scale, "a number above 0 and at most 1000")
    scales = comma_numbers("merged", options.merged, float)
    study = STUDIES[options.study].scaled(options.scale).in_time(options)
    for name in TABLES if names[0] == "all" else names:
        _make(with_merged(TABLES[name], scales), study, options)


def _make(table: Table, study: Study, options: TablesOptions) -> None:
    """Train and measure what a table still lacks, and write the table."""
    name, seeds = table.name, range(options.seeds)
    how = protocol(study, options.samples, options.draws)
    folder = Path(options.runs) / f"{study.name}-{study.baseline_steps}"
    print(f"== {name}: {table.question}", flush=True)
    if study.name.endswith(TIMED):
        refuse_what_time_forbids(study, table.rows, folder)
        record, time = folder / "time.json", time_options(options)
        if not begun_with(record, time, "study", TimeOptions):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, time)
    processes = options.processes or os.cpu_count() or 1
    outcomes = run_rows(study, table.rows, seeds, folder, how, processes, lambda text: print(text, flush=True))
    reference = load_reference(folder / f"reference-{how.samples}.pt")
    minutes = cpu_minutes(study, table.rows, seeds, folder)
    result = summarise(table, study, outcomes, seeds, how, reference, describe_environment(), minutes)
    result |= {"date": date.today().isoformat(), "command": _command(name, options)}
    print(write_table(result, Path(options.out)))


def _command(table: str, options: TablesOptions) -> str:
    """The command that makes the table again, without folders."""
    numbers = " ".join(f"--{name} {getattr(options, name)}" for name in ("seeds", "samples", "draws", "scale"))
    changed = {"merged": options.merged, **time_options(options)}
    defaults = {"merged": "", **time_options(TimeOptions())}
    others = "".join(f" --{name} {shlex.quote(value)}" for name, value in changed.items() if value != defaults[name])
    return f"python -m bench.paper {table} --study {options.study} {numbers}{others}"


if __name__ == "__main__":
    sys.exit(main())
