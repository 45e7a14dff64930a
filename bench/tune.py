"""`python -m bench.tune`: times the tiles that a Triton convolution may run with, and writes the device's table.

For every shape each candidate of kernels/tile_shapes.py (for wgrad, of kernels/wgrad_tiles.py) is first compared with
cuDNN's result and then timed, interleaved, in a CUDA graph, with the L2 flushed. A candidate that is at least 2% faster
than the one that those files choose goes into `kernels/tuned/<device>.json`, which they read first:

    {"version": ..., "device": ..., "date": ..., "torch": ..., "triton": ...,
     "tiles": {key: tile}, "wgrad": {key: {"tile": tile, "splits": ...}}}

`--dry-run` runs tiny shapes on the CPU through Triton's interpreter; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.files import seconds, whole_number
from bench.gpu.conv import Case, Problem
from bench.gpu.layers import UNET_BATCH, UNETS, ConvLayer, design_layers, unet_layers
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Budget, Machine
from tdc_fast.atomic import write_bytes
from tdc_fast.kernels.problems import ConvProblem

OPS = ("forward", "dgrad", "wgrad")
GAIN = 0.98  # a tile goes into the table when its time is at most this fraction of the chosen tile's
WRONG = 2e-2  # relative error above which a candidate is reported and not timed


@dataclass(frozen=True)
class Candidate:
    """A configuration and the call that runs it.

    Attributes:
        entry: the configuration as the table has it.
        run: launches the operator and returns its result.
        chosen: whether it is what runs without a table.
    """

    entry: dict[str, Any]
    run: Callable[[], Any]
    chosen: bool


def main(arguments: list[str] | None = None) -> int:
    """Time the candidates of all cases and write the table.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 1 when a candidate failed or was wrong, 2 without a GPU.
    """
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        print("bench.tune needs an NVIDIA GPU; --dry-run runs tiny shapes on the CPU through Triton's interpreter")
        return 2
    dtype = torch.float16 if options.dry_run else getattr(torch, options.dtype)
    machine = Machine("cpu" if options.dry_run else "cuda")
    run = BenchRun(machine, "triton", dtype, 0.0 if options.dry_run else 0.2, 0.0, tiny=options.dry_run)
    device = facts(machine)
    budget, wrong = Budget(options.seconds), 0
    table = Table.load(options.out, device.name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        with torch.no_grad():
            for case in cases(options):
                if budget.left() <= 0:
                    print("time is up; the table holds what was measured")
                    break
                try:
                    wrong += tune(run, case, device, table)
                    run.give_memory_back()
                except Exception as failure:
                    print(f"failed: {case}: {str(failure)[:300]}", flush=True)
                    wrong += 1
    finally:  # also when stopped from outside
        path = table.save(options.out)
        print(f"written: {path} ({len(table.tiles)} + {len(table.wgrad)} entries)")
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    from tdc_fast import kernels

    folder = Path(kernels.__file__).parent / "tuned"
    parser.add_argument(
        "--out", type=Path, help=f"folder of the tables (default: {folder}; of a dry run, a new temporary one)"
    )
    parser.add_argument("--layers", nargs="+", default=["design", *UNETS], choices=["design", *UNETS])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--num-groups", nargs="+", type=whole_number, default=[8])
    parser.add_argument(
        "--batch", type=whole_number, default=UNET_BATCH, help="of UNets' layers (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seconds", type=seconds, default=500.0, help="stop after so long (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.out is None:  # the kernels would take a dry run's numbers for measured ones
        options.out = Path(tempfile.mkdtemp(prefix="tdc-fast-tune-")) if options.dry_run else folder
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every requested layer, number of groups and direction; the costliest layers of a model first."""
    layers: list[ConvLayer] = []
    if options.dry_run:
        layers = [ConvLayer("tiny", 3, 8, 8, 4, 4)]
    else:
        for name in options.layers:
            layers += design_layers() if name == "design" else unet_layers(name, UNETS[name], options.batch)[0]
    for layer in layers:
        for num_groups in [2] if options.dry_run else options.num_groups:
            yield from (Case(layer, num_groups, False, 1.0, op) for op in options.ops)


def facts(machine: Machine) -> Any:
    """The device's properties, as the functions that choose tiles take them."""
    from tdc_fast.kernels import tile_shapes

    return tile_shapes.device_of(machine.device)


