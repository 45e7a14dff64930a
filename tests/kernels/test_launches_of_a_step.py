"""How many kernels one training step of a routed UNet starts on the Triton backend, by name.

Tensors live in host memory, where a stand-in takes the launches; tiles and splits are those of an H200.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from tdc_fast.kernels import conv_wgrad, tile_shapes
from tdc_fast.kernels.launch import Launch
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.routed import RoutedConv2d, RoutedGroupNorm, RoutedLinear
from tdc_fast.ops import backends
from tdc_fast.ops.builtin import LazyTriton
from tdc_fast.routing import TimestepGroups


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts launches by kernel; nothing runs."""
    counts: Counter[str] = Counter()
    gpu = tile_shapes.Device(90, 132, 232448)
    for module in (tile_shapes, conv_wgrad):
        monkeypatch.setattr(module, "device_of", lambda device: gpu)
    monkeypatch.setattr(LazyTriton, "supports", lambda self, problem: None)
    monkeypatch.setattr(Launch, "run", lambda launch: counts.update([launch.kernel.__name__]))
    monkeypatch.setattr("tdc_fast.nn.one_input.launches_cost", lambda device: True)
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    backends.forget()
    yield counts
    backends.forget()


def routed_unet(scale_shift: bool) -> RoutedModel:
    size = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
    model = create_unet(attention_resolutions="4", use_scale_shift_norm=scale_shift, **size)
    return pack_experts(model, TimestepGroups.uniform(1000, 2))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_bias_gradients_take_no_launch_of_their_own(scale_shift: bool, launched: Counter[str]) -> None:
    """Also where the embedding is a bias per sample; two inputs take one launch each, a norm one."""
    model = routed_unet(scale_shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.zeros(4, 3, 8, 8), torch.tensor([1, 2, 900, 901]))
    launched.clear()
    out.sum().backward()
    leaves = [leaf for leaf in model.modules() if isinstance(leaf, (RoutedConv2d, RoutedLinear))]
    embeddings = sum("emb_layers" in name for name, leaf in model.named_modules() if isinstance(leaf, RoutedLinear))
    two_inputs = len(model.model.output_blocks)  # the skip path of each
    norms = sum(isinstance(leaf, RoutedGroupNorm) for leaf in model.modules())
    assert launched["wgrad_kernel"] == len(leaves) - embeddings + 1 + two_inputs  # the embedding's layers are one
    assert launched["norm_backward_kernel"] == norms  # which sum their affine's gradients themselves
    others = set(launched) - {"wgrad_kernel", "norm_backward_kernel"}
    assert others <= {"conv_tma_kernel", "conv_pointer_kernel", "merge_taps_kernel"}  # dgrad


def test_the_bias_of_a_frozen_weight_takes_one_launch(launched: Counter[str]) -> None:
    model = routed_unet(scale_shift=False)
    convolution = model.model.middle_block[0].in_layers[2]
    convolution.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.zeros(4, 3, 8, 8), torch.tensor([1, 2, 900, 901]))
    launched.clear()
    out.sum().backward()
    assert launched["bias_kernel"] == 1  # of both, bias and embedding
