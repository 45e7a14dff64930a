"""The main job: `python -m tdc_fast.demo --out DIR` trains, prunes, samples, compares and writes report.html."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tdc_fast.experiments import DemoOptions, run_demo
from tdc_fast.flags import parse_flags
from tdc_fast.training.interrupts import TrainingInterrupted


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `--help`."""
    try:
        values = parse_flags(
            {"job": DemoOptions},
            sys.argv[1:] if argv is None else argv,
            defaults={},
            prog="python -m tdc_fast.demo",
            description="Train baselines and experts on scikit-learn's digits, compare them and write report.html.",
        )
        run_demo(DemoOptions(**values))
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"tdc_fast.demo: {error}") from error
    except (KeyboardInterrupt, TrainingInterrupted) as stopped:
        raise SystemExit("tdc_fast.demo: stopped; the same command continues where it was") from stopped


# Worker processes import this module again; only the command itself may start the job.
if __name__ == "__main__":
    main()