def candidates(problem: Problem, p: ConvProblem, device: Any) -> list[Candidate]:
    """Every configuration for this case; without the device's name, so that no table decides what is chosen."""
    from tdc_fast.kernels import tile_shapes
    from tdc_fast.kernels.conv_dgrad import conv_dgrad
    from tdc_fast.kernels.conv_forward import conv_forward
    from tdc_fast.kernels.tile_table import tiles_of

    op, device = problem.case.direction, replace(device, name="")
    if op == "wgrad":
        return wgrad_candidates(problem, p, device)
    t = problem.tensors()
    t = t._replace(tiles=tiles_of(t.tiles, t.offsets, p.batch))

    def call(tile: tile_shapes.ConvTile) -> torch.Tensor:
        return conv_forward(p, t, tile=tile) if op == "forward" else conv_dgrad(p, problem.dy, t, tile=tile)[0]

    best = tile_shapes.choose_tile(op, p, device)
    return [
        Candidate(tile.as_json(), partial(call, tile=tile), tile == best)
        for tile in tile_shapes.candidates(op, p, device)
    ]


def wgrad_candidates(problem: Problem, p: ConvProblem, device: Any) -> list[Candidate]:
    """Every tile of wgrad, each at half, once and twice the splits that are chosen for it."""
    from tdc_fast.kernels import wgrad_tiles
    from tdc_fast.kernels.conv_wgrad import conv_wgrad

    def run(tile: Any, splits: int, out: torch.Tensor) -> torch.Tensor:
        conv_wgrad(p, problem.dy, problem.tensors(), out, tile=tile, splits=splits)
        return out

    result = []
    best = wgrad_tiles.choose_wgrad_tile(p, device)
    for tile in wgrad_tiles.wgrad_candidates(p, device):
        usual = wgrad_tiles.choose_splits(p, tile, device)
        for splits in sorted({max(1, usual // 2), usual, usual * 2}):
            call = partial(run, tile, splits, torch.empty_like(problem.weight))
            entry = {"tile": asdict(tile), "splits": splits}
            result.append(Candidate(entry, call, tile == best and splits == usual))
    return result


def tune(run: BenchRun, case: Case, device: Any, table: Table) -> int:
    """Times the candidates of a case, notes the fastest, and returns how many failed or were wrong."""
    from tdc_fast.kernels import tile_shapes

    problem = Problem(run, case)
    p = problem.described()
    key = tile_shapes.problem_key(case.direction, p)
    right: dict[str, Candidate] = {}
    wrong = 0
    for candidate in candidates(problem, p, device)[: 2 if run.tiny else None]:
        name = json.dumps(candidate.entry)
        try:
            error = problem.error(candidate.run())
        except Exception as failure:  # Triton's errors are not RuntimeErrors
            print(f"failed: {key}: {name}: {str(failure)[:300]}")
            wrong += 1
            continue
        if error <= WRONG:
            right[name] = candidate
        else:
            print(f"wrong by {error:.2g}: {key}: {name}")
            wrong += 1
    if not right:
        return wrong
    calls = {name: run.machine.captured(candidate.run) for name, candidate in right.items()}
    times = run.machine.times(calls, flush=True, seconds=run.row_seconds, least=1 if run.tiny else 5)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(medians, key=medians.__getitem__)
    chosen = next((name for name, candidate in right.items() if candidate.chosen), None)
    usual = medians[chosen] if chosen else float("inf")
    section = table.wgrad if case.direction == "wgrad" else table.tiles
    section.pop(key, None)
    if medians[fastest] <= GAIN * usual:
        section[key] = right[fastest].entry
    gain = f"{usual / medians[fastest]:.2f}x over the choice" if key in section else "none is faster than the choice"
    print(f"{key}: {medians[fastest]:.4f} ms, {gain}; {len(right)} candidates", flush=True)
    return wrong


@dataclass
class Table:
    """The measured configurations of one device.

    Attributes:
        device: its name.
        tiles: configurations of forward and dgrad by problem.
        wgrad: those of wgrad.
    """

    device: str
    tiles: dict[str, dict[str, Any]]
    wgrad: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, device: str) -> Table:
        """The device's table, or an empty one when there is none for this version of the kernels."""
        from tdc_fast.kernels import tile_shapes

        path = folder / f"{tile_shapes.table_name(device)}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            if found.get("version") == tile_shapes.TABLE_VERSION:
                return cls(device, found["tiles"], found.get("wgrad", {}))
        return cls(device, {}, {})

    def save(self, folder: Path) -> Path:
        """Writes the table and returns its path."""
        from tdc_fast.kernels import tile_shapes

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{tile_shapes.table_name(self.device)}.json"
        facts = {
            "version": tile_shapes.TABLE_VERSION,
            "device": self.device,
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "triton": metadata.version("triton"),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
        lines += [f"  {json.dumps(name)}: {_by_line(getattr(self, name))}" for name in ("tiles", "wgrad")]
        write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return path


def _by_line(entries: dict[str, Any]) -> str:
    """JSON with one entry per line, for readable diffs."""
    lines: Iterable[str] = (f"    {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    return "{\n" + ",\n".join(lines) + "\n  }" if entries else "{}"


if __name__ == "__main__":
    sys.exit(main())
