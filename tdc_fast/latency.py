r"""Measure how long a model's layers take on this device at every width: `python -m tdc_fast.latency --run DIR`.

The table is for `--budget_in latency --latency_table FILE` of `tdc_fast.train` and `tdc_fast.prune`. The model, its
batch, number of groups and precision are those of a run, or of the flags that it is to be trained with::

    python -m tdc_fast.latency --out latency.json --data_dir images/ --image_size 32 --num_channels 128 \
        --num_res_blocks 3 --batch_size 128 --precision bf16 --groups 8
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("latency"))

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tdc_fast.command_line import check_writable, parse_flags, run_command, use_threads, value_of
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.runs.config import TrainConfig, read_options
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.groups import load_groups
from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.options import SECTIONS
from tdc_fast.training.latency_table import measure_table

__all__ = ["LatencyOptions", "main", "measure_table"]

_DESCRIPTION = """Measure one forward of every layer of a model at every width of its units, with the batch, the
number of groups and the precision that its experts are trained with, and write the times as a table. Prints how well
MACs and bytes predict the layers, and how well the table predicts whole models."""


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """What to measure, and where to write it."""

    run: PathText = ""
    """Run directory, whose model and settings are measured. Otherwise give the flags of tdc_fast.train."""
    config: PathText = ""
    """YAML or JSON file of flag names and values; flags on the command line win."""
    out: PathText = "latency.json"
    """The file to write."""
    seconds: Annotated[float, Within(0, 3600)] = 0.05
    """Seconds for which each layer is measured at each width, approximately; at least 5 forwards."""


def _config(values: Mapping[str, Any]) -> TrainConfig:
    """The options, which need not say how long to train."""
    given = {name for name, value in values.items() if value}
    steps = {}
    if "groups" in given and "baseline_steps" not in given:
        if not given & {"base", "stage1_steps", "lr_anneal_steps"}:
            steps["stage1_steps"] = 1
        if "stage2_steps" not in given:
            steps["stage2_steps"] = 1
    return TrainConfig.from_dict({**values, **steps})


def _measure(arguments: list[str]) -> None:
    directory, file = value_of(arguments, "run"), value_of(arguments, "config")
    run = RunDirectory.open(directory) if directory else None
    defaults = run.config.to_dict() if run else {}
    defaults |= read_options(file) if file else {}
    _config(defaults)  # refuses a bad key or value of the file by name
    values = parse_flags(
        {"latency": LatencyOptions, **SECTIONS},
        arguments,
        defaults=defaults,
        prog="python -m tdc_fast.latency",
        description=_DESCRIPTION,
    )
    out, seconds = Path(values.pop("out")), values.pop("seconds")
    for name in ("run", "config"):
        values.pop(name)
    config = _config(values)
    if config.groups < 0 and run and (run.path / "groups.json").is_file():
        config = config.replace(groups=load_groups(run).num_groups)
    if config.groups < 1:
        remedy = "--groups N, the number of experts in a batch; --run DIR knows it after a run has made its groups"
        raise invalid("groups", config.groups, remedy)
    if not out.parent.is_dir():
        raise invalid("out", str(out), "a file in a folder that exists")
    if out.is_dir():  # refused before everything is measured
        raise invalid("out", str(out), "the name of a file, such as latency.json in that folder")
    check_writable(out.parent)
    use_threads(config.num_threads)
    table, report = measure_table(config, seconds, run.in_channels if run else None)
    table.save(out)
    print(f"{report}\nwritten: {out}\nnext: --budget_in latency --latency_table {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_measure, argv, stopped=STOPPED["latency"])
