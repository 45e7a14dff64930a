"""A routed UNet neither concatenates skips nor makes upsampled images; a dense one does each once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdc_fast.models import blocks
from tdc_fast.models.blocks import ResBlock
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.ops import native
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import GROUPS, PRUNED, batch, shuffled_plan, unet


class ImagesMade(TorchDispatchMode):
    """Counts the concatenations and upsamplings of images."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("cat", "upsample_nearest2d", "upsample_nearest2d_backward") and out.dim() == 4:
            self.count[name] += 1
        return out


def run(model: torch.nn.Module) -> tuple[list[Tensor], Counter[str]]:
    """The output and all gradients, and which images were made on the way."""
    x, t, y = batch()
    with ImagesMade() as made:
        out = model(x.requires_grad_(), t, y=y)
        grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)], made.count


@pytest.fixture(scope="module")
def routed() -> RoutedModel:
    model = unet(use_scale_shift_norm=True)
    return pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
def test_a_routed_unet_makes_neither_a_concatenation_nor_an_upsampled_image(routed: RoutedModel) -> None:
    assert not run(routed)[1]


def test_a_dense_unet_makes_each_once() -> None:
    made = run(unet())[1]
    assert made == {"cat": 4, "upsample_nearest2d": 1, "upsample_nearest2d_backward": 1}


def test_where_the_backend_would_copy_skips_are_joined_once_per_block_with_the_same_result(
    routed: RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(routed)
    monkeypatch.setattr(blocks, "reads_two_inputs", lambda device, dtype: False)
    actual, made = run(routed)
    assert made["cat"] == 4
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [None, 0], ids=["whole", "only the skip path"])
@pytest.mark.parametrize("out_channels", [32, 64], ids=["identity", "1x1"])
def test_a_block_reads_two_inputs_as_one_channel_axis(out_channels: int, width: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    base = randomise(ResBlock(32, 16, out_channels, 0.0, False, True, width))
    x, emb = torch.randn(4, 32, 6, 6, generator=generator), torch.randn(4, 16, generator=generator)
    expected = base(x, emb)
    torch.testing.assert_close(base(x[:, :11], emb, x[:, 11:]), expected)
