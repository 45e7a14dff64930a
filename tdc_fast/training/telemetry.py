"""The log of a stage: progress.csv, log.txt, the terminal, TensorBoard, and the running means behind each row."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file, writing_to
from tdc_fast.errors import invalid
from tdc_fast.progress import duration
from tdc_fast.text_files import parse_json

QUARTILES = 4
MAX_UNSETTLED = 1024
"""Steps after which several processes bring together their numbers of the log at the latest."""


class RunningMeans:
    """Means of the per-sample losses since the last row: over all samples, per quartile of the timesteps, per group.

    Everything stays in tensors on the device until `take`, so that a step never waits for the numbers.

    Of several processes each adds what it computes; `settle` brings that together.

    Args:
        num_groups: N.
        device: where the tensors are.
        group_weights: (N,), summing to 1. The overall mean is then the mean of the groups' means with these weights,
            which corrects for stratified sampling.
        partial_norms: the gradient norms are those of some of the weights, and another process has the others.
    """

    def __init__(
        self,
        num_groups: int,
        device: torch.device,
        group_weights: Sequence[float] | None = None,
        partial_norms: bool = False,
    ) -> None:
        self._bins = 1 + QUARTILES + num_groups
        self._group_weights = group_weights
        self._device = device
        self._sums: dict[str, Tensor] = {}  # (bins,) float64
        self._counts = torch.zeros(self._bins, dtype=torch.float64, device=device)
        self._norms = torch.zeros(2, dtype=torch.float64, device=device)  # sum of gradient norms, steps
        size = MAX_UNSETTLED if partial_norms else 0
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)  # of the norms of the last steps
        self._place = torch.zeros(1, dtype=torch.int64, device=device)  # how many they are

    def add(self, losses: dict[str, Tensor], quartiles: Tensor, groups: Tensor | None) -> None:
        """Add a batch.

        Args:
            losses: values per sample (B,), by name.
            quartiles: timestep quartile of every sample, (B,).
            groups: group of every sample, (B,), or None.
        """
        ones = torch.ones_like(quartiles, dtype=torch.float64)
        columns = [torch.zeros_like(quartiles), quartiles + 1]
        if groups is not None:
            columns.append(groups + 1 + QUARTILES)
        where = torch.cat(columns)
        copies = len(columns)
        self._counts.index_add_(0, where, ones.repeat(copies))
        for name, values in losses.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(self._bins, dtype=torch.float64, device=self._device)
            self._sums[name].index_add_(0, where, values.detach().double().repeat(copies))

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Add the gradient norm of a step, 0-dim."""
        if len(self._squares):
            self._squares.index_copy_(0, self._place, norm.detach().double().square().view(1))
            self._place += 1
            return
        self._norms[0] += norm.detach()
        self._norms[1] += 1

    def settle(self, total: Callable[[Tensor], Tensor], keep: bool) -> None:
        """Bring together what all processes have added, at the latest after `MAX_UNSETTLED` steps.

        Args:
            total: adds up a tensor over all processes, fp64 (n,).
            keep: whether this process has everything afterwards; the others then have nothing.
        """
        names = sorted(self._sums)
        added = total(torch.cat([self._counts, *(self._sums[name] for name in names), self._squares]))
        counts, *sums = added[: (1 + len(names)) * self._bins].split(self._bins)
        self._counts.copy_(counts)
        for name, values in zip(names, sums, strict=True):
            self._sums[name].copy_(values)
        if len(self._squares):
            self._norms[0] += added[-len(self._squares) :].sqrt().sum()
            self._norms[1] += self._place[0]
            self._squares.zero_()
            self._place.zero_()
        if not keep:
            self.clear()

    def clear(self) -> None:
        """Start new means."""
        for tensor in (self._counts, self._norms, *self._sums.values()):
            tensor.zero_()

    def take(self) -> dict[str, float | None]:
        """The means by column name, None for a bin without samples. Starts new means."""
        counts = self._counts.tolist()
        norm, steps = self._norms.tolist()
        suffixes = ["", *(f"_q{i}" for i in range(QUARTILES)), *(f"_g{i}" for i in range(self._bins - 1 - QUARTILES))]
        row: dict[str, float | None] = {"grad_norm": norm / steps if steps else None}
        for name, sums in self._sums.items():
            for suffix, total, count in zip(suffixes, sums.tolist(), counts, strict=True):
                row[name + suffix] = total / count if count else None
            if self._group_weights is not None:
                means = [row[f"{name}_g{i}"] for i in range(len(self._group_weights))]
                whole = all(mean is not None for mean in means)
                row[name] = (
                    sum(w * (m or 0.0) for w, m in zip(self._group_weights, means, strict=True)) if whole else None
                )
        self.clear()
        return row

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {"sums": dict(self._sums), "counts": self._counts, "norms": self._norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of `state_dict`."""
        self._sums = {name: value.to(self._device, copy=True) for name, value in state["sums"].items()}
        self._counts.copy_(state["counts"])
        self._norms.copy_(state["norms"])


class ProgressLog:
    """Appends one row per interval to what OPENAI_LOG_FORMAT asks for (default stdout,log,csv) and to TensorBoard.

    Files get every number; stdout gets one line, and it and log.txt leave out an mse that repeats the loss.

    Args:
        directory: receives progress.csv, log.txt and, when asked for, progress.json.
        step: rows of later steps are deleted, as a run that continues from a checkpoint writes them again.
        tensorboard: directory of event files, or None.
        quiet: do not print rows (a progress bar is shown instead).
        stage: its name, for printed rows.
        steps: the number of its steps, for the time left; None for no limit.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        tensorboard: Path | None = None,
        quiet: bool = False,
        stage: str = "",
        steps: int | None = None,
    ) -> None:
        formats = [name for name in os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv").split(",") if name]
        unknown = set(formats) - {"stdout", "log", "csv", "json", "tensorboard"}
        if unknown:
            raise invalid("OPENAI_LOG_FORMAT", ",".join(formats), "a list of stdout, log, csv, json, tensorboard")
        directory.mkdir(parents=True, exist_ok=True)
        self._csv_path = directory / "progress.csv" if "csv" in formats else None
        self._columns = _drop_later_rows(self._csv_path, step) if self._csv_path else []
        self._csv: TextIO | None = None
        self._json = _json_lines(directory / "progress.json", step) if "json" in formats else None
        self._texts: list[TextIO] = [sys.stdout] if "stdout" in formats and not quiet else []
        self._log = _append_to(directory / "log.txt") if "log" in formats else None
        self._board_path = tensorboard or directory
        with writing_to(self._board_path):
            self._board = _summary_writer(tensorboard, step) if tensorboard else None
        self._stage, self._steps = stage, steps
        self._began, self._first = time.perf_counter(), step
        if step:
            self.say(f"resumed at step {step}")

    def say(self, text: str) -> None:
        """Write one line to log.txt."""
        if self._log:
            _write(self._log, text + "\n")

    def row(self, values: dict[str, float | int | None]) -> None:
        """Write one row; columns that progress.csv does not have yet are added to it, empty in its earlier rows."""
        if self._csv_path:
            self._append_csv(values)
        if self._json:
            _write(self._json, json.dumps(values) + "\n")
        shown = {name: value for name, value in values.items() if not _repeats_loss(name, values)}
        for text in self._texts:
            print(self._line(shown), file=text, flush=True)
        self.say(_table(shown))
        if self._board:
            with writing_to(self._board_path):
                for name, value in values.items():
                    if name != "step" and value is not None:
                        self._board.add_scalar(name, value, values["step"])

    def _line(self, values: dict[str, float | int | None]) -> str:
        """A row in one line: the step, the means over all timesteps and groups, and the time left."""
        step = int(values["step"] or 0)
        of = f" of {self._steps} ({step / self._steps:.0%})" if self._steps else ""
        parts = [f"{self._stage} step {step}{of}".strip()]
        for name in ("loss", "mse", "vb", "grad_norm", "lr"):
            value = values.get(name)
            if value is not None:
                parts.append(f"{name} {value:.4g}")
        parts += speed_words(values)
        if self._steps and self._first < step < self._steps:
            passed = time.perf_counter() - self._began
            parts.append(f"{duration(passed / (step - self._first) * (self._steps - step))} left")
        return ", ".join(parts)

    def sync(self) -> None:
        """Wait until everything is on the disk, as a checkpoint counts it as written."""
        for file in (self._csv, self._json, self._log):
            if file:
                with writing_to(Path(file.name)):
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Close all files; what could not be written has been told before."""
        for file in (self._csv, self._json, self._log, self._board):
            if file:
                with suppress(OSError):
                    file.close()

    def _append_csv(self, values: dict[str, float | int | None]) -> None:
        assert self._csv_path is not None
        added = [name for name in values if name not in self._columns]
        if added:
            if self._csv is not None:
                self._csv.close()
                self._csv = None
            _add_columns(self._csv_path, self._columns, added)
            self._columns = [*self._columns, *added]
        if self._csv is None:
            self._csv = _append_to(self._csv_path)
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(
            ["" if values.get(c) is None else values[c] for c in self._columns]
        )
        _write(self._csv, line.getvalue())


def speed_words(values: Mapping[str, float | int | None]) -> list[str]:
    """The throughput in a row, for people; nothing where it was not measured."""
    speed, share = values.get("wall_samples_per_second"), values.get("wall_mfu")
    if speed is None or share is None:
        return []
    return [f"{speed:.4g} samples/s", f"MFU {share:.1%}"]


def _repeats_loss(name: str, values: dict[str, float | int | None]) -> bool:
    """Whether a column is the loss again, as mse is where nothing else is in the loss."""
    return name.startswith("mse") and values.get("loss" + name[len("mse") :]) == values[name]


def _drop_later_rows(path: Path, step: int) -> list[str]:
    """Rewrite a progress.csv without rows after `step` and without an incomplete row; its columns, or [] if new."""
    if not path.is_file():
        return []
    if step == 0:
        path.unlink()
        return []
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
        if not lines:
            path.unlink()
            return []
        columns = lines[0].split(",")
        position = columns.index("step")
        rows = [row for row in csv.reader(lines[1:]) if len(row) == len(columns) and float(row[position]) <= step]
    except (ValueError, csv.Error) as error:
        remedy = f"a progress.csv with numbers in a column 'step' ({error}); move it away to continue without its rows"
        raise invalid("run_dir", str(path), remedy) from error
    with atomic_file(path) as file:
        file.write("".join(",".join(row) + "\n" for row in [columns, *rows]).encode())
    return columns


def _add_columns(path: Path, columns: list[str], added: list[str]) -> None:
    """Rewrite a progress.csv with further columns, empty in the rows that it has; a new one gets its header."""
    with writing_to(path):
        rows = path.read_text(encoding="utf-8").splitlines()[1:] if columns else []
        lines = [",".join([*columns, *added]), *(row + "," * len(added) for row in rows)]
        with atomic_file(path) as file:
            file.write("".join(line + "\n" for line in lines).encode())


def _json_lines(path: Path, step: int) -> TextIO:
    kept = []
    if path.is_file() and step:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            try:
                if line.endswith(b"\n") and parse_json(line.decode("utf-8"))["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                remedy = "an object with a 'step'; move the file away to continue without its lines"
                raise invalid(f"{path}, line {number}", line[:80], remedy) from error
    with atomic_file(path) as file:
        file.write(b"".join(kept))
    return _append_to(path)


def _append_to(path: Path) -> TextIO:
    with writing_to(path):
        return open(path, "a", encoding="utf-8", newline="")


def _write(file: TextIO, text: str) -> None:
    with writing_to(Path(file.name)):
        file.write(text)
        file.flush()


def _summary_writer(directory: Path, step: int) -> Any:
    """A TensorBoard writer, or None if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _table(values: dict[str, float | int | None]) -> str:
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if value is not None
    }
    left = max(map(len, shown))
    right = max(map(len, shown.values()))
    line = "-" * (left + right + 7)
    body: Sequence[str] = [f"| {name:<{left}} | {value:<{right}} |" for name, value in shown.items()]
    return "\n".join([line, *body, line])
