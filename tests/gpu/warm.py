"""Compiles the kernels of this folder's tests in advance: `python -m tests.gpu.warm INDEX/COUNT` compiles one share.

Triton compiles one kernel at a time in a process, a second or two each. Several processes together fill its cache on
disk, from which the tests then load. Nothing is checked here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

from tests.cases import upstream
from tests.gpu import test_operators, test_tiles
from tests.gpu.networks import batch_for, routed_unet
from tests.gpu.problems import Precision, Target, gradients, moved, routed
from tests.gpu.shapes import CONV_CASES, NORM_CASES
from tests.gpu.test_networks import gradients_of


def work(device: str, backend: str) -> Iterator[Callable[[], object]]:
    """Every launch of the tests once, in pieces of a few kernels; whole networks first, because they take longest."""

    def network(dtype: torch.dtype, pruned: bool) -> None:
        model = routed_unet(device, dtype, pruned=pruned)
        gradients_of(model, *batch_for(model, seed=1))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.float32):
            gradients_of(model, *batch_for(model, seed=1))

    for dtype, pruned in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        yield lambda dtype=dtype, pruned=pruned: network(dtype, pruned)

    def operator(case, precision: Precision) -> None:
        with precision.active():
            leaves = moved(test_operators.inputs(case, precision), device, case.layout)
            y = routed(case, leaves, Target(device, backend))
            gradients(y, leaves, upstream(case, y.shape, precision.dtype))

    for cases, chosen in ((CONV_CASES, test_operators.CONVOLUTIONS), (NORM_CASES, test_operators.NORMS)):
        for name, precision in chosen:
            yield lambda case=cases[name], precision=precision: operator(case, precision)

    for case in test_tiles.CASES.values():
        for op in test_tiles.OPS:
            prepared = test_tiles.Prepared(case, op, device)
            runs = test_tiles.every_tile if device == "cuda" else test_tiles.the_reference
            for _, run in runs(prepared, op):
                yield run


def main(share: str, device: str = "cuda", backend: str = "triton") -> int:
    """Returns the number of pieces done. A piece that fails here fails again, and is reported, in its test."""
    index, count = map(int, share.split("/"))
    done = 0
    for number, piece in enumerate(work(device, backend)):
        if number % count == index:
            try:
                piece()
            except Exception as error:  # Triton's own errors are not RuntimeErrors
                print(f"piece {number}: {error}", file=sys.stderr)
            done += 1
    return done


if __name__ == "__main__":
    print(f"warmed {main(*sys.argv[1:])} pieces")
