"""The Triton group norm compiles without a GPU: no spills, 16-byte accesses, and no atomic but one counter."""

from __future__ import annotations

import pytest
import torch

from tdc_fast.kernels.problems import NormProblem

pytest.importorskip("triton")

from tdc_fast.kernels.group_norm import norm_backward_launch, norm_forward_launch
from tdc_fast.kernels.launch import Launch
from tests.compile_only.triton_build import SHARED_LIMITS, build

# (channels, norm groups, height and width, dtype): layers of UNets, groups not a power of two, the widest group
LAYERS = [
    (128, 32, 32, torch.bfloat16),
    (192, 32, 64, torch.float16),
    (512, 32, 8, torch.bfloat16),
    (128, 32, 32, torch.float32),
    (2048, 1, 8, torch.bfloat16),
]


def launch_of(
    channels: int,
    norm_groups: int,
    size: int,
    dtype: torch.dtype,
    backward: bool,
    x2_channels: int = 0,
    sums: bool = True,
) -> Launch:
    """The launch with everything optional given, on tensors without memory; `sums`: of the samples of each expert."""
    p = NormProblem(
        op="routed_group_norm", device=torch.device("meta"), dtype=dtype, batch=128, height=size, width=size,
        channels=channels, num_norm_groups=norm_groups, eps=1e-5, silu=True, num_groups=8, num_experts=8,
        x2_channels=x2_channels,
    )  # fmt: skip

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    image, rows, experts = made(128, channels, size, size), made(128, channels), made(8, channels)
    statistics, shares = made(128, norm_groups, dtype=torch.float32), made(128, channels, dtype=torch.float32)
    first = made(128, channels - x2_channels, size, size)
    second = made(128, x2_channels, size, size) if x2_channels else None
    tensors = {"x": first, "x2": second, "weight": experts, "bias": experts, "scale": rows, "shift": rows}
    tensors |= {"mean": statistics, "rstd": statistics, "offsets": made(9, dtype=torch.int32)}
    tensors |= {name: made(8, dtype=torch.int32) for name in ("weight_index", "widths")}
    counters = made(8, norm_groups, dtype=torch.int32)
    if not backward:
        return norm_forward_launch(p, tensors | {"y": image, "counters": counters})
    grads = {
        "dy": image,
        "dx": first,
        "dx2": second,
        "dscale": rows,
        "dshift": rows,
        "dweight_share": shares,
        "dbias_share": shares,
        "dweight": experts if sums else None,
        "dbias": experts if sums else None,
        "counters": counters if sums else None,
    }
    return norm_backward_launch(p, tensors | grads)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(str(v).removeprefix("torch.") for v in layer))
def test_a_layer_compiles(layer: tuple[int, int, int, torch.dtype], backward: bool, arch: int) -> None:
    launch = launch_of(*layer, backward)
    built = build(launch.kernel, launch.arguments, arch, launch.options)
    # ptxas keeps to 128 registers, and saves two (Triton 3.6: four) of the backward's last part before its loops.
    assert built.stack <= 16 * backward, f"{built.stack} bytes of local memory per thread"
    assert built.shared <= SHARED_LIMITS[arch]
    assert not built.count(r"\bred\.")  # gradients are sums in one order
    assert built.count(r"\batom\.") == built.count(r"\batom\.global\.gpu\.acq_rel\.add\.[us]32") == backward
    if layer[0] < 2048:
        assert built.count(r"ld\.global[.\w]*\.v4") and built.count(r"st\.global[.\w]*\.v4")
    assert not built.count(r"\.f64")


# (channels, of which in x2, size): layers of the CIFAR-10 UNet whose norm groups straddle the seam, or blocks do
SEAMS = [(384, 128, 32), (512, 256, 16), (320, 64, 32)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: "-".join(map(str, seam)))
def test_two_inputs_keep_16_byte_accesses(seam: tuple[int, int, int], backward: bool) -> None:
    channels, x2_channels, size = seam
    launch = launch_of(channels, 32, size, torch.bfloat16, backward, x2_channels)
    built = build(launch.kernel, launch.arguments, 90, launch.options)
    assert built.stack <= 24, f"{built.stack} bytes of local memory per thread"  # ptxas keeps to 128 registers
    one = launch_of(channels, 32, size, torch.bfloat16, backward)
    accesses = r"(ld|st)\.global[.\w]*"
    assert built.count(accesses) == build(one.kernel, one.arguments, 90, one.options).count(accesses)
    assert built.count(r"ld\.global[.\w]*\.v4") and built.count(r"st\.global[.\w]*\.v4")
