"""`python -m bench.gpu_all --out DIR`: everything that needs a GPU, tests and measurements, the most important first.

A step is one command, or several side by side; what each prints goes to a log in DIR. A step that fails or is stopped
at its limit does not keep the others from running. The same command continues where the last one ended: `--seconds`
divides the work, an hour on an H200, into as many calls as wanted. DIR/steps.json says how each step ended. Tests that
DIR/*.tests have noted do not run again: delete these files to repeat them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.files import ROOT, seconds, whole_number
from tdc_fast.atomic import write_json

STOPPED = "stopped at its limit"
UNET = (  # of CIFAR-10; a table of times needs no data and no number of steps
    "--image_size 32 --in_channels 3 --num_channels 128 --num_res_blocks 3 --batch_size 64 --precision bf16"
    " --groups 8 --device cuda --stage1_steps 1 --stage2_steps 1"
)


@dataclass(frozen=True)
class Step:
    """Commands that run side by side.

    Attributes:
        name: of the step, and of its logs.
        seconds: after which they are stopped.
        commands: arguments of Python.
        result: a file that the commands read, as a pattern in the folder of results. Without it they do not run.
    """

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    result: str = ""


def steps(out: Path, processes: int) -> list[Step]:
    """All steps, in order.

    Args:
        out: folder of the results.
        processes: that compile Triton's kernels at the same time.
    """

    def one(name: str, seconds: int, command: str, result: str = "") -> Step:
        return Step(name, seconds, (tuple(command.split()),), result)

    def tests(name: str, seconds: int, files: Sequence[str]) -> Step:
        runner = ("-m", "tests.gpu.restarting", "--seconds", str(seconds - 20))
        return Step(
            name, seconds, tuple((*runner, "--record", f"{out}/{file}.tests", f"tests/gpu/{file}") for file in files)
        )

    first = ["test_hopper_units.py"]
    hopper = ["test_hopper.py", "test_host.py", "test_replay.py"]
    others = sorted({path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")} - {*first, *hopper})
    compilers = tuple(("-m", "tests.gpu.warm", f"{index}/{processes}") for index in range(processes))
    return [
        tests("hopper_units", 150, first),
        tests("hopper", 420, hopper),
        Step("compile", 150, compilers),
        tests("tests", 500, others),
        one("bench", 380, f"-m bench.gpu --seconds 320 --out {out} --name default"),
        one("bench_layers", 330, f"-m bench.gpu --only norm conv --seconds 280 --out {out} --name layers"),
        one(
            "bench_hopper",
            330,
            f"-m bench.gpu --only norm conv --backend hopper --seconds 280 --out {out} --name hopper",
        ),
        one("backend_times", 60, f"-m bench.backend_times {out}/hopper.json --out {out}", "hopper.json"),
        one("roofline", 60, f"-m bench.roofline {out}/hopper.json", "hopper.json"),
        one("host", 90, "-m bench.launch_host"),
        one("host_python", 90, "-m bench.launch_host --python"),
        one("step", 90, f"-m bench.gpu_time whole --kernels 20 --out {out}/step.json"),
        one("step_half", 90, f"-m bench.gpu_time whole --width 0.5 --kernels 20 --out {out}/step-half.json"),
        one("latency", 300, f"-m tdc_fast.latency --out {out}/latency.json {UNET}"),
        one(
            "serving",
            420,
            "-m bench.serving --model cifar10 --device cuda --dtype bfloat16 --max_batch 64"
            f" --out {out} --name serving",
        ),
    ]


def run_step(step: Step, out: Path, seconds: float) -> dict[str, object]:
    """Runs the commands of a step, in `seconds` at most, and says how they ended."""
    start = time.monotonic()
    logs = [out / (f"{step.name}.log" if len(step.commands) == 1 else f"{step.name}-{number}.log")
            for number in range(len(step.commands))]  # fmt: skip
    running = []
    for command, log in zip(step.commands, logs, strict=True):
        with log.open("wb") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    ends = [ended(process, start + seconds) for process in running]
    commands = [
        {"command": " ".join(("python", *command)), "log": log.name, "ended": end, "said": last_words(log)}
        for command, log, end in zip(step.commands, logs, ends, strict=True)
    ]
    return {"seconds": round(time.monotonic() - start, 1), "commands": commands}


def ended(process: subprocess.Popen[bytes], until: float) -> str:
    """Waits for a process until a moment of the monotonic clock, then stops it and what it has started."""
    try:
        code = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return STOPPED
    return "passed" if code == 0 else f"exit code {code}"


def last_words(log: Path) -> str:
    """The last line that counts tests, or the last line of all."""
    lines = log.read_text(errors="replace").strip().splitlines()
    counts = [line for line in lines if re.match(r"\d+ [A-Za-z ]+(, \d+ |$)", line)]
    return (counts or lines or [""])[-1][:300]


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps that have not ended yet, as far as the time goes.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 when a command failed or was stopped or a step is left, 2 without a GPU.
    """
    options = parse(arguments)
    out = options.out.resolve()
    everything = steps(out, options.processes)
    if options.list:
        for step in everything:
            print(f"{step.name}: at most {step.seconds} s")
            for command in step.commands:
                print("   ", " ".join(("python", *command)))
        return 0
    if not torch.cuda.is_available():
        print("bench.gpu_all needs an NVIDIA GPU (torch.cuda.is_available() is False); --list shows its commands")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    return run_all(everything, out, options.seconds, options.only)


def run_all(everything: Sequence[Step], out: Path, seconds: float, only: Sequence[str] = ()) -> int:
    """Runs the steps that DIR/steps.json does not have, and writes it after each.

    Args:
        everything: the steps, in order.
        out: an existing folder.
        seconds: for all of them; a step that might not end in what is left waits for the next call.
        only: names of the steps to run, again if they have ended before; empty for all that have not.

    Returns:
        The exit code: 0, or 1 when a command failed or was stopped, or a step is left.
    """
    record = out / "steps.json"
    done: dict[str, dict[str, object]] = json.loads(record.read_text()) if record.exists() else {}
    until = time.monotonic() + seconds
    good = True
    for step in everything:
        if only and step.name not in only:
            continue
        if only or step.name not in done:
            if step.result and not (out / step.result).exists():
                print(f"{step.name}: left out, as {step.result} is missing", flush=True)
                good = False
                continue
            if until - time.monotonic() < step.seconds:
                print(f"{step.name}: waits for the next call, as it may take {step.seconds} s", flush=True)
                good = False
                continue
            done[step.name] = run_step(step, out, step.seconds)
            write_json(record, done)
        for command in done[step.name]["commands"]:  # type: ignore[attr-defined]
            good = good and command["ended"] == "passed"
            print(f"{step.name}: {command['ended']}: {command['command']}\n    {command['said']}", flush=True)
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_all", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for results and logs (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=seconds, default=5000.0, help="time for this call (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help="steps to run, also if they have ended before")
    parser.add_argument(
        "--processes",
        type=whole_number,
        default=os.cpu_count() or 1,
        help="that compile side by side (default: all cores)",
    )
    parser.add_argument("--list", action="store_true", help="show steps and commands, and run nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.only) - {step.name for step in steps(options.out, 1)}
    if unknown:
        parser.error(f"argument --only: {', '.join(sorted(unknown))}: no such step; --list shows them")
    return options


if __name__ == "__main__":
    sys.exit(main())
