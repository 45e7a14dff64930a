"""The Hopper form of convolutions, as a roofline needs it: where it runs, its time at fewer live channels, its steps.

At full width the time is that of the model by which the form chooses its tiles (csrc/cuda/conv/hopper_model.h). With
stride 2, and for upsampled images, which are computed as a gradient with stride 2 on merged taps, that model counts
products only. With fewer live channels the time falls with the number of products: in steps of 16 input channels, and
of the columns that a tile's products may have; below 64 columns half of the saved products count. No committed result
has measured any of this.
"""

from __future__ import annotations

import math

from tdc_fast.kernels.problems import ConvProblem
from tdc_fast.kernels.tile_shapes import Device
from tdc_fast.ops import cuda, hopper, native
from tdc_fast.ops.backends import explain_problem

DEPTH = 16  # channels of a product's depth
PAIRS = 2048  # multiply-adds of a multiprocessor in a clock


def runs_in_hopper_form(problem: ConvProblem) -> bool:
    """Whether the backend that would run a forward runs it in the Hopper form."""
    found = explain_problem(problem.op, problem)
    return found.backend == hopper.name and found.forms.get(hopper.name) == hopper.HOPPER_FORM


def clocks(problem: ConvProblem, gpu: Device, live_in: int, live_out: int) -> float:
    """Clocks of a forward in the Hopper form, of the multiprocessor that is busy the longest.

    Args:
        problem: at full width.
        gpu: what runs it.
        live_in: live input channels.
        live_out: live output channels.
    """
    full, columns = _tile(problem, gpu)
    depth = math.ceil(live_in / DEPTH) / math.ceil(problem.in_channels / DEPTH)
    return full * depth * _multiplied(live_out, columns) / _multiplied(problem.out_channels, columns)


def column_step(problem: ConvProblem, gpu: Device) -> int:
    """The step in live output channels at which a tile multiplies fewer columns."""
    _, (*fewer, columns) = _tile(problem, gpu)
    return columns - max([size for size in fewer if size < columns], default=0)


def _tile(problem: ConvProblem, gpu: Device) -> tuple[int, tuple[int, ...]]:
    """Clocks at full width of the tile that the form chooses, and the columns that its products may have."""
    if native.module is None:
        raise RuntimeError("the Hopper form is part of the native module, which is not built")
    facts = (gpu.arch, gpu.multiprocessors, gpu.shared_limit)
    (_, clocks, columns), *_ = native.module.cuda_conv_forward_hopper_choices(**cuda.geometry(problem), device=facts)
    return clocks, tuple(columns)


def _multiplied(live: int, columns: tuple[int, ...]) -> float:
    """Columns in whose time tiles multiply so many live output channels.

    Shared memory delivers the 64 rows of a product as fast as 64 columns are multiplied, and sets the time of fewer.
    """
    rest = live % columns[-1]
    last = min(size for size in columns if size >= rest)
    return live - rest + (max(last, (64 + last) / 2) if rest else 0)
