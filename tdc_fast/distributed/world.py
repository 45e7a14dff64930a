"""This process among those of its run, and what all of them exchange: values, sums, and errors.

Every method with "all processes call it" is a collective: they must call the same ones in the same order. One process
alone answers them itself, and nothing of torch.distributed is imported then.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
E = TypeVar("E", bound=BaseException)
Kind = Literal["gradients", "telemetry", "checkpoints", "set-up"]
"""What bytes are sent for. Telemetry is the numbers of the log, and when to stop."""


class LostProcess(OSError):
    """Another process of the run has ended, or cannot be reached."""


class World:
    """One process of a run.

    Args:
        rank: its number.
        size: how many there are.
        group: the process group of CPU tensors; None for one process alone.
        teams: makes the process group for gradients on a kind of device, from the ranks in it.

    Attributes:
        rank: its number; 0 is the first one, which alone writes and prints.
        size: how many there are.
        sent: bytes that this process has handed to collectives, by what they were for.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: Any = None,
        teams: Callable[[Sequence[int], torch.device], Any] | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()
        self._group, self._teams = group, teams
        self._broken_off = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def from_first(self, function: Callable[[], R], kind: Kind = "set-up") -> R:
        """The result of a function that only the first process calls; its error is raised in all. All call it.

        Args:
            function: returns what can be pickled.
            kind: what the bytes are sent for.
        """
        if self.alone:
            return function()
        outcome = _outcome_alone(function) if self.first else None
        return _result(self._told(outcome, kind))

    def by_first(self, function: Callable[[], R], kind: Kind = "set-up") -> R | None:
        """As `from_first`, but the result stays in the first process; the others get None. All call it."""
        if self.alone:
            return function()
        value, error = _outcome_alone(function) if self.first else (None, None)
        _result(self._told((None, error), kind))
        return value

    def together(self, function: Callable[[], R]) -> R:
        """Each process's own result of a function; where it fails in any, an error is raised in all. All call it."""
        if self.alone:
            return function()
        value, error = _outcome(function)
        for rank, failed in enumerate(self._gather((None, error), "set-up")):
            if failed[1] is not None:
                return _result((None, _of_process(rank, failed[1])))
        return value

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around what the others take part in. After one that is broken off, as by Ctrl-C, there is no other.

        The others wait for the rest of it, so a further one would wait for them; they notice once this process ends.

        Raises:
            LostProcess: an exchange before was broken off.
        """
        if self._broken_off:
            raise LostProcess("an exchange with the other processes of the run was broken off")
        try:
            yield
        except BaseException:
            self._broken_off = True
            raise

    def sum(self, values: Tensor, kind: Kind = "telemetry") -> Tensor:
        """The sum over all processes of tensors of one shape, added in the order of the ranks. All call it.

        Args:
            values: on any device.
            kind: what the bytes are sent for.

        Returns:
            A new tensor on the same device.
        """
        if self.alone:
            return values.clone()
        import torch.distributed as dist

        own = values.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self.exchange(), losses_named():
            dist.all_gather(parts, own, group=self._group)
        self.sent[kind] += own.nbytes
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.to(values.device)

    def largest(self, *values: int) -> list[int]:
        """For each value the largest among the processes. All call it."""
        if self.alone:
            return list(values)
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.int64)
        with self.exchange(), losses_named():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        self.sent["telemetry"] += numbers.nbytes
        return numbers.tolist()

    def to_first(self, value: Any, kind: Kind) -> list[Any]:
        """The values of all processes in the first one, in the order of their ranks; [] in the others. All call it.

        Args:
            value: what can be pickled.
            kind: what the bytes are sent for.
        """
        if self.alone:
            return [value]
        with self.exchange():
            if not self.first:
                self._send(value, 0, kind)
                return []
            return [value, *(self._receive(rank) for rank in range(1, self.size))]

    def from_first_to_each(self, make: Callable[[int], R], kind: Kind) -> R:
        """What the first process makes for each one, by rank; one is made and sent at a time. All call it."""
        if self.alone:
            return make(0)
        with self.exchange():
            if not self.first:
                return self._receive(0)
            for rank in range(1, self.size):
                self._send(make(rank), rank, kind)
            return make(0)

    def team(self, ranks: Sequence[int], device: torch.device) -> Any:
        """The process group of some ranks for sums of gradients on a device. All call it, for every team in turn."""
        assert self._teams is not None
        return self._teams(ranks, device)

    def leave(self) -> None:
        """Let go of the process group, whose threads end with its last reference; at Python's end it is too late."""
        self._group = None

    def _told(self, outcome: Any, kind: Kind) -> Any:
        """The outcome of the first process, in all of them."""
        if self._broken_off and outcome is not None and outcome[1] is not None:
            raise outcome[1]  # of this process alone: nobody can be told
        return self._broadcast(outcome, kind)

    def _broadcast(self, value: Any, kind: Kind) -> Any:
        import torch.distributed as dist

        with self.exchange():
            content = _packed(value) if self.first else torch.empty(0, dtype=torch.uint8)
            length = torch.tensor([len(content)])
            with losses_named():
                dist.broadcast(length, 0, group=self._group)
                if not self.first:
                    content = torch.empty(int(length), dtype=torch.uint8)
                dist.broadcast(content, 0, group=self._group)
        if self.first:
            self.sent[kind] += content.nbytes + length.nbytes
            return value
        return _unpacked(content)

    def _gather(self, value: Any, kind: Kind) -> list[Any]:
        """The values of all processes, in all of them."""
        with self.exchange():
            values = self.to_first(value, kind)
            everyone: list[Any] = self._broadcast(values, kind)
            return everyone

    def _send(self, value: Any, rank: int, kind: Kind) -> None:
        import torch.distributed as dist

        content = _packed(value)
        length = torch.tensor([len(content)])
        with losses_named():
            dist.send(length, rank, group=self._group)
            dist.send(content, rank, group=self._group)
        self.sent[kind] += content.nbytes + length.nbytes

    def _receive(self, rank: int) -> Any:
        import torch.distributed as dist

        length = torch.zeros(1, dtype=torch.int64)
        with losses_named():
            dist.recv(length, rank, group=self._group)
            content = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(content, rank, group=self._group)
        return _unpacked(content)


