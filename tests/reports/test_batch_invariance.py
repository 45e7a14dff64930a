"""On the CPU a packed UNet gives a sample the same bits alone as in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from tdc_fast.models.blocks import silu
from tdc_fast.nn.attention import qkv_attention
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import GROUPS, PRUNED, shuffled_plan, unet


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def batch(count: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 2, size, size, generator=generator).to(dtype)
    t = torch.randint(0, 1000, (count,), generator=generator)
    return x, t, torch.randint(0, 5, (count,), generator=generator)


def check(model: RoutedModel, size: int, dtype: torch.dtype) -> None:
    """In batches of several sizes, up to five samples alone and a random half of the batch."""
    model = model.to(dtype)
    with torch.no_grad():
        for count in (2, 5, 19):
            x, t, y = batch(count, size, dtype)
            whole = model(x, t, y=y)
            halves = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tensor_split(2)
            alone = torch.arange(0, count, -(-count // 5)).split(1)
            for kept in (*alone, *halves):
                assert torch.equal(model(x[kept], t[kept], y=y[kept]), whole[kept]), (count, kept.tolist())


@pytest.mark.parametrize(
    ("scale_shift", "pruned", "dtype"),
    [
        (False, False, torch.float32),
        (False, True, torch.bfloat16),
        (True, False, torch.bfloat16),
        (True, True, torch.float32),
    ],
)
def test_a_packed_unet_gives_a_sample_the_same_bits_in_every_batch(
    scale_shift: bool, pruned: bool, dtype: torch.dtype
) -> None:
    model = unet(use_scale_shift_norm=scale_shift)
    if pruned:
        packed = pack_experts(model, groups=GROUPS, widths=shuffled_plan(model, PRUNED))
    else:
        packed = randomise(pack_experts(model, groups=GROUPS), seed=3)  # experts that differ
    check(packed, 8, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_channels": 20, "num_heads": 2},  # embeddings that are no multiple of a vector
        {"model_channels": 12, "num_heads": 2, "image_size": 16},
        {"image_size": 4, "conv_resample": False},
        {"image_size": 6, "model_channels": 20, "num_heads": 1},  # 3x3 positions in attention, one head
    ],
)
def test_it_does_so_at_any_number_of_channels_and_size(settings: dict) -> None:
    model = unet(**settings)
    check(randomise(pack_experts(model, groups=GROUPS), seed=3), model.image_size, torch.float32)


@pytest.mark.parametrize(
    ("threads", "dtype"),
    [
        (1, torch.float32),
        (2, torch.bfloat16),
        (3, torch.float32),
        (3, torch.bfloat16),
        (4, torch.float32),
    ],
    indirect=["threads"],
)
def test_attention_of_a_sample_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """At any number of positions, heads and live heads, also where one head is all there is to compute."""
    generator = torch.Generator().manual_seed(0)
    for tokens, (heads, dim) in product((4, 9, 16, 25, 32, 49), ((1, 24), (1, 256), (2, 12), (3, 7))):
        qkv = torch.randn(6, tokens, heads * 3 * dim, generator=generator).to(dtype)
        some = torch.arange(heads) < torch.tensor([1, 0, heads, 1, heads, 1])[:, None]
        for live in (None, some):
            whole = qkv_attention(qkv, dim, live)
            for kept in ([0], [1, 3, 5]):
                alone = qkv_attention(qkv[kept], dim, None if live is None else live[kept])
                assert torch.equal(alone, whole[kept]), (tokens, heads, dim, live is None, kept)


def test_silu_of_an_element_does_not_depend_on_where_it_stands() -> None:
    x = torch.randn(137, 500, generator=torch.Generator().manual_seed(0)) * 6
    whole = silu(x)
    assert all(torch.equal(silu(row.clone()), expected) for row, expected in zip(x, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_that_silu_is_as_accurate_as_torchs(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e30, -200.0, -89.0, -80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 89.0, 1e30], dtype=dtype)
    x.requires_grad_()
    results = [(f(x), *torch.autograd.grad(f(x).sum(), x)) for f in (silu, torch.nn.functional.silu)]
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=16 * torch.finfo(dtype).eps, atol=1e-30)
