"""An upsampling convolution compiles without a GPU: its merged weights, and the kernels that run on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tdc_fast.kernels.conv_upsampled import merge_launch
from tdc_fast.kernels.tile_shapes import candidates
from tests.compile_only.test_triton_conv import DEVICES, Build, launch_of, problem_of
from tests.compile_only.triton_build import SHARED_LIMITS, build

UPSAMPLED = replace(problem_of(torch.bfloat16), upsample=2, out_height=64, out_width=64)


def test_merged_weights_are_stored_in_16_byte_accesses() -> None:
    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta").permute(0, 1, 4, 2, 3)

    launch = merge_launch(made(8, 256, 3, 3, 256), made(8, 256, 4, 4, 256))
    assert launch.grid == (8 * 16, 8, 8)
    built = build(launch.kernel, launch.arguments, 90, launch.options)
    assert built.stack == 0
    assert built.count(r"ld\.global[.\w]*\.v[24]") and built.count(r"st\.global[.\w]*\.v[24]")


@pytest.mark.parametrize("op", ["dgrad", "forward"], ids=["forward", "dgrad"])  # the kernel, and what it computes here
def test_the_kernels_of_the_adjoint_use_tensor_maps_and_no_local_memory(op: str) -> None:
    adjoint = UPSAMPLED.adjoint()
    tile = candidates(op, adjoint, DEVICES[90], "tma")[0]
    launch = launch_of(Build(90, op, adjoint, tile))
    tensors = {**launch.tensors, "bias": torch.empty((8, 128), dtype=torch.bfloat16, device="meta")}
    launch = replace(launch, tensors=tensors)
    built = build(launch.kernel, launch.arguments, 90, launch.options)
    assert built.stack == 0 and built.shared <= SHARED_LIMITS[90]
    assert built.wgmma and built.tma


def test_the_adjoint_has_the_sizes_of_both_sides() -> None:
    adjoint = UPSAMPLED.adjoint()
    assert (adjoint.filter, adjoint.stride, adjoint.padding) == ((4, 4), (2, 2), (1, 1))
    assert (adjoint.height, adjoint.width, adjoint.out_height, adjoint.out_width) == (64, 64, 32, 32)
    wide = replace(UPSAMPLED, filter=(5, 1), padding=(0, 0), out_height=60, out_width=64).adjoint()
    assert (wide.filter, wide.padding, wide.height, wide.out_height) == ((6, 2), (4, 0), 60, 32)
    assert (wide.height + 2 * wide.padding[0] - wide.filter[0]) // 2 + 1 == wide.out_height