def is_of_all(error: BaseException) -> bool:
    """Whether an error is raised in all processes of the run, so that the first one says what it says."""
    return getattr(error, "_of_all_processes", False)


def on_all(error: E) -> E:
    """The error, marked as one that all processes raise, each by itself."""
    error._of_all_processes = True  # type: ignore[attr-defined]
    return error


def _outcome(function: Callable[[], R]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return None, error


def _outcome_alone(function: Callable[[], R]) -> tuple[Any, BaseException | None]:
    """As `_outcome`; for what the function calls this is the only process, since the others do not call it."""
    with as_world(World()):
        return _outcome(function)


def _of_process(rank: int, error: BaseException) -> BaseException:
    """The error of a process as all processes raise it, so that a command tells it as it tells that one."""
    if not rank or isinstance(error, KeyboardInterrupt):
        return error
    text = f"process {rank}: {error}"
    for kind in (type(error), ValueError, OSError):  # some errors are made from other arguments than their text
        if isinstance(error, kind):
            with suppress(TypeError):
                return kind(text)
    return RuntimeError(text)


def _result(outcome: Any) -> Any:
    value, error = outcome
    if error is not None:
        raise on_all(error)
    return value


def _packed(value: Any) -> Tensor:
    buffer = io.BytesIO()
    try:
        pickle.dump(value, buffer, protocol=5)
        if _is_error(value):
            pickle.loads(buffer.getbuffer())
    except Exception as problem:  # an error that cannot be sent, or made again from its arguments
        if not _is_error(value):
            raise
        buffer = io.BytesIO()
        pickle.dump((None, RuntimeError(f"{type(value[1]).__name__}: {value[1]} ({problem})")), buffer, protocol=5)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _is_error(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], BaseException)


def _unpacked(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())


@contextmanager
def losses_named() -> Iterator[None]:
    """Raise `LostProcess` where torch.distributed reports that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise LostProcess(f"another process of the run has ended or cannot be reached ({reason})") from error


_current = World()


def world() -> World:
    """This process among those of its run."""
    return _current


@contextmanager
def as_world(this: World) -> Iterator[World]:
    """Within the block this process is that one."""
    global _current
    before, _current = _current, this
    try:
        yield this
    finally:
        _current = before
