"""Merge experts into one dense model: `python -m tdc_fast.merge --run DIR --out FILE`, or of files instead of a run.

The file is one of weights like a base's, with its configuration beside it: `sample`, `nll`, `serve` and `convert` take
it (`--model_path FILE`), and `train --base FILE` starts from it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("merge"))

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tdc_fast.command_line import check_writable, parse_flags, run_command, split_names, value_of
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.nn.merging import Merging, Method, Missing
from tdc_fast.runs.checkpoint import save_file
from tdc_fast.runs.denoisers import TrainedDenoiser, from_checkpoint, from_run, refuse_mismatch, stored_facts
from tdc_fast.runs.limits import PathText, Within, check_limits, check_path, comma_numbers
from tdc_fast.runs.merged import merge_files, merge_run
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.weights import read_description

__all__ = ["MergeOptions", "main", "merge_files", "merge_run"]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to merge, how, and where to."""

    run: PathText = ""
    """Run directory whose experts are merged, with the averages (EMA) that it is sampled with. Instead, name files of
    weights of one architecture before the flags."""
    base: PathText = ""
    """With files: the weights that they were trained from, which task_arithmetic needs. With --run it is the base of
    the run."""
    method: Method = "average"
    """average: the sum of w_i expert_i. task_arithmetic: base + scale * the sum of w_i (expert_i - base)."""
    weights: str = ""
    """Comma list of w_i, one for each expert, from low to high timesteps; empty takes 1 / N each. An average divides
    them by their sum."""
    scale: Annotated[float, Within(-1000, 1000)] = 1.0
    """With task_arithmetic: 0 gives the base, 1 with equal weights the average, more moves further away from the
    base."""
    missing: Missing = "base"
    """Weights in the channels that a pruned expert lacks: base, the weights of the base; or zero, with which the expert
    computes the same as before."""
    out: PathText = ""
    """The file (.pt) to write; it must not exist."""


def _merge(arguments: list[str]) -> None:
    names, flags = split_names(arguments)
    for name in names:
        check_path("experts", name)
    run = value_of(flags, "run")
    if run and names:
        raise invalid("run", run, f"none together with {names[0]}: one of them names the experts")
    stored = stored_facts(run=run, model_path=names[0] if names else "") if run or names else {}
    values = parse_flags(
        {"merging": MergeOptions, "model": ModelOptions, "diffusion": DiffusionOptions},
        flags,
        defaults=stored,
        prog="python -m tdc_fast.merge",
        description="Merge the experts of a run, or files of weights, into one dense model.",
    )
    if not (run or names):
        raise ValueError("no experts are named; give either --run DIR or files of weights before the flags")
    refuse_mismatch(run or names[0], stored, values)
    options = MergeOptions(**{name: values[name] for name in MergeOptions.__dataclass_fields__})
    check_limits(MergeOptions, asdict(options))
    out = Path(options.out)
    if not options.out or out.suffix != ".pt" or out.exists() or out.with_suffix(".json").exists():
        raise invalid("out", options.out, "a new file, whose name ends in .pt")
    check_writable(out.parent)
    merging = Merging(
        method=options.method,
        weights=tuple(comma_numbers("weights", options.weights, float)),
        scale=options.scale,
        missing=options.missing,
    )
    merged = _of_run(options, merging) if run else _of_files(names, options, merging, values)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        out,
        merged.model.state_dict(),
        {**_description(merged, names[0] if names else ""), "merged": {"of": run or names, **asdict(merging)}},
    )
    print(f"{merged.name}: written to {out}")
    decoder = "" if merged.latents is None else " --vae DIR"
    print(f"next: python -m tdc_fast.sample --model_path {out}{decoder}")


def _of_run(options: MergeOptions, merging: Merging) -> TrainedDenoiser:
    if options.base:
        raise invalid("base", options.base, "none together with --run, whose base it is")
    return merge_run(from_run(options.run, "experts"), merging)


def _of_files(
    names: Sequence[str], options: MergeOptions, merging: Merging, facts: Mapping[str, Any]
) -> TrainedDenoiser:
    if options.missing != "base":
        raise invalid("missing", options.missing, "base with files, which hold whole models")
    for name in dict.fromkeys([*names, *filter(None, [options.base])]):
        refuse_mismatch(name, stored_facts(model_path=name), facts)
    base = from_checkpoint(options.base, facts) if options.base else None
    return merge_files(base, [from_checkpoint(name, facts) for name in names], merging)


def _description(denoiser: TrainedDenoiser, first: str) -> dict[str, Any]:
    """What is written beside the weights, so that they are used without flags: as a run, or the first file, has it."""
    if denoiser.run is not None:
        known = denoiser.run.directory.description("merged")
    else:
        own = {"in_channels": denoiser.channels, "config": denoiser.config.to_dict()}
        known = own | (read_description(Path(first)) or {})
    kept = ("in_channels", "classes", "class_counts", "latents", "config")
    return {"stage": "merged", "step": 0, **{name: known[name] for name in kept if name in known}}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, merge, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_merge, argv, stopped=STOPPED["merge"])
