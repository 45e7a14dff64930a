"""Admission, order, cancellation, deadlines, failures and shutdown of an engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time

import numpy as np
import pytest
import torch

from tdc_fast.serving import (
    Cancelled,
    Diverged,
    Engine,
    EngineClosed,
    Expired,
    OutOfMemory,
    Overloaded,
    Policy,
    Preview,
    Request,
    RequestFailed,
    Result,
    Statistics,
    StepFailed,
)
from tdc_fast.serving.live import LiveRequest, Plan
from tdc_fast.serving.places import Places
from tests.serving.http import wait_for
from tests.serving.models import CLASSES, SHAPE, Scripted, experts, process


def engine_of(model: Scripted, **options) -> Engine:
    return Engine(model, process(), SHAPE, deterministic=False, **{"max_batch": 4, **options})


def live(number: int, steps: int, *, arrived: int = 0, images: int = 1) -> LiveRequest:
    plan = Plan(np.zeros(steps, np.int64), np.zeros((8, steps)), np.zeros(steps, np.int64), False, False)
    return LiveRequest(Request(num_images=images, steps=steps), plan, number, arrived)


def steps_until_done(policy: Policy, *, steps: int, others: int, rounds: int = 1000) -> int | None:
    """When a request is done, in an engine of one place that gets another one, of `others` steps, in every step."""
    first = live(0, steps)
    waiting = [first]
    for step in range(rounds):
        waiting.append(live(step + 1, others, arrived=step))
        for chosen in policy.choose(waiting, 1):
            chosen.position += 1
            if not chosen.remaining:
                waiting.remove(chosen)
        if first not in waiting:
            return step
    return None


def test_a_request_takes_two_places_per_image_where_its_scale_is_not_one():
    experts_of_steps = np.array([2, 2, 1, 1, 1, 0])
    plan = Plan(np.zeros(6, np.int64), np.zeros((8, 6)), experts_of_steps, False, False)
    mixed = LiveRequest(Request(num_images=3, steps=6, guidance_scale=(1.0, 1.5, 1.0)), plan, 0, 0)
    seen = []
    for position in range(7):  # after its last step it is asked too, where that step failed
        mixed.position = position
        seen.append((mixed.rows, mixed.alike, mixed.work))
    assert seen == [(3, 2, 27), (3, 1, 24), (6, 3, 21), (6, 2, 15), (6, 1, 9), (3, 1, 3), (3, 0, 0)]
    assert mixed.guidance.tolist() == [0, 0, 0.5, 0.5, 0.5, 0]


def test_no_request_starves_under_an_endless_stream_of_shorter_or_longer_ones():
    assert steps_until_done(Policy("fifo"), steps=50, others=1) == 49
    patience = 4.0
    done = steps_until_done(Policy("shortest", patience), steps=50, others=1)
    # What came while its remaining steps weighed more than their age goes before it, and nothing else.
    assert done is not None and 50 < done <= patience * 50 + 50
    assert steps_until_done(Policy("shortest", float("inf")), steps=50, others=1) is None
    assert steps_until_done(Policy("slack"), steps=50, others=1) == 49
    # Nine steps of head start: those of ten steps that came in steps 0 to 8 go before it, and no other.
    assert steps_until_done(Policy("slack"), steps=1, others=10) == 9 * 10


def test_who_goes_first():
    waiting = [live(0, 30), live(1, 5), live(2, 10)]
    assert [one.number for one in Policy("shortest").choose(waiting, 2)] == [1, 2]
    assert [one.number for one in Policy("fifo").choose(waiting, 2)] == [0, 1]
    assert [one.number for one in Policy("slack").choose(waiting, 2)] == [0, 2]
    waiting[0].position = 29  # what is done does not cost its turn
    waiting += [live(3, 40, arrived=9), live(4, 40, arrived=11)]
    assert [one.number for one in Policy("slack").choose(waiting, 4)] == [3, 0, 4, 2]


@pytest.mark.parametrize(("options", "message"), [(("lifo",), "policy: got 'lifo'"), (("slack", 0.0), "patience: got")])
def test_policies_that_there_are_not_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Policy(*options)


def test_places_that_the_next_in_turn_cannot_use_go_to_a_smaller_one_but_not_its_turn():
    waiting = [live(0, 9, images=3), live(1, 9, images=2), live(2, 9)]
    assert [one.number for one in Policy().choose(waiting, 4)] == [0, 2]
    waiting.append(live(3, 9, images=3))
    waiting.pop(0)
    assert [one.number for one in Policy().choose(waiting, 4)] == [1, 2]


def test_a_batch_that_would_fill_little_of_its_size_leaves_the_last_ones_for_later():
    model = Scripted()
    engine = engine_of(model, max_batch=8, sizes=(1, 4, 8), min_fill=0.75)
    for seed in range(5):
        engine.submit(Request(seed=seed, steps=2))
    with engine:
        pass
    assert model.calls == [4, 4, 1, 1]  # five in eight places is less than three quarters
    assert engine.statistics.padding == 0


def test_a_request_that_fills_little_of_a_size_is_not_passed_over_for_later_ones():
    """Five of eight places is less than three quarters, but the four of the next size are too few for it."""
    model = Scripted()
    engine = engine_of(model, max_batch=8, sizes=(4, 8), min_fill=0.75)
    first = engine.submit(Request(num_images=5, steps=2))
    for seed in range(3):
        engine.submit(Request(num_images=4, steps=2, seed=seed))
    with engine:
        assert first.result(60).samples.shape[0] == 5
    assert model.calls == [8, 8] + [8, 8] + [4, 4], "it alone, then two others, then the last"


@pytest.fixture
def held():
    """An engine of two places whose model waits: one request is in the model, nothing else has begun."""
    model = Scripted()
    model.gate.clear()
    engine = engine_of(model, max_batch=2, max_queue=3)
    engine.start()
    running = engine.submit(Request(steps=5))
    assert model.reached.wait(60)
    yield engine, model, running
    model.gate.set()
    engine.close(drain=False)


def test_more_than_may_wait_is_refused_with_the_time_to_come_back(held):
    engine, model, running = held
    taken = [engine.submit(Request(seed=seed, steps=5)) for seed in range(3)]
    with pytest.raises(Overloaded, match=r"3 requests are waiting, and no more may \(max_queue\)") as refused:
        engine.submit(Request(steps=5))
    assert refused.value.retry_after >= 1
    assert engine.load() == {"waiting": 3, "running": 1}
    model.gate.set()
    assert all(one.result(60).samples.shape == (1, *SHAPE) for one in [running, *taken])
    assert engine.statistics.outcomes == {"completed": 4, "overloaded": 1}


def test_the_time_of_a_place_is_that_in_full_batches_whatever_came_before():
    """An hour of single requests does not tell how long a queue takes."""
    statistics = Statistics(2)
    for _ in range(1000):
        statistics.count_step(np.zeros(1, np.int64), 0, 0.010, 1.0)
    assert statistics.seconds_per_row == pytest.approx(0.010)
    for _ in range(100):
        statistics.count_step(np.ones(32, np.int64), 4, 0.064, 2.0)
    assert statistics.seconds_per_row == pytest.approx(0.002, rel=0.05)
    assert (statistics.rows, statistics.padding, statistics.expert_rows.tolist()) == (4200, 400, [1000, 3200])


def test_images_that_memory_has_no_room_for_are_refused():
    engine = engine_of(Scripted(), max_memory=4 * 64 * 6 * 5)
    engine.submit(Request(num_images=4, steps=2))
    with pytest.raises(Overloaded, match=r"4 images are waiting or being drawn, and at most 5 may \(max_memory\)"):
        engine.submit(Request(num_images=2, steps=2))
    engine.submit(Request(num_images=1, steps=2))
    engine.close()
    small = engine_of(Scripted(), max_memory=4 * 64 * 6 * 3)
    with pytest.raises(ValueError, match=r"num_images: got 4; expected at most 3, .* \(max_memory\)"):
        small.submit(Request(num_images=4, steps=2))  # never, so it is not told to come back


def test_a_request_that_is_given_up_leaves_at_the_next_step_waiting_or_running(held):
    engine, model, running = held
    waiting, other = engine.submit(Request(steps=5)), engine.submit(Request(seed=1, steps=3))
    for one in (running, waiting):
        one.cancel()
        one.cancel()
    model.gate.set()
    for one in (running, waiting):
        with pytest.raises(Cancelled, match="given up"):
            one.result(60)
    assert other.result(60).samples.isfinite().all()
    other.cancel()  # too late, and no harm
    assert model.calls == [1] * 4, "one step with the first, three with the last"
    assert engine.load() == {"waiting": 0, "running": 0}


def test_a_request_whose_time_is_over_fails_and_says_how_far_it_was(held):
    engine, model, running = held
    late = engine.submit(Request(steps=5, timeout=0.05))
    time.sleep(0.1)
    model.gate.set()
    with pytest.raises(Expired, match=r"0 of 5 steps were done when the 0\.05 s of the request were over"):
        late.result(60)
    assert isinstance(running.result(60), Result)


def test_a_step_that_runs_out_of_memory_fails_its_requests_and_halves_the_batch():
    def before(call: int, rows: int) -> None:
        if rows > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = Scripted(before)
    engine = engine_of(model)
    first = [engine.submit(Request(seed=seed, steps=3)) for seed in range(4)]
    later = [engine.submit(Request(seed=seed, steps=3)) for seed in range(4, 7)]
    with engine:
        for one in first:
            with pytest.raises(OutOfMemory, match="4 places ran out of memory, and batches are smaller for a while"):
                one.result(60)
        assert all(one.result(60).samples.isfinite().all() for one in later)
        assert engine.places == 2 and model.calls[0] == 4 and max(model.calls[1:]) == 2
        with pytest.raises(OutOfMemory, match="needs 3 places in a batch; since memory ran out there are 2"):
            engine.submit(Request(num_images=3, steps=3))
    assert engine.statistics.failed_steps == 1
    assert engine.statistics.outcomes == {"completed": 3, "out_of_memory": 5}


def test_batches_are_not_padded_to_what_memory_ran_out_for():
    def before(call: int, rows: int) -> None:
        if rows > 3:
            raise RuntimeError("CUDA out of memory")

    model = Scripted(before)
    engine = engine_of(model, max_batch=8, sizes=(6,))
    lost = [engine.submit(Request(seed=seed, steps=3)) for seed in range(4)]
    with engine:
        for one in lost:
            with pytest.raises(OutOfMemory, match="a step of 4 places ran out of memory"):
                one.result(60)
        for images in (2, 1):
            assert engine.submit(Request(num_images=images, steps=2)).result(60).samples.isfinite().all()
    assert model.calls == [6, 2, 2, 1, 1] and engine.places == 2


def test_memory_that_runs_out_while_batches_are_changed_halves_the_batch_too(monkeypatch):
    """Two batches are lost then: more places than one may have."""
    model = Scripted(lambda call, rows: time.sleep(0.01))
    engine = engine_of(model, policy=Policy("shortest", patience=1000.0))
    begin = engine._begin

    def failing(live: LiveRequest) -> None:
        if live.request.seed == 1:
            raise MemoryError
        begin(live)

    monkeypatch.setattr(engine, "_begin", failing)
    with engine:
        long = engine.submit(Request(num_images=4, steps=40))
        assert model.reached.wait(60)
        short = engine.submit(Request(num_images=4, steps=2, seed=1))
        for one in (long, short):
            with pytest.raises(OutOfMemory, match="a step of 4 places ran out of memory"):
                one.result(60)
        assert engine.places == 2


def test_batches_grow_again_a_while_after_memory_ran_out_and_later_each_time():
    places = Places(12)
    places.shrink(rows=12, now=0.0)
    seen = []
    for now in (0.0, 59.0, 60.0, 1000.0):
        places.grow(now)
        seen.append(places.count)
    assert seen == [6, 6, 12, 12]
    places.shrink(rows=8, now=1000.0)
    places.shrink(rows=3, now=1001.0)  # waits: 120 s, then 240 s
    seen = []
    for now in (1240.0, 1241.0, 1480.0, 1481.0, 1721.0, 1961.0):
        places.grow(now)
        seen.append(places.count)
    assert seen == [1, 2, 2, 4, 8, 12]
    for hour in range(20):
        places.shrink(rows=2, now=hour * 10_000.0)
    places.grow(19 * 10_000.0 + 3600)
    assert places.count == 2, "an hour is the longest wait"


def test_an_engine_takes_large_requests_again_when_batches_have_grown():
    def before(call: int, rows: int) -> None:
        if call == 1:
            raise MemoryError

    with engine_of(Scripted(before)) as engine:
        with pytest.raises(OutOfMemory):
            engine.submit(Request(num_images=4, steps=2)).result(60)
        with pytest.raises(OutOfMemory):
            engine.submit(Request(num_images=4, steps=2))
        engine._places._grows_at = time.monotonic()
        assert engine.submit(Request(num_images=4, steps=2)).result(60).samples.shape[0] == 4
        assert engine.places == 4


def test_a_request_that_waited_and_is_too_large_since_memory_ran_out_fails():
    def before(call: int, rows: int) -> None:
        if call == 1:
            raise MemoryError

    engine = engine_of(Scripted(before))
    first, large, small = (engine.submit(Request(num_images=n, steps=2)) for n in (4, 4, 1))
    with engine:
        for one in (first, large):
            with pytest.raises(StepFailed):
                one.result(60)
        assert small.result(60).samples.shape[0] == 1


def test_any_other_error_in_a_step_fails_its_requests_alone():
    def before(call: int, rows: int) -> None:
        if call == 2:
            raise ZeroDivisionError("by design\nwith details")

    model = Scripted(before)
    engine = engine_of(model, max_batch=2)
    first = [engine.submit(Request(seed=seed, steps=3)) for seed in range(2)]
    later = engine.submit(Request(seed=2, steps=3))
    with engine:
        for one in first:
            with pytest.raises(StepFailed, match="^a step raised ZeroDivisionError: by design$"):
                one.result(60)
        assert later.result(60).samples.isfinite().all() and engine.places == 2


def test_images_that_are_no_numbers_are_an_error():
    class Diverging(Scripted):
        def forward(self, x, t):
            return super().forward(x, t) * float("nan")

    with engine_of(Diverging()) as engine, pytest.raises(Diverged, match="infinities or NaN"):
        engine.submit(Request(steps=2)).result(60)


def test_a_preempted_request_goes_on_where_it_was():
    """Short requests come while a long one runs; its images are those of an engine of its own."""
    for sampler in ("ddpm", "dpm++2m"):
        request = Request(steps=20, sampler=sampler, seed=3)
        with engine_of(Scripted()) as engine:
            expected = engine.submit(request).result(60).samples
        policy = Policy("shortest", patience=1000.0)
        model = Scripted(lambda call, rows: time.sleep(0.02))
        with engine_of(model, max_batch=1, policy=policy) as engine:
            long = engine.submit(request)
            order = []
            for seed in range(3):
                time.sleep(0.01)
                order.append(engine.submit(Request(seed=seed, steps=2)).result(60))
                assert not long.done()
            assert torch.equal(long.result(60).samples, expected)


def test_closing_finishes_what_is_live_and_takes_nothing_new(held):
    engine, model, running = held
    waiting = engine.submit(Request(steps=2))
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_for(lambda: not engine.is_running)
    with pytest.raises(EngineClosed, match="shutting down"):
        engine.submit(Request(steps=2))
    model.gate.set()
    assert all(isinstance(one.result(60), Result) for one in (running, waiting))
    closing.join(60)
    assert not closing.is_alive()


def test_closing_without_draining_fails_what_is_live_with_a_reason(held):
    engine, model, running = held
    waiting = engine.submit(Request(steps=2))
    model.before = lambda call, rows: time.sleep(0.2)
    model.gate.set()
    engine.close(drain=False)
    for one in (running, waiting):
        with pytest.raises(EngineClosed, match="closed before the images were done"):
            one.result(0)


def test_a_close_that_takes_too_long_fails_what_is_left():
    engine = engine_of(Scripted(lambda call, rows: time.sleep(0.02)))
    with engine:
        slow = engine.submit(Request(steps=40))
        engine.close(timeout=0.1)
        with pytest.raises(EngineClosed):
            slow.result(0)


def test_an_engine_that_was_never_started_fails_its_requests_when_it_is_closed():
    engine = engine_of(Scripted())
    never = engine.submit(Request(steps=2))
    engine.close()
    with pytest.raises(EngineClosed, match="before it was started"):
        never.result(0)


def test_previews_come_every_k_steps_and_end_with_the_request():
    with engine_of(Scripted()) as engine:
        generation = engine.submit(Request(num_images=2, steps=7, preview_every=3))
        previews = list(generation.previews())
        assert [(p.step, p.steps) for p in previews] == [(3, 7), (6, 7)]
        assert all(p.images.dtype == torch.uint8 and p.images.shape == (2, *SHAPE) for p in previews)
        assert list(generation.previews()) == previews[-1:]  # whoever comes late sees the last one


def test_asyncio_callers_await_stream_and_give_up():
    model = Scripted(lambda call, rows: time.sleep(0.01))

    async def main(engine: Engine) -> None:
        results = await asyncio.gather(*(engine.generate(Request(seed=seed, steps=4)) for seed in range(6)))
        assert len({result.samples.sum().item() for result in results}) == 6
        events = [event async for event in engine.stream(Request(steps=6, preview_every=2))]
        assert [getattr(event, "step", None) for event in events] == [2, 4, None]
        assert isinstance(events[-1], Result)

        task = asyncio.create_task(engine.generate(Request(steps=40)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = engine.stream(Request(steps=40, preview_every=1))
        assert isinstance(await anext(stream), Preview)
        await stream.aclose()
        while engine.load() != {"waiting": 0, "running": 0}:
            await asyncio.sleep(0.005)
        with pytest.raises(Expired):
            await engine.generate(Request(steps=40, timeout=0.001))

    with engine_of(model) as engine:
        asyncio.run(asyncio.wait_for(main(engine), 60))
    assert engine.statistics.outcomes == {"completed": 7, "cancelled": 2, "expired": 1}


def test_previews_that_nobody_reads_are_not_kept():
    with engine_of(Scripted()) as engine:
        generation = engine.submit(Request(steps=40, preview_every=1))
        unread = generation.previews()
        generation.result(60)
    steps = [preview.step for preview in unread]
    assert len(steps) <= 16 and steps == sorted(steps) and steps[-1] == 39


def test_a_batch_that_cannot_be_composed_fails_its_requests_alone(monkeypatch):
    engine = engine_of(Scripted())
    begin, calls = engine._begin, []

    def failing(live: LiveRequest) -> None:
        calls.append(live)
        if len(calls) == 1:
            raise TypeError("by design")
        begin(live)

    monkeypatch.setattr(engine, "_begin", failing)
    with engine:
        with pytest.raises(StepFailed, match="TypeError: by design"):
            engine.submit(Request(steps=2)).result(60)
        assert engine.submit(Request(steps=2)).result(60).samples.isfinite().all()


@pytest.fixture(scope="module")
def guided_engine() -> Engine:
    return Engine(experts(), process(), SHAPE, max_batch=4, classes=CLASSES, num_classes=6, null_class=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_images": 0}, "num_images: got 0; expected at least 1"),
        ({"num_images": 5}, "num_images: got 5; expected at most 4"),
        ({"num_images": 3, "guidance_scale": 2.0}, "num_images: got 3; expected at most 2 with guidance"),
        ({"seed": -1}, "seed: got -1"),
        ({"steps": 0}, "steps: got 0; expected an integer from 1 to 40"),
        ({"steps": 41}, "steps: got 41; expected an integer from 1 to 40"),
        ({"sampler": "euler"}, "sampler: got 'euler'"),
        ({"eta": -1.0}, "eta: got -1.0"),
        ({"label": 5}, "label: got 5; expected classes that the model was trained on: 0 to 4"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0"),
        ({"guidance_scale": [1.0, 2.0]}, "expected one number, or 4 of them: one per group from low to high timesteps"),
        ({"guidance_scale": [1.0, 2.0, 1.0, "2"]}, "expected a number, or a list of one for each group"),
        ({"guidance_scale": [1.0, 2.0, 1.0, -2.0]}, "expected a number from 0 to 1000, or one for each group"),
        ({"num_images": 3, "guidance_scale": [1, 1, 1, 2]}, "num_images: got 3; expected at most 2 with guidance"),
        ({"preview_every": -1}, "preview_every: got -1"),
        ({"timeout": 0.0}, "timeout: got 0.0"),
        ({"num_images": 2.0}, "num_images: got 2.0; expected an integer"),
        ({"num_images": True}, "num_images: got True; expected an integer"),
        ({"seed": 1.5}, "seed: got 1.5; expected an integer"),
        ({"steps": None}, "steps: got None; expected an integer"),
        ({"label": 1.0}, "label: got 1.0; expected an integer"),
        ({"timeout": "3"}, "timeout: got '3'; expected a number"),
        ({"eta": None}, "eta: got None; expected a number"),
        ({"eta": float("inf")}, "eta: got inf; expected a number from 0 to 1000"),
        ({"eta": 1e200}, r"eta: got 1e\+200; expected a number from 0 to 1000"),
        ({"eta": 10**400}, "eta: got an integer of 1329 bits; expected a number"),
        ({"timeout": 10**400}, "timeout: got an integer of 1329 bits; expected a number"),
        ({"sampler": ["ddim"]}, "sampler: got .'ddim'.; expected the name of a sampler"),
    ],
)
def test_what_a_model_or_an_engine_cannot_serve_is_refused_by_the_name_of_the_field(guided_engine, fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        guided_engine.submit(Request(**{"steps": 4, **fields}))
    assert guided_engine.load()["waiting"] == 0


def test_classes_and_guidance_of_a_model_that_has_none_are_refused():
    engine = engine_of(Scripted())
    with pytest.raises(ValueError, match="label: got 1; expected none"):
        engine.submit(Request(label=1, steps=2))
    with pytest.raises(ValueError, match=r"guidance_scale: got 2\.0; expected 1, as the model has no classes"):
        engine.submit(Request(guidance_scale=2.0, steps=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: got 0"),
        ({"max_batch": 2.5}, "max_batch: got 2.5; expected an integer"),
        ({"max_batch": "4"}, "max_batch: got '4'; expected an integer"),
        ({"sizes": "ab"}, "sizes: got 'ab'"),
        ({"max_queue": 0}, "max_queue: got 0"),
        ({"max_memory": 0}, "max_memory: got 0"),
        ({"max_memory": 4 * 64 * 6 - 1}, "max_memory: got 1535; expected at least 1536 bytes, for one image"),
        ({"sizes": (4, 2)}, "sizes: got"),
        ({"sizes": (0, 2)}, "sizes: got"),
        ({"sizes": (2, 8)}, r"sizes: got \(2, 8\); expected increasing sizes from 1 to 4 \(max_batch\)"),
        ({"min_fill": 2}, "min_fill: got 2"),
        ({"null_class": 0}, "null_class: got 0; expected none"),
    ],
)
def test_options_that_make_no_engine_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(Scripted(), **options)


def test_an_engine_that_was_closed_does_not_start_again():
    engine = engine_of(Scripted())
    with engine:
        pass
    with pytest.raises(EngineClosed, match="make another one"):
        engine.start()


def test_threads_that_start_an_engine_at_once_start_one_thread(monkeypatch):
    made = []

    class Slow(threading.Thread):
        def __init__(self, **options):
            time.sleep(0.02)
            super().__init__(**options)
            made.append(self)

    with engine_of(Scripted()) as other:
        one = engine_of(Scripted())
        monkeypatch.setattr("tdc_fast.serving.engine.threading.Thread", Slow)
        starters = [type(other._thread)(target=one.start) for _ in range(3)]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
        one.close()
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_engine_that_was_started_before_a_fork_refuses_what_comes_after_it():
    with engine_of(Scripted()) as engine:
        child = os.fork()
        if not child:
            try:
                engine.submit(Request(steps=2))
            except EngineClosed as error:
                os._exit("before this process was forked" in str(error))
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert engine.submit(Request(steps=2)).result(60).samples.shape == (1, *SHAPE)


def test_statistics_add_up():
    with engine_of(Scripted()) as engine:
        sizes = itertools.product((1, 3), (2, 5))
        for one in [engine.submit(Request(num_images=images, steps=steps)) for images, steps in sizes]:
            one.result(60)
    s = engine.statistics
    assert s.images == 8 and s.rows == 4 * (2 + 5) == s.expert_rows[0]
    assert s.step_seconds.cumulative()[-1] == s.steps
    assert s.latency_seconds.cumulative()[-1] == s.waiting_seconds.cumulative()[-1] == 4
    assert 0 < s.forward_seconds < s.step_seconds.total
    assert isinstance(EngineClosed("x"), RequestFailed)


def test_a_listener_that_is_slow_misses_previews_and_not_the_result():
    async def main(engine: Engine) -> list:
        stream = engine.stream(Request(steps=40, preview_every=1))
        events = [await anext(stream)]
        while engine.load()["running"]:
            await asyncio.sleep(0.005)
        return events + [event async for event in stream]

    with engine_of(Scripted()) as engine:
        events = asyncio.run(asyncio.wait_for(main(engine), 60))
    steps = [event.step for event in events[:-1]]
    assert len(steps) <= 18 and steps == sorted(steps) and steps[-1] == 39 and isinstance(events[-1], Result)


def test_a_model_that_fails_before_the_first_request_fails_the_start(monkeypatch):
    engine = engine_of(Scripted())
    monkeypatch.setattr(engine._stepper, "warm_up", lambda: 1 / 0)
    early = engine.submit(Request(steps=2))
    with pytest.raises(ZeroDivisionError):
        engine.start()
    with pytest.raises(EngineClosed, match="the engine could not start: ZeroDivisionError"):
        early.result(0)
    with pytest.raises(EngineClosed):
        engine.submit(Request(steps=2))
    engine.close()
