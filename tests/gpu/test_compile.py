"""torch.compile on a GPU: a routed network gives the eager result, forward and backward, also without synchronising."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.networks import no_synchronisation
from tests.gpu.problems import on_device
from tests.ops.test_torch_compile import Network, inputs, run


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@on_device
def test_a_compiled_network_gives_the_eager_result(device: str) -> None:
    network = Network().to(device)
    arguments = tuple(value.to(device) for value in inputs())
    eager = run(network, network, *arguments)
    fast = torch.compile(network, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch.testing.assert_close(run(network, fast, *arguments), eager, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        fast(*arguments)  # compiles for inference
        with no_synchronisation(device):
            fast(*arguments)
