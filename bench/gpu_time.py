"""`python -m bench.gpu_time WHAT`: where the GPU's time of a forward or a training step goes, by kind of kernel.

WHAT is "forward", "step" (forward and backward, weights in the dtype) or "whole" (the step of `tdc_fast.train`:
autocast, AdamW, moving average). The CIFAR-10 UNet of improved-diffusion, routed over N experts or dense:

    python -m bench.gpu_time whole --num-groups 8 --batch 64
    python -m bench.gpu_time forward --dense --kernels 5

It prints per kind of kernel the milliseconds per call, their share and the launches, and on request the longest kernels
of every kind. `--dry-run` runs a tiny UNet on the CPU and shows torch's operators in place of kernels.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.files import whole_number
from bench.gpu import step, unet
from bench.gpu.layers import workload
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Machine
from tdc_fast.atomic import write_json

# The first kind whose pattern is in a kernel's name, or in that of an operator (dry run).
KINDS = {
    "optimizer and averages": r"adam|multi_tensor_apply|foreach|lpnorm|lerp",
    "attention": r"sdpa|flash|fmha|attention|softmax",
    "group norm": (
        r"group_norm|norm_(forward|backward)|sum_per_expert|rowwisemoments|computefusedparams|gammabeta|internalgradients"
    ),
    "bias gradients": r"bias_kernel|sample_sums|expert_sums",
    "convolution: weight gradient": r"wgrad",
    "convolution": r"conv|fprop|dgrad|implicit_gemm",
    "matrix products": r"gemm|cutlass|cublas|::(mm|bmm|addmm|linear|matmul)\b",
    "copies and concatenation": r"catarray|aten::cat|copy|memcpy|memset|fill|nchwtonhwc|nhwctonchw|transpose|_cast",
    "sort and gather": r"index_|indexing|gather|scatter|sort|routing_plan|permute_samples|aten::index",
    "random numbers": r"distribution|philox|aten::(randn?|normal|randint)",
    "upsampling": r"upsample|interpolate",
    "elementwise and sums": r"elementwise|reduce|triton_(poi|per|red)|aten::",
}
OTHER = "other"
CALLS = 3


@dataclass(frozen=True)
class Kernel:
    """The launches of one kernel in one call.

    Attributes:
        name: as the profiler has it.
        ms: milliseconds of all launches.
        launches: their number.
    """

    name: str
    ms: float
    launches: float


def main(arguments: list[str] | None = None) -> int:
    """Profile the call and print the table.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0, 2 without a GPU.
    """
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("bench.gpu_time needs an NVIDIA GPU; --dry-run shows the operators of a tiny UNet on the CPU")
        return 2
    machine = Machine("cpu" if options.dry_run else "cuda")
    run = BenchRun(machine, None, getattr(torch, options.dtype), 0.0, 0.0, tiny=options.dry_run)
    found = kernels(machine, call_of(run, options))
    print(table(found, options.kernels))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"what": options.what, "device": machine.describe(), "kernels": [asdict(k) for k in found]}
        write_json(options.out, facts)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("forward", "step", "whole"), metavar="WHAT")
    parser.add_argument("--dense", action="store_true", help="one dense model in place of the experts")
    parser.add_argument("--num-groups", type=whole_number, default=8)
    parser.add_argument("--batch", type=whole_number, default=64)
    parser.add_argument("--width", type=float, default=1.0, help="mean width of the experts' pruning units")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", type=int, default=0, help="longest kernels to show per kind")
    parser.add_argument("--out", type=Path, help="JSON file for all kernels")
    parser.add_argument("--dry-run", action="store_true", help="a tiny UNet on the CPU")
    return parser.parse_args(arguments)


def call_of(run: BenchRun, options: argparse.Namespace) -> Callable[[], Any]:
    """The call that the options describe."""
    work = workload(tiny=run.tiny)
    flags = next(iter(work.unets.values()))
    batch = work.batch if run.tiny else options.batch
    if options.what == "whole":
        whole = step.Problem(run, flags, batch, options.width, options.num_groups)
        return whole.dense() if options.dense else whole.routed()
    what = "forward" if options.what == "forward" else "training step"
    problem = unet.Problem(run, flags, batch, unet.Case("", what, options.num_groups, width=options.width))
    call = problem.calls_of(problem.base if options.dense else problem.routed)

    def without_gradients() -> Any:
        with torch.no_grad():
            return call()

    return call if what == "training step" else without_gradients


def kernels(machine: Machine, call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a call, longest first: means over a few calls, after one that compiles."""
    call()
    machine.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(CALLS):
            call()
        machine.synchronize()
    device = DeviceType.CUDA if machine.is_cuda else DeviceType.CPU
    result = []
    for event in found.key_averages():
        if event.device_type == device:  # operators have the time of their kernels too, which would count twice
            total = event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total
            result.append(Kernel(event.key, total / 1e3 / CALLS, event.count / CALLS))
    return sorted(result, key=lambda kernel: -kernel.ms)


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), OTHER)


def table(found: Iterable[Kernel], longest: int = 0) -> str:
    """A line per kind, the costliest first, and the longest kernels of each.

    Args:
        found: the kernels of a call.
        longest: kernels to show per kind.
    """
    kinds: dict[str, list[Kernel]] = {}
    for kernel in found:
        kinds.setdefault(kind_of(kernel.name), []).append(kernel)
    total = sum(kernel.ms for members in kinds.values() for kernel in members)
    lines = [f"{'kind':<30}{'ms':>10}{'share':>8}{'launches':>10}"]
    for kind, members in sorted(kinds.items(), key=lambda item: -sum(kernel.ms for kernel in item[1])):
        ms, launches = sum(kernel.ms for kernel in members), sum(kernel.launches for kernel in members)
        lines.append(f"{kind:<30}{ms:>10.3f}{ms / total if total else 0:>8.1%}{launches:>10.0f}")
        for kernel in sorted(members, key=lambda kernel: -kernel.ms)[:longest]:
            lines.append(f"  {kernel.name[:90]:<90}{kernel.ms:>10.3f}{kernel.launches:>8.0f}")
    return "\n".join([*lines, f"{'all':<30}{total:>10.3f}"])


if __name__ == "__main__":
    sys.exit(main())
