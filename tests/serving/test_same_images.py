"""A request's images are those of `tdc_fast.sample` for it alone, bit for bit, whatever else is in the engine."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import time

import pytest
import torch

from tdc_fast.diffusion import Diffusion, GuidedDenoiser, SamplingLoop
from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.evaluation.conditions import draw_labels
from tdc_fast.graphs import use_capture
from tdc_fast.nn.one_expert import as_one_expert
from tdc_fast.serving import Engine, Policy, Request
from tdc_fast.serving.live import rows_of
from tests.graphs.tape import TapeCapture
from tests.serving.models import CLASSES, NULL_CLASS, NUM_TIMESTEPS, SHAPE, experts, process, unet


def alone(model, diffusion, request: Request, has_classes: bool) -> torch.Tensor:
    """What `draw_samples` draws: labels, then noise, from one generator, in one batch."""
    generator = torch.Generator().manual_seed(request.seed)
    kwargs = {}
    if has_classes:
        allowed = CLASSES if request.label is None else (request.label,)
        kwargs["y"] = draw_labels(allowed, request.num_images, generator)
    if request.guidance_scale != 1:
        model = GuidedDenoiser(model, request.guidance_scale, NULL_CLASS)
    loop = SamplingLoop(diffusion, model, sampler=request.sampler, steps=request.steps, eta=request.eta)
    return loop.draw((request.num_images, *SHAPE), generator=generator, model_kwargs=kwargs)


def mixed_requests(seed: int, count: int, has_classes: bool, has_groups: bool = True) -> list[Request]:
    draw = random.Random(seed)
    scales = [1.0, 1.0, 2.5, *([(1.0, 3.0, 1.0, 2.0), (2.0, 0.0, 1.0, 1.0)] if has_groups else [])]
    requests = []
    for number in range(count):
        sampler, eta = draw.choice([("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0), ("dpm++2m", 0.0)])
        requests.append(
            Request(
                num_images=draw.choice([1, 1, 2, 3]),
                seed=number,
                steps=draw.choice([1, 3, 6, 9]),
                sampler=sampler,
                eta=eta,
                label=draw.choice([None, *CLASSES]) if has_classes else None,
                guidance_scale=draw.choice(scales) if has_classes else 1.0,
                preview_every=draw.choice([0, 2]),
            )  # fmt: skip
        )
    return requests


def scales_of(request: Request, diffusion: Diffusion) -> list[float]:
    """The guidance scale of every step."""
    timesteps = Trajectory.plan(diffusion, request.sampler, request.steps).timesteps.tolist()
    scale = request.guidance_scale
    if not isinstance(scale, tuple):
        return [scale] * len(timesteps)
    return [scale[(t >= 5) + (t >= 12) + (t >= 30)] for t in timesteps]


def serve(engine: Engine, requests: list[Request], seed: int) -> list[torch.Tensor]:
    """The images of requests that arrive in random order, with pauses in which steps are taken."""
    draw = random.Random(seed)
    order = draw.sample(range(len(requests)), len(requests))
    taken = {}
    with engine:
        for number in order:
            taken[number] = engine.submit(requests[number])
            time.sleep(draw.choice([0.0, 0.0, 0.01, 0.03]))
        return [taken[number].result(60).samples for number in range(len(requests))]


@pytest.mark.filterwarnings("ignore:.*sampling steps leave")
@pytest.mark.parametrize(
    ("seed", "policy", "sizes", "kind"),
    [
        (0, "fifo", (), "pruned"),
        (1, "shortest", (), "whole"),
        (2, "fifo", (2, 4, 8), "learned variance"),
        (3, "shortest", (3, 5, 8), "no classes"),
        (4, "slack", (), "single"),
    ],
)
def test_images_are_those_of_the_request_alone_in_any_order_of_arrival(seed, policy, sizes, kind):
    learn_sigma, has_classes = kind == "learned variance", kind != "no classes"
    diffusion = process(learn_sigma=learn_sigma)
    if kind == "single":
        given = unet()
        model = as_one_expert(given, NUM_TIMESTEPS)  # what --deterministic True samples
    else:
        given = model = experts(pruned=kind == "pruned", learn_sigma=learn_sigma, class_cond=has_classes)
    requests = mixed_requests(seed, 12, has_classes, kind != "single")
    engine = Engine(
        given, diffusion, SHAPE, max_batch=8, classes=CLASSES if has_classes else (),
        num_classes=NULL_CLASS + 1 if has_classes else 0, null_class=NULL_CLASS if has_classes else None,
        policy=Policy(policy), sizes=sizes,
    )  # fmt: skip
    drawn = serve(engine, requests, seed)
    for request, images in zip(requests, drawn, strict=True):
        assert torch.equal(images, alone(model, diffusion, request, has_classes)), request
    statistics = engine.statistics
    assert statistics.outcomes == {"completed": 12} and statistics.failed_steps == 0
    paid = sum(r.num_images * sum(1 + (scale != 1) for scale in scales_of(r, diffusion)) for r in requests)
    assert statistics.rows == statistics.expert_rows.sum() == paid
    assert statistics.steps < sum(r.steps for r in requests), "steps were shared"
    assert (statistics.padding > 0) == bool(sizes)


@pytest.mark.filterwarnings("ignore:.*sampling steps leave")
def test_steps_replayed_from_a_graph_per_size_give_the_same_images():
    model, diffusion, tape = experts(), process(), TapeCapture()  # of pruned heads the CPU has a form without graphs
    requests = [request for request in mixed_requests(7, 8, True) if rows_of(request) <= 4]
    with use_capture(tape):
        engine = Engine(
            model, diffusion, SHAPE, max_batch=4, classes=CLASSES, num_classes=NULL_CLASS + 1, null_class=NULL_CLASS
        )
        drawn = serve(engine, requests, 7)
    assert engine._stepper.sizes == (1, 2, 3, 4)  # each captured before the first request
    assert len(tape.tapes) == 4 and tape.warm_ups == 8 and tape.replays == 4 + engine.statistics.steps
    for request, images in zip(requests, drawn, strict=True):
        assert torch.equal(images, alone(model, diffusion, request, True)), request


def test_a_single_denoiser_as_it_is_may_differ_and_says_so_by_name():
    given = unet()
    engine = Engine(given, process(), SHAPE, classes=CLASSES, num_classes=6, deterministic=False)
    assert engine._stepper._model is given
    assert engine.statistics.num_experts == 1


def test_images_do_not_depend_on_the_threads_of_the_caller():
    """Several threads submit; each gets its own images."""

    model, diffusion = experts(), process()
    requests = [Request(seed=seed, steps=4, sampler="ddpm") for seed in range(8)]
    engine = Engine(model, diffusion, SHAPE, max_batch=4, classes=CLASSES, num_classes=6)
    with engine, concurrent.futures.ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda request: engine.submit(request).result(60), requests))
    for request, result in itertools.islice(zip(requests, drawn, strict=True), 0, None, 3):
        assert torch.equal(result.samples, alone(model, diffusion, request, True))
        assert result.labels is not None and 0 <= result.waited <= result.took
