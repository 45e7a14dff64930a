"""Processes as torchrun starts them, but forked from one that has imported everything, which takes no time."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch._dynamo",
    "matplotlib.pyplot",
    "tdc_fast.train",
    "tdc_fast.data.dataset",
    "tdc_fast.pruning.search",
    "tyro",
    "torch.distributed.run",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Launcher:
    """Starts functions in several processes with the environment of torchrun."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def start(self, size: int, function: Callable[..., Any], *args: Any, output: Path, **more: str) -> Sequence[Any]:
        """One process per rank that calls `function(*args)`; what rank r prints goes to `output` with suffix .r."""
        port, found = free_port(), []
        for rank in range(size):
            here = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **more,
            } if size > 1 else {"OMP_NUM_THREADS": 1, **more}  # fmt: skip
            variables = {name: str(value) for name, value in here.items()}
            process = self._context.Process(
                target=_child, args=(variables, str(output.with_suffix(f".{rank}")), function, args)
            )
            process.start()
            found.append(process)
        return found

    def run(self, size: int, function: Callable[..., Any], *args: Any, output: Path, **more: str) -> list[str]:
        """Start, wait for a good end, and return what each process printed."""
        processes = self.start(size, function, *args, output=output, **more)
        codes = end(processes)
        texts = [output.with_suffix(f".{rank}").read_text() for rank in range(size)]
        assert codes == [0] * size, "\n".join(texts)
        return texts


