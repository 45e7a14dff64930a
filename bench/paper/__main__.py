"""`python -m bench.paper main|stages|settings|levers|agents|all`: the paper's tables at small scale.

It may be stopped at any time; the same command continues. Runs go to --runs, tables to --out. `--study images` makes
the main table on your own images, in --minutes: see bench/paper/images.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from bench.files import ROOT
from bench.paper.images import images_main
from bench.paper.recipes import STUDIES, Study
from bench.paper.run import cpu_minutes, protocol, run_rows
from bench.paper.summary import summarise, write_table
from bench.paper.tables import TABLES, Table, with_merged
from tdc_fast.command_line import run_command
from tdc_fast.experiments.assemble import describe_environment
from tdc_fast.experiments.measure import load_yardsticks
from tdc_fast.runs.limits import comma_numbers

IMAGES = "images"


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
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    parser.add_argument("table", choices=[*TABLES, "all"])
    parser.add_argument(
        "--study",
        choices=[*sorted(STUDIES), IMAGES],
        default="digits",
        help="data and denoiser; images has other flags: --study images --help",
    )
    parser.add_argument("--seeds", type=int, default=3, help="training seeds 0 to this many")
    parser.add_argument("--samples", type=int, default=5000, help="images per draw for the Fréchet distance")
    parser.add_argument("--draws", type=int, default=1, help="draws per model")
    parser.add_argument("--scale", type=float, default=1.0, help="length of training; 1 is what the study says")
    parser.add_argument(
        "--merged",
        default="",
        help="comma list of scales: further rows, with the experts of each TDC row merged into one dense model; 1 is "
        "their average, others are task arithmetic",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="workers of one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "paper", help="folder for the tables")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.samples < 2 or options.draws < 1 or options.scale <= 0:
        parser.error("--seeds and --draws start at 1, --samples at 2, --scale above 0")
    scales = comma_numbers("merged", options.merged, float)
    study = STUDIES[options.study].scaled(options.scale)
    for name in TABLES if options.table == "all" else [options.table]:
        _make(with_merged(TABLES[name], scales), study, options)


def _make(table: Table, study: Study, options: argparse.Namespace) -> None:
    """Train and measure what a table still lacks, and write the table."""
    name, seeds = table.name, range(options.seeds)
    how = protocol(study, options.samples, options.draws)
    folder = options.runs / f"{study.name}-{study.baseline_steps}"
    print(f"== {name}: {table.question}", flush=True)
    outcomes = run_rows(study, table.rows, seeds, folder, how, options.processes, lambda text: print(text, flush=True))
    yardsticks = load_yardsticks(folder / f"yardsticks-{how.samples}.pt")
    minutes = cpu_minutes(study, table.rows, seeds, folder)
    result = summarise(table, study, outcomes, seeds, how, yardsticks, describe_environment(), minutes)
    result |= {"date": date.today().isoformat(), "command": _command(name, options)}
    print(write_table(result, options.out))


def _command(table: str, options: argparse.Namespace) -> str:
    """The command that makes the table again, without folders."""
    numbers = " ".join(f"--{name} {getattr(options, name)}" for name in ("seeds", "samples", "draws", "scale"))
    merged = f" --merged {options.merged}" if options.merged else ""
    return f"python -m bench.paper {table} --study {options.study} {numbers}{merged}"


if __name__ == "__main__":
    sys.exit(main())
