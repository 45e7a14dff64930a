"""Runs GPU tests to their end although some hang or break the GPU.

    python -m tests.gpu.restarting [--seconds 540] [--record FILE] [arguments of pytest, such as a file]

A kernel that hangs or faults leaves its process without a GPU. So pytest runs in a process of its own, which notes
every test that it begins and ends, and another process goes on after it with the tests that are left. A test that ended
a process runs once more, alone: launches are named and waited for one by one, and kernels of the Hopper form say at
which barrier they wait for ever (hangs.py). With --record a later call goes on where this one stopped.

pytest loads this module as a plugin, which does the noting.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = "TDC_TEST_RECORD"  # names the file that tests are noted in
ALONE = "TDC_TEST_ALONE"  # set where a test runs alone, with kernels that report hangs
SECONDS_ALONE = 240.0  # kernels are compiled
ENDED = (0, 1, 5)  # pytest's codes when all tests have run: passed, some failed, there were none
PLUGIN = ("-p", "tests.gpu.restarting")
BEGAN = "ended the process"  # what became of a test that began, unless something else is noted
HANGS, BREAKS = "hangs", "leaves the GPU unusable"
LOST = (HANGS, BREAKS, BEGAN)
STOPPED = "was stopped when the time was over"  # runs again in a later call


def note(test: str, what: str, text: str = "", record: Path | None = None) -> None:
    """Notes what became of a test, in the process's record unless another is given."""
    path = record or os.environ.get(RECORD)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, "what": what, "text": text}) + "\n")


def read(record: Path) -> dict[str, tuple[str, str]]:
    """What became of every test that began, in order, and the text of its failure."""
    became: dict[str, tuple[str, str]] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        one = json.loads(line)
        # What comes after, such as the error of a fixture that is torn down, is not what to look at.
        if became.get(one["test"], ("",))[0] not in (HANGS, BREAKS):
            became[one["test"]] = (one["what"], one["text"])
    return became


def over(record: Path) -> set[str]:
    """The tests that need not run any more."""
    return {test for test, (what, _) in read(record).items() if what != STOPPED}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = over(Path(os.environ[RECORD])) if RECORD in os.environ else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    note(nodeid, BEGAN)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        note(report.nodeid, "failed", report.longreprtext)
    elif report.skipped or report.when == "call":
        note(report.nodeid, report.outcome, report.longrepr[2] if isinstance(report.longrepr, tuple) else "")


def run(arguments: Sequence[str], seconds: float, **variables: str) -> int | None:
    """pytest's exit code; None: the time was over."""
    command = [sys.executable, "-m", "pytest", *PLUGIN, "-m", "gpu", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables)
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()


def run_all(arguments: Sequence[str], record: Path, end: float) -> str:
    """Runs all tests that are not in the record, until a time of time.monotonic(). Returns why some are left, if so."""
    while True:
        before = over(record)
        code = run(["-v", *arguments], end - time.monotonic(), **{RECORD: str(record)})
        became = read(record)
        lost = [test for test, (what, _) in became.items() if what in LOST and test not in before]
        if code is None:
            for test in lost:
                note(test, STOPPED, record=record)
            return "the time was over"
        if code in ENDED and not lost:
            return ""
        if over(record) == before:
            return f"pytest ended with {code} before it began a test"
        for test in lost:
            print(f"\n{test}: {became[test][0]}. Once more, alone:", flush=True)
            run(["-s", test], min(SECONDS_ALONE, end - time.monotonic()), **{ALONE: "1", "CUDA_LAUNCH_BLOCKING": "1"})


def summary(became: dict[str, tuple[str, str]]) -> str:
    """How many tests passed, a line for each that did not, and why tests were skipped."""
    counts: dict[str, int] = {}
    for what, _ in became.values():
        counts[what] = counts.get(what, 0) + 1
    lines = [", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "no test began"]
    for test, (what, text) in became.items():
        if what not in ("passed", "skipped"):
            errors = [line for line in text.splitlines() if line.startswith("E  ")] or text.splitlines() or [""]
            lines.append(f"{what}: {test} {errors[0].removeprefix('E').strip()}".rstrip())
    return "\n".join([*lines, *sorted({text for what, text in became.values() if what == "skipped" and text})])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.restarting", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="when to stop (default 540)")
    parser.add_argument("--record", type=Path, help="what tests are noted in; those that are already there do not run")
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = (options.record or Path(folder) / "record").absolute()
        left = run_all(rest, record, time.monotonic() + options.seconds)
        became = read(record)
    print(f"\n{summary(became)}")
    if left:
        print(f"tests are left: {left}")
    return 0 if not left and all(what in ("passed", "skipped") for what, _ in became.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
