"""Modules of other packages, packed on a GPU, give what they give on the CPU in fp64; routed layers do not wait."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, pack_experts
from tests.gpu.networks import no_synchronisation
from tests.gpu.problems import on_device
from tests.models.test_iddpm import randomise
from tests.nn.foreign import Transformer
from tests.nn.test_any_module import Around, SelfAttention
from tests.nn.test_blocks import Net, shuffled

GROUPS, T = TimestepGroups.uniform(100, 3), torch.tensor([99, 10, 40, 0, 70, 20])
IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def float32_means_float32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def compare(routed: nn.Module, device: str, *inputs: Tensor) -> None:
    """Output and gradients on the device against those of a copy in fp64 on the CPU."""
    exact = copy.deepcopy(routed).double()
    wide = [value.double() if value.is_floating_point() else value for value in inputs]
    there = [value.to(device) for value in (inputs[0], T, *inputs[1:])]
    outputs = exact(wide[0], T, *wide[1:]), routed.to(device)(*there)
    expected, found = (out["sample"] if isinstance(out, dict) else out for out in outputs)
    torch.testing.assert_close(found.cpu().double(), expected, **CLOSE)
    expected.square().mean().backward()
    found.square().mean().backward()
    for (name, parameter), wanted in zip(routed.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu().double(), wanted.grad, **CLOSE, msg=name)


@on_device
@pytest.mark.parametrize("recompute", ["none", "reentrant", "not reentrant"])
def test_modules_that_run_once_per_group(recompute: str, device: str) -> None:
    experts = [randomise(Transformer(recompute=recompute), seed) for seed in range(3)]
    compare(pack_experts(experts, GROUPS), device, IMAGES, torch.tensor([0, 1, 2, 3, 4, 0]))


@on_device
@pytest.mark.parametrize("layer", ["layer norm", "attention"])
def test_routed_layers_of_torch_do_not_wait(layer: str, device: str) -> None:
    def make() -> nn.Module:
        return Around(nn.LayerNorm(8) if layer == "layer norm" else SelfAttention(batch_first=True))

    routed = pack_experts([randomise(make(), seed) for seed in range(3)], GROUPS)
    compare(routed, device, TOKENS)
    x, t = TOKENS.to(device), T.to(device)
    routed(x, t)  # loads the kernels
    with no_synchronisation(device):
        routed(x, t).sum().backward()


@on_device
def test_pruned_blocks_of_other_packages(device: str) -> None:
    model = randomise(Net(), 0)
    some = {"first": 8, "second": 8, "own": 8, "cross": 8, "mlp": 8}
    plan = shuffled(model, [{}, some, dict.fromkeys(some, 0)], GROUPS)
    x, context = torch.randn(6, 8, 4, 4), torch.randn(6, 3, 5)
    compare(pack_experts(model, GROUPS, plan), device, x, context)
