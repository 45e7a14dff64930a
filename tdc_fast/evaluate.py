"""Compare two sets of images: `python -m tdc_fast.evaluate A B`.

Each of A and B is a folder, an .npz or .npy file, `digits`, `photos`, or a run directory, which is sampled first
and whose denoising loss is measured as well.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("evaluate"))

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from tdc_fast.atomic import remove_leftovers, write_json
from tdc_fast.command_line import check_writable, parse_flags, run_command, split_names, use_threads
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.evaluation import EvaluateOptions, evaluate
from tdc_fast.evaluation.comparison import describe
from tdc_fast.evaluation.image_sets import is_run

__all__ = ["EvaluateOptions", "evaluate", "main"]


def _evaluate(arguments: list[str]) -> None:
    names, flags = split_names(arguments)
    values = parse_flags(
        {"evaluation": EvaluateOptions},
        flags,
        defaults={},
        prog="python -m tdc_fast.evaluate A B",
        description="Compare two of: folder of images, .npz or .npy file, digits, photos, run directory.",
    )
    options = EvaluateOptions(**values)
    if len(names) != 2:
        given = f"{len(names)} sets of images are named" + (f" ({', '.join(names)})" if names else "")
        raise ValueError(f"{given}; name two of: folder, .npz or .npy file, digits, photos, run directory")
    use_threads(options.num_threads)
    run = next((name for name in names if is_run(name)), "")
    out = Path(options.out or os.path.join(run, "evaluation.json"))
    if out.is_dir():  # refused before hours of sampling
        raise invalid("out", options.out, "the name of a file, such as evaluation.json in that folder")
    check_writable(out.parent)
    result = evaluate(names[0], names[1], options)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent, f"{glob.escape(out.name)}.*", of_dead_processes_only=True)
    write_json(out, result)
    print(describe(result))
    print(f"written to {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_evaluate, argv, stopped=STOPPED["evaluate"])