def end(processes: Sequence[Any], seconds: float = 300) -> list[int | None]:
    """Wait for processes and return how they ended; None, and killed, where they do not end."""
    limit = time.monotonic() + seconds
    for process in processes:
        process.join(max(limit - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def _child(variables: dict[str, str], output: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.update(variables)
    sys.stdout = sys.stderr = open(output, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    os._exit(int(function(*args) or 0))


def train_command(argv: Sequence[str], signals: dict[tuple[int, str, int], int] | None = None) -> int:
    """The command; a process sends itself signals: {(rank, stage, step): number}, at the beginning of the step.

    Steps of "pruning" are what the process measures for the search.
    """
    from tdc_fast.train import main
    from tdc_fast.training.loop import StageLoop
    from tdc_fast.training.parallel_search import ParallelSearch

    step, measured, measurements = StageLoop._train_step, ParallelSearch._measured, itertools.count()

    def signalled_measurement(search: ParallelSearch, *args: Any) -> Any:
        number = (signals or {}).get((int(os.environ.get("RANK", "0")), "pruning", next(measurements)))
        if number:
            os.kill(os.getpid(), number)
        return measured(search, *args)

    ParallelSearch._measured = signalled_measurement  # type: ignore[method-assign]

    def signalled(loop: StageLoop) -> None:
        number = (signals or {}).get((int(os.environ.get("RANK", "0")), loop.stage.name, loop.step))
        if number:
            os.kill(os.getpid(), number)
        step(loop)

    StageLoop._train_step = signalled  # type: ignore[method-assign]
    return main(list(argv))


def torchrun(arguments: Sequence[str], output: str) -> int:
    """torchrun itself, whose processes are forked as those of `Launcher` are.

    The process with rank 1 is killed at step 12 of the base. Started again, it has torchrun stopped at step 25.

    Args:
        arguments: of torchrun, with `-m tdc_fast.train`.
        output: where its processes print to.
    """
    import torch.distributed.run as command

    multiprocessing.set_forkserver_preload(PRELOAD)  # of this process
    launch = command.elastic_launch

    def forked(config: Any, entrypoint: str) -> Callable[..., Any]:
        def started(*parts: str) -> Any:
            assert (entrypoint, *parts[:3]) == (sys.executable, "-u", "-m", "tdc_fast.train")
            return launch(config, _started_by_torchrun)(parts[3:], output, os.getpid())

        config.start_method = "forkserver"
        return started

    command.elastic_launch = forked  # type: ignore[assignment]
    command.main(list(arguments))
    return 0


def _started_by_torchrun(argv: Sequence[str], output: str, agent: int) -> None:
    import torch

    sys.stdout = sys.stderr = open(output, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        status = train_command(argv, {(1, "base", 12): signal.SIGKILL})
    else:
        signal.signal(signal.SIGUSR1, lambda number, frame: _stopped_by(agent))
        status = train_command(argv, {(1, "base", 25): signal.SIGUSR1})
    os._exit(status)


def _stopped_by(agent: int) -> None:
    """Send SIGTERM to torchrun, and go on once it has passed it on: the first one gives the next ones back."""
    handler = signal.getsignal(signal.SIGTERM)
    os.kill(agent, signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) == handler:
        time.sleep(0.01)


def train_in(folders: Sequence[str], argv: Sequence[str]) -> int:
    """The command, in each process with a working directory of its own, as on another machine."""
    os.chdir(folders[int(os.environ["RANK"])])
    return train_command(argv)


def join_again() -> None:
    """Join the processes twice; each time print the sum of 1 and 2 from two of them, and if a connection is watched."""
    import torch

    from tdc_fast.distributed import joined

    for _ in range(2):
        with joined() as this:
            print(int(this.sum(torch.tensor(this.rank + 1))), has_watched_connection(), file=sys.stderr)


def has_watched_connection() -> bool:
    """Whether the system asks, on a connection of this process, if the other side is still there."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as found:
            found.getpeername()
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
                return True
    return False


def train_counting(argv: Sequence[str]) -> int:
    """The command; prints the bytes of every call of torch.distributed, by stage and name, and what the run counted."""
    import torch
    import torch.distributed as dist

    from tdc_fast.distributed import world
    from tdc_fast.train import main
    from tdc_fast.training.loop import StageLoop

    seen: dict[str, int] = {}
    counted: dict[str, int] = {}
    stage = [""]

    def watched(name: str) -> None:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            group = kwargs.get("group")
            sends = name not in ("recv",) and not (name == "broadcast" and dist.get_rank() != args[1])
            if sends:
                kind = f"{stage[0]} {name}{'' if group is dist.group.WORLD else ' of a team'}"
                seen[kind] = seen.get(kind, 0) + tensors[0].nbytes
            return original(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_reduce", "all_gather", "broadcast", "send", "recv"):
        watched(name)
    train = StageLoop.train

    def train_stage(loop: StageLoop) -> None:
        stage[0], before = loop.stage.name, dict(world().sent)
        train(loop)
        stage[0] = ""
        for kind, count in world().sent.items():
            counted[f"{loop.stage.name} {kind}"] = count - before.get(kind, 0)

    StageLoop.train = train_stage  # type: ignore[method-assign]
    status = main(list(argv))
    print(json.dumps({"seen": seen, "counted": counted}), file=sys.stderr)
    return status


def train_experts_unconnected(run: str, rank: int, size: int, path: str) -> int:
    """Stage 2 of one process of several, without the others; the averages of its experts go to a file.

    What the others would say is left out, so the rows of its log are of its own experts alone.
    """
    import torch

    from tdc_fast.distributed import World
    from tdc_fast.distributed.world import as_world
    from tdc_fast.training import RunDirectory, train_experts
    from tdc_fast.training.base import train_base
    from tdc_fast.training.pruning import prune_base

    class Unconnected(World):
        def from_first(self, function: Callable[[], Any], kind: Any = "set-up") -> Any:
            return function()

        def by_first(self, function: Callable[[], Any], kind: Any = "set-up") -> Any:
            return None

        def sum(self, values: Any, kind: Any = "telemetry") -> Any:
            return values.clone()

        def largest(self, *values: int) -> list[int]:
            return list(values)

        def to_first(self, value: Any, kind: Any) -> list[Any]:
            return []

        def team(self, ranks: Any, device: Any) -> Any:
            return None

    directory = RunDirectory.open(run)
    base, widths = train_base(directory), prune_base(directory, train_base(directory))
    with as_world(Unconnected(rank, size)):
        model = train_experts(directory, base, widths)
    torch.save([model.expert_state(number) for number in range(model.num_experts)], path)
    return 0
