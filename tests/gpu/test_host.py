"""On a GPU the extension in C++ is used unasked, and keeps the device, the stream and the memory in order."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.stand_in_gpu import dense_memory
from tdc_fast import RoutingPlan, routed_conv2d
from tdc_fast.ops import backends, conv2d, host

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("host_extension")]
BATCH, GROUPS, CHANNELS = 8, 4, 64
on_both = pytest.mark.parametrize("backend", ["triton", "cuda"])


class Convolutions:
    """Three convolutions, one after the other, as a network has them.

    Attributes:
        weights: Their filters and biases.
    """

    def __init__(self, backend: str, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.backend = backend
        shapes = 3 * ((GROUPS, CHANNELS, CHANNELS, 3, 3), (GROUPS, CHANNELS))
        self.weights = [(0.05 * dense_memory(*shape)).to(device).requires_grad_() for shape in shapes]
        self.plan = RoutingPlan.from_groups(torch.arange(BATCH, device=device) % GROUPS, GROUPS)

    def __call__(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[::2], self.weights[1::2], strict=True):
            x = routed_conv2d(x, weight, bias, self.plan, padding=1, backend=self.backend)
        return x

    def gradients(self, x: Tensor, **settings: Any) -> list[Tensor]:
        y = checkpoint(self, x, use_reentrant=False) if settings.get("again") else self(x)
        return list(torch.autograd.grad(y.float().square().sum(), [x, *self.weights]))


def image(device: str = "cuda") -> Tensor:
    return dense_memory(BATCH, CHANNELS, 16, 16).to(device).requires_grad_()


@on_both
def test_it_serves_gpus_unasked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(host.VARIABLE)
    backends.forget()
    network, x = Convolutions(backend), image()
    for _ in range(2):
        y = network(x)
    assert type(y.grad_fn).__name__ == "CppFunction"
    assert len(conv2d.forward._calls) == 1  # the three have one signature
    with torch.no_grad():
        assert not network(x).requires_grad


@on_both
def test_a_network_has_the_bits_of_python(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Convolutions(backend), image()
    found = [network.gradients(x, again=again) for again in (False, False, True, True)]
    monkeypatch.setenv(host.VARIABLE, "off")
    backends.forget()
    for _ in range(2):
        expected = network.gradients(x)
    for gradients in found:
        assert all(map(torch.equal, gradients, expected))


@on_both
def test_no_memory_is_kept(backend: str) -> None:
    network, x = Convolutions(backend), image()
    for _ in range(3):
        network.gradients(x)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        network.gradients(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@on_both
def test_a_call_for_another_device_than_the_current_one(backend: str) -> None:
    network, x = Convolutions(backend, "cuda:1"), image("cuda:1")
    expected = network.gradients(x)
    for current in (1, 0, 1, 0):
        with torch.cuda.device(current):
            assert all(map(torch.equal, network.gradients(x), expected))
