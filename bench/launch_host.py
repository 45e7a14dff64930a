"""`python -m bench.launch_host`: host time of an operator through its public function, beside torch's own operator.

With a GPU both are launched on it. Without one the launches of the routed operators go to a stand-in for the driver
(stand_in_gpu.py), and torch's operators run on the CPU, on one pixel. Their time then is that of the dispatcher, of
autograd and of the allocation of results, all of which `F.conv2d` spends on a GPU as well; what it spends there in
cuDNN and on the launches of the convolution and of the bias is missing. So without a GPU the ratios are upper bounds.
The driver's own time is in no column.

Forward: of tensors that want no gradient. Graph: a forward that records the graph. Backward: what it adds to that.

The last lines are what `tdc_fast.graphs` takes for a replay besides the graph's own launch: it compares the signature
of the call with those that were captured, and torch clones the results. They are of the CPU, with a GPU too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.files import whole_number
from bench.gpu.layers import UNETS
from bench.stand_in_gpu import dense_memory, stand_in_gpu, with_tiles
from tdc_fast.graphs import Graphed, use_capture
from tdc_fast.models.iddpm import create_unet
from tdc_fast.ops import call_cache, host

BATCH, GROUPS, CHANNELS, SIZE = 64, 8, 128, 16
ROUNDS, CALLS = 40, 20
PASSES = ("forward", "graph", "backward")

Call = Callable[[], Any]


def passes(function: Callable[..., Tensor], *tensors: Tensor, **settings: Any) -> dict[str, Call]:
    """The calls whose times PASSES are made of."""
    plain, wanting = tensors, [t.detach().requires_grad_() for t in tensors]
    dy = torch.empty_like(function(*plain, **settings))

    def forward() -> None:
        function(*plain, **settings)

    def graph() -> None:
        function(*wanting, **settings)

    def backward() -> None:
        torch.autograd.grad(function(*wanting, **settings), wanting, dy)

    return {"forward": forward, "graph": graph, "backward": backward}


def torch_calls(device: str) -> dict[str, dict[str, Call]]:
    """Torch's operators: of the layers below on a GPU; on a CPU of one pixel, in fp32, which it computes at once."""
    if device == "cuda":
        batch, channels, size, taps, dtype = BATCH, CHANNELS, SIZE, 3, torch.bfloat16
    else:
        batch, channels, size, taps, dtype = 1, 8, 1, 1, torch.float32

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    image = made(batch, channels, size, size).to(memory_format=torch.channels_last)
    filters = made(channels, channels, taps, taps).to(memory_format=torch.channels_last)
    one = made(channels)
    return {
        "conv2d": passes(F.conv2d, image, filters, one, padding=taps // 2),
        "group_norm": passes(lambda x, w, b: F.group_norm(x, 4, w, b), image, one, one.clone()),
        "linear": passes(F.linear, made(batch, channels), made(channels, channels), one),
    }


def routed_calls(device: str, backend: str) -> dict[str, dict[str, Call]]:
    """The same layers with an expert per group, through the public functions."""
    from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear

    def made(*shape: int) -> Tensor:
        return dense_memory(*shape).to(device)

    plan = RoutingPlan.from_groups(torch.arange(BATCH, device=device) * GROUPS // BATCH, GROUPS)
    if device == "cpu" and backend != "cpu":
        plan = with_tiles(plan)
    image, filters = made(BATCH, CHANNELS, SIZE, SIZE), made(GROUPS, CHANNELS, CHANNELS, 3, 3)
    matrix, rows, one = made(GROUPS, CHANNELS, CHANNELS), made(BATCH, CHANNELS), made(GROUPS, CHANNELS)

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routed_conv2d(x, weight, bias, plan, padding=1, backend=backend)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routed_group_norm(x, weight, bias, plan, num_groups=32, activation="silu", backend=backend)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return routed_linear(x, weight, bias, plan, backend=backend)

    return {
        "conv2d": passes(conv, image, filters, one),
        "group_norm": passes(norm, image, one, one.clone()),
        "linear": passes(linear, rows, matrix, one),
    }


def fastest(calls: dict[str, Call], device: str, rounds: int) -> dict[str, float]:
    """Microseconds of host time per call: the fastest of rounds that take turns."""
    clock = time.perf_counter if device == "cuda" else time.process_time  # a GPU's backward has a thread of its own
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            began = clock()
            for _ in range(CALLS):  # fewer than the launches that a stream holds
                call()
            times[name].append((clock() - began) / CALLS * 1e6)
    return {name: min(values) for name, values in times.items()}


def measured(peers: dict[str, dict[str, Call]], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each peer's PASSES."""
    flat = {f"{peer} {name}": call for peer, calls in peers.items() for name, call in calls.items()}
    found = fastest(flat, device, rounds)
    table = {peer: {name: found[f"{peer} {name}"] for name in PASSES} for peer in peers}
    for row in table.values():
        row["backward"] -= row["graph"]
    return table


class NoGraph:
    """A capture of nothing, and its recording, whose replays do nothing."""

    capturing = False

    def serves(self, device: torch.device) -> bool:
        """Every device."""
        return True

    def begin(self, device: torch.device) -> None:
        """Nothing to wait for."""

    def warm_up(self, function: Call, device: torch.device) -> tuple[Any, str]:
        """Runs the function."""
        return function(), ""

    def record(self, function: Call, device: torch.device, generators: Any) -> NoGraph:
        """Runs the function for its results."""
        self.outputs = function()
        return self

    def replay(self) -> None:
        """Nothing."""


def replays(rounds: int) -> dict[str, float]:
    """Microseconds of host time around a replay with the arguments of a sampling step, with and without a UNet.

    A signature holds whether each module is training.
    """
    with torch.device("meta"):  # its modules are counted and not run
        unet = create_unet(**UNETS["CIFAR-10"])
    # Small, as a CPU copies them itself.
    x, t, weights = torch.randn(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64), torch.randn(6, 1)
    calls: dict[str, Call] = {}
    with use_capture(NoGraph()):
        for modules in ([unet], []):
            step = Graphed(lambda x, t, weights: t, "cpu", modules=modules)
            calls[f"{len(list(unet.modules())) if modules else 'no'} modules"] = partial(step, x, t, weights)
        return fastest(calls, "cpu", rounds)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and return the exit code: 0, or 2 without Triton."""
    parser = argparse.ArgumentParser(prog="python -m bench.launch_host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=whole_number, default=ROUNDS)
    parser.add_argument(
        "--general", action="store_true", help="remember no call: each is checked anew, by the dispatcher"
    )
    parser.add_argument("--python", action="store_true", help="repeat calls in Python, without the extension in C++")
    options = parser.parse_args(arguments)
    try:
        import triton  # noqa: F401
    except ImportError:
        print("This bench needs Triton: pip install 'tdc_fast[gpu]'", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    remembering = patch.object(call_cache, "_Guards", None) if options.general else nullcontext()
    repeating = patch.dict(os.environ, {host.VARIABLE: "off" if options.python else "on"})
    with repeating, remembering, nullcontext() if device == "cuda" else stand_in_gpu():
        baselines = torch_calls(device)
        routed = {backend: routed_calls(device, backend) for backend in ("triton", "cuda")}
        print(f"host microseconds per call, and times torch's ({device}, torch {torch.__version__})")
        print(f"{'':<22}" + "".join(f"{name:>17}" for name in PASSES))
        for operator, baseline in baselines.items():
            peers = {"torch": baseline, **{backend: calls[operator] for backend, calls in routed.items()}}
            table = measured(peers, device, options.rounds)
            for peer, row in table.items():
                cells = (f"{row[name]:9.1f} {row[name] / table['torch'][name]:6.2f}x" for name in PASSES)
                print(f"{operator + ', ' + peer:<22}" + "".join(cells))
        for model, microseconds in replays(options.rounds).items():
            print(f"replay of a graph, {model}: {microseconds:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
