"""The demo: `python -m tdc_fast.demo --out DIR` trains, prunes, samples, compares and writes report.html."""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("demo"))

from collections.abc import Sequence

from tdc_fast.command_line import parse_flags, run_command
from tdc_fast.entry import STOPPED
from tdc_fast.experiments import DemoOptions, run_demo

__all__ = ["DemoOptions", "main", "run_demo"]


def _demo(arguments: list[str]) -> None:
    values = parse_flags(
        {"demo": DemoOptions},
        arguments,
        defaults={},
        prog="python -m tdc_fast.demo",
        description="Train baselines and experts on scikit-learn's digits, compare them and write report.html.",
    )
    run_demo(DemoOptions(**values))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_demo, argv, stopped=STOPPED["demo"])
