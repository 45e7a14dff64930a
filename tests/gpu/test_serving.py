"""An engine on a GPU: one CUDA graph per size of batch, and the images of each request alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdc_fast.diffusion import SamplingLoop, create_diffusion
from tdc_fast.graphs import Graphed
from tdc_fast.serving import Engine, OutOfMemory, Request
from tests.gpu.networks import NUM_TIMESTEPS, batch_for, routed_unet

pytestmark = pytest.mark.gpu

REQUESTS = [
    Request(num_images=images, seed=seed, steps=steps, sampler=sampler, eta=eta)
    for seed, (images, steps, sampler, eta) in enumerate(
        [(1, 10, "ddim", 0.0), (2, 25, "ddpm", 0.0), (1, 7, "dpm++2m", 0.0), (3, 12, "ddim", 0.5), (1, 30, "ddpm", 0.0)]
    )
]


@pytest.mark.parametrize("pruned", [False, True])
def test_images_of_an_engine_are_those_of_the_request_alone_from_one_graph_per_size(pruned) -> None:
    model, diffusion = routed_unet("cuda", torch.float32, pruned=pruned).eval(), create_diffusion(NUM_TIMESTEPS)
    shape = tuple(batch_for(model, seed=0)[0].shape[1:])
    with sdpa_kernel(SDPBackend.MATH):
        engine = Engine(model, diffusion, shape, max_batch=8)
        taken = [engine.submit(request) for request in REQUESTS]
        with engine:
            drawn = [one.result(120).samples for one in taken]
        for request, images in zip(REQUESTS, drawn, strict=True):
            loop = SamplingLoop(
                diffusion, model, sampler=request.sampler, steps=request.steps, eta=request.eta
            )  # fmt: skip
            generator = torch.Generator().manual_seed(request.seed)
            alone = loop.draw((request.num_images, *shape), generator=generator, device="cuda")
            torch.testing.assert_close(images, alone.cpu(), rtol=1e-3, atol=1e-3)
    run = engine._stepper._run
    assert isinstance(run, Graphed) and run.why_not == "" and run.num_graphs == 6  # of 1, 2, 3, 4, 6 and 8 places
    assert engine.statistics.outcomes == {"completed": len(REQUESTS)}


def test_memory_that_runs_out_on_the_gpu_fails_the_step_and_not_the_engine() -> None:
    class Hungry(torch.nn.Module):
        """Asks for more memory than there is when its batch is larger than two."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device="cuda"))

        def forward(self, x, t):
            if len(x) > 2:
                torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return self.weight * x

    engine = Engine(Hungry(), create_diffusion(NUM_TIMESTEPS), (3, 8, 8), max_batch=4, deterministic=False, sizes=(2,))
    engine._stepper.warm_up = lambda: None  # type: ignore[method-assign]  # which would meet the same error
    large, small = engine.submit(Request(num_images=4, steps=5)), engine.submit(Request(num_images=2, steps=5))
    with engine:
        with pytest.raises(OutOfMemory):
            large.result(60)
        assert small.result(60).samples.isfinite().all() and engine.places == 2
