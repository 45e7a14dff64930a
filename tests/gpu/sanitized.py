"""What compute-sanitizer watches: every kernel of one backend once, on shapes that end in the middle of a tile.

`python -m tests.gpu.sanitized BACKEND [DEVICE]`. Results are compared with the reference, so that the program also
ends badly when the sanitizer sees nothing. Each case is named before it runs: the last one named is the one that hangs.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tdc_fast import RoutingPlan
from tdc_fast.ops.backends import available_backends
from tdc_fast.ops.pack import pack_channels
from tests.cases import ConvCase, NormCase, upstream
from tests.gpu.problems import Target, gradients, moved, on_sms, refusal, routed
from tests.gpu.shapes import HOPPER_CASES, THREE, UNEVEN, conv, norm

CASES: list[ConvCase | NormCase] = [
    conv(UNEVEN, (40, 72), (7, 6)),
    conv(THREE, (16, 24), (6, 6), stride=(2, 2), in_widths=(16, 8, 0), out_widths=(24, 0, 8)),
    conv(THREE, (64, 64), (5, 1), filter=(1, 1), padding=(0, 0)),
    conv(THREE, (104, 72), (5, 3), x2_channels=40, upsample=2, in_widths=(104, 8, 70), out_widths=(72, 40, 8)),
    conv(THREE, (19, 9), (7, 5), x2_channels=6, in_widths=(19, 4, 15)),
    conv(UNEVEN, (3, 40), (9, 11)),
    conv(THREE, (40, 6), (24, 24), in_widths=(40, 8, 37), out_widths=(6, 0, 4)),
    norm(THREE, 24, 6, (7, 5), widths=(24, 8, 12)),
    norm(THREE, 64, 2, (48, 48)),
    norm(THREE, 48, 4, (7, 5), widths=(48, 24, 36), x2_channels=16),
    norm(THREE, 64, 2, (48, 48), x2_channels=24),
    norm(THREE, 15, 5, (7, 5), widths=(15, 3, 6), x2_channels=7),
]

# Together, on few SMs and on all, they run every kernel of the Hopper form (tests/native/test_gpu_cases.py).
OF_HOPPER = (
    "tiles of 16x16",
    "small tiles of one sample",
    "wide tiles",
    "tall tiles of 64 channels",
    "widths",
    "images of 2x8 and two inputs with widths",
    "upsampled",
    "upsampled images of 4x4",
    "clusters of two",
    "clusters of two in dgrad",
    "1x1 filters",
    "units of 384 channels",
)
MAX_ERROR = 2e-2  # of a gradient, as a share of it: bf16's rounding, of merged weights too


def cases_of(backend: str) -> list[tuple[ConvCase | NormCase, bool]]:
    """Cases, and whether they run on few SMs, which choose larger tiles."""
    own = OF_HOPPER if backend == "hopper" else ()
    return [(HOPPER_CASES[name], few) for few in (True, False) for name in own] + [(case, False) for case in CASES]


def main(backend: str, device: str = "cuda") -> None:
    groups = torch.arange(50, device=device) * 7 % 5
    assert torch.equal(RoutingPlan.from_groups(groups, 5).order, torch.sort(groups, stable=True).indices)
    source, order = (
        torch.randn(1, 13, 5, 3, 3, device=device),
        torch.arange(12, -1, -2, dtype=torch.int32, device=device),
    )
    packed = pack_channels(source, out_order=order.expand(2, -1))
    assert torch.equal(packed, source[:, order.long()].expand(2, -1, -1, -1, -1))
    ran = 0
    for case, few in cases_of(backend):
        target, oracle = Target(device, backend), Target("cpu", "reference")
        leaves = moved(case.tensors(torch.bfloat16), device, case.layout)
        if (reason := refusal(case, leaves, target)) is not None:
            print(f"not run: {case}: {reason}")
            continue
        print(f"runs{' on few SMs' if few else ''}: {case}", flush=True)
        on_host = moved(case.tensors(torch.bfloat16), "cpu", case.layout)
        expected = routed(case, on_host, oracle)
        dy = upstream(case, expected.shape, torch.bfloat16)
        with on_sms(few):
            ours = gradients(routed(case, leaves, target), leaves, dy)
        theirs = gradients(expected, on_host, dy)
        for name in ours:
            exact = theirs[name].float()
            error = (ours[name].float() - exact).norm() / exact.norm().clamp_min(1e-6)
            assert error <= MAX_ERROR, f"{name}: {error:.3g}"
        ran += 1
    assert ran >= 3, f"{backend} served {ran} of {len(cases_of(backend))} cases"
    print(f"ran {ran} cases on {backend}")


def command(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized", description=__doc__.partition("\n\n")[0])
    parser.add_argument("backend", choices=available_backends())
    parser.add_argument("device", nargs="?", default="cuda", help="cpu, or a GPU (default)")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("tests.gpu.sanitized needs an NVIDIA GPU (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    main(options.backend, options.device)
    return 0


if __name__ == "__main__":
    sys.exit(command())
