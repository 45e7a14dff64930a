"""The engine: requests join at any step, a step is one forward of all that takes part, one thread owns the model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.data.autoencoder import LatentDecoder
from tdc_fast.data.pixels import to_uint8
from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.protocols import Denoiser
from tdc_fast.errors import integer, invalid, is_integer, is_out_of_memory
from tdc_fast.evaluation.conditions import draw_labels, other_classes
from tdc_fast.evaluation.samples import check_decoder
from tdc_fast.nn.one_expert import as_one_expert
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.serving.admission import Admission, too_large
from tdc_fast.serving.batch import Batch
from tdc_fast.serving.failures import (
    Cancelled,
    Diverged,
    EngineClosed,
    Expired,
    OutOfMemory,
    RequestFailed,
    StepFailed,
)
from tdc_fast.serving.generation import Generation
from tdc_fast.serving.live import LiveRequest
from tdc_fast.serving.places import Places
from tdc_fast.serving.policy import Policy
from tdc_fast.serving.request import Preview, Request, Result
from tdc_fast.serving.statistics import Statistics
from tdc_fast.serving.stepper import Stepper


class Engine:
    """Draws the images of many requests at once, one denoising step of all of them at a time.

    Between two steps requests join, leave, are given up or expire. A request's images are those that
    `tdc_fast.sample` draws with the same seed, sampler and steps in one batch, bit for bit on the CPU, whatever else is
    in the engine. Use it as a context manager, or call `close`.

    Args:
        model: the denoiser, called as model(x, t), or model(x, t, y=labels) where there are classes. A module is put
            into evaluation mode and stays in it.
        diffusion: its process.
        image_shape: (C, H, W).
        max_batch: places in a batch: images, a guided one counting twice. It is also the most that a request may ask
            for.
        classes: the classes that may be asked for; () for an unconditional model.
        num_classes: rows of the model's label embedding.
        null_class: the label that the model was trained with where it got no class; guidance needs it. Scales by group
            are for the groups of a packed model.
        policy: who goes first when not all fit.
        max_queue: requests that may wait for their first step.
        max_memory: bytes that the images of all live requests may take, besides the model's own memory; at least one
            image.
        sizes: sizes of batches; a batch is padded to the next one, unless that has more places than there are since
            memory ran out. () takes every size as it is, and where steps are CUDA graphs 1, 2, 3, 4, 6, 8, 12, 16, 24,
            and so on.
        min_fill: where a batch would fill less of its size than this, the last requests wait and the next smaller size
            is filled; 0 for never.
        deterministic: run a single denoiser on the routed kernels, so that its images do not depend on the batch
            either. A packed model's never do.
        clip_denoised: limit every predicted image to [-1, 1].
        decoder: makes images of the latents that the model draws; no step is taken meanwhile. `max_memory` does not
            count them.

    Attributes:
        statistics: what has been done.
        max_batch: as given.
        image_shape: (C, H, W) of a request's images.
        classes: as given.
        diffusion: as given.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        model: Denoiser,
        diffusion: Diffusion,
        image_shape: tuple[int, int, int],
        *,
        max_batch: int = 32,
        classes: Sequence[int] = (),
        num_classes: int = 0,
        null_class: int | None = None,
        policy: Policy | None = None,
        max_queue: int = 256,
        max_memory: int = 2**30,
        sizes: Sequence[int] = (),
        min_fill: float = 0.9,
        deterministic: bool = True,
        clip_denoised: bool = True,
        decoder: LatentDecoder | None = None,
    ) -> None:
        max_batch, max_queue = integer("max_batch", max_batch), integer("max_queue", max_queue)
        max_memory = integer("max_memory", max_memory, 1, 2**63 - 1)
        if isinstance(sizes, str) or not all(map(is_integer, sizes)):
            raise invalid("sizes", sizes, f"increasing integers from 1 to {max_batch} (max_batch)")
        sizes = tuple(map(int, sizes))
        if list(sizes) != sorted(set(sizes)) or (sizes and not 1 <= sizes[0] <= sizes[-1] <= max_batch):
            raise invalid("sizes", sizes, f"increasing sizes from 1 to {max_batch} (max_batch)")
        if not 0 <= min_fill <= 1:
            raise invalid("min_fill", min_fill, "a share from 0 to 1")
        diffusion.check_groups(model)
        device = torch.device("cpu")
        if isinstance(model, nn.Module):
            device = next((parameter.device for parameter in model.parameters()), device)
            is_packed = isinstance(getattr(model, "groups", None), TimestepGroups)
            if deterministic and not is_packed and not getattr(model, "on_routed_kernels", False):
                model = as_one_expert(model, diffusion.original_num_timesteps)
            model.eval()
        groups = getattr(model, "groups", None)
        groups = groups if isinstance(groups, TimestepGroups) else None
        self._admission = Admission(
            diffusion, groups, image_shape, max_batch,
            classes=classes, num_classes=num_classes, null_class=null_class, max_queue=max_queue, max_memory=max_memory,
        )  # fmt: skip
        self.image_shape = image_shape if decoder is None else decoder.image_shape
        self.max_batch, self.classes, self._decoder = max_batch, tuple(classes), decoder
        self.diffusion = diffusion
        self._null_class, self._policy, self._min_fill = null_class, policy or Policy(), min_fill
        self._stepper = Stepper(
            model, diffusion, image_shape, device,
            sizes=sizes, max_batch=max_batch, has_classes=bool(classes), clip_denoised=clip_denoised,
        )  # fmt: skip
        self.statistics = Statistics(1 if groups is None else groups.num_groups)
        # What callers and the engine's thread share:
        self._changed = threading.Condition()
        self._live: list[LiveRequest] = []
        self._closing = self._abandon = False
        self._is_dirty = False
        self._number = 0
        self._places = Places(max_batch)
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._failure: Exception | None = None

    @classmethod
    def of(cls, denoiser: TrainedDenoiser, **options: Any) -> Engine:
        """An engine for a trained denoiser.

        Args:
            denoiser: the denoiser.
            **options: as those of `Engine`; without `null_class` it is the label that the denoiser was trained with.
                Latents are never clipped.

        Raises:
            ValueError: it draws latents and there is no decoder, or the other way round.
        """
        check_decoder(denoiser, "a decoder" if options.get("decoder") else "")
        if denoiser.latents is not None:
            options["clip_denoised"] = False
        if options.get("null_class") is None:
            options["null_class"] = denoiser.null_class
        return cls(
            denoiser.model,
            denoiser.diffusion,
            denoiser.image_shape,
            classes=other_classes(denoiser.classes, options["null_class"]),
            num_classes=denoiser.num_classes,
            **options,
        )

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    def start(self) -> None:
        """Start the thread that runs the model; returns once steps that are CUDA graphs have been captured.

        Raises:
            EngineClosed: the engine was closed before; make another one.
            Exception: what the model raised meanwhile; the engine is closed then.
        """
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was closed and cannot start again: make another one")
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="tdc_fast engine", daemon=True)
                thread.start()
                self._thread = thread
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Accept no more requests and end the thread.

        Args:
            drain: finish what is live; False fails it with `EngineClosed`.
            timeout: seconds to wait for what is live; what is left then fails.
        """
        with self._changed:
            self._closing = True
            self._abandon |= not drain or self._thread is None
            self._changed.notify_all()
        if self._thread is None:
            self._end_all(EngineClosed("the engine was closed before it was started"))
            return
        self._thread.join(timeout)
        with self._changed:
            self._abandon = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, request: Request) -> Generation:
        """Submit a request; from any thread.

        Raises:
            ValueError: naming the field of the request that the model or the engine cannot serve.
            Overloaded: too much is waiting already.
            EngineClosed: the engine takes no more requests, or was started before this process was forked.
        """
        if self._thread is not None and not (self._closing or self._thread.is_alive()):
            # A fork copies neither the thread nor a lock that it may hold.
            raise EngineClosed("the engine was started before this process was forked: start one in this process")
        plan = self._admission.check(request)
        with self._changed:
            try:
                if self._closing:
                    raise EngineClosed("the engine is shutting down and takes no more requests")
                self._places.grow(time.monotonic())
                self._admission.refuse_excess(request, self._live, self.places, self.statistics.seconds_per_row)
            except RequestFailed as failure:
                self._count(failure.reason)
                raise
            live = LiveRequest(request, plan, self._number, self.statistics.steps)
            live.generation = generation = Generation(request, lambda: self._give_up(live))
            self._number += 1
            self._live.append(live)
            self._is_dirty = True
            self._changed.notify_all()
        return generation

    async def generate(self, request: Request) -> Result:
        """Draw images from an event loop; cancelling the caller cancels the request.

        Raises:
            ValueError: as `submit`.
            RequestFailed: there are no images; the exception's class says why.
        """
        return await self.submit(request).wait()

    def stream(self, request: Request) -> AsyncIterator[Preview | Result]:
        """Previews and then the result, in an event loop; if the caller stops listening, the request is cancelled.

        The request is handed over at once. Whoever never begins to listen does not give it up: it ends by itself.

        Raises:
            ValueError: as `submit`, which is called at once.
            RequestFailed: as `generate`.
        """
        return self.submit(request).stream()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def places(self) -> int:
        """Places in a batch now: `max_batch`, or fewer for a while after memory ran out."""
        return self._places.count

    def load(self) -> dict[str, int]:
        """Requests that wait for their first step, and those that have begun."""
        with self._changed:
            waiting = sum(live.started is None for live in self._live)
            return {"waiting": waiting, "running": len(self._live) - waiting}

    def _give_up(self, live: LiveRequest) -> None:
        with self._changed:
            live.given_up = True
            self._is_dirty = True
            self._changed.notify_all()

    # What follows runs in the engine's thread.

    @torch.no_grad()
    def _work(self) -> None:
        batch: Batch | None = None
        try:
            if self._stepper.device.type == "cuda":
                torch.cuda.set_device(self._stepper.device)  # of this thread
            self._stepper.warm_up()
        except Exception as error:
            self._failure = error
            self._end_all(EngineClosed(f"the engine could not start: {type(error).__name__}: {error}"))
            return
        finally:
            self._ready.set()
        try:
            while True:
                with self._changed:
                    while not (self._live or self._closing):
                        batch = None
                        self._changed.wait()
                    if self._abandon or not self._live:
                        break
                began = time.perf_counter()
                batch = self._compose(batch, time.monotonic())
                if batch is not None:
                    batch = self._step(batch, began)
            self._end_all(EngineClosed("the engine was closed before the images were done"))
        except BaseException as error:
            self._end_all(EngineClosed(f"the engine has stopped: {type(error).__name__}: {error}"))
            raise

    def _compose(self, batch: Batch | None, now: float) -> Batch | None:
        """The batch of the next step; None if nobody is left."""
        with self._changed:
            live, is_dirty, self._is_dirty = list(self._live), self._is_dirty, False
            self._places.grow(now)
        if now >= min((one.deadline for one in live), default=math.inf) or is_dirty:
            for one in live:
                if one.given_up:
                    self._end(one, Cancelled("the request was given up"))
                elif now >= one.deadline:
                    self._end(one, Expired(_expired(one)))
                elif one.most_rows > self.places:
                    self._end(one, too_large(one.most_rows, self.places))
            with self._changed:
                live = list(self._live)
        elif batch is not None and batch.left and len(batch.lives) == len(live):
            return batch
        chosen = self._policy.choose_filled(live, self.places, self._stepper.sizes, self._min_fill)
        if not chosen:
            return None
        if batch is not None and batch.left and set(chosen) == set(batch.lives):
            return batch
        try:
            return Batch(self._stepper, chosen, batch, self._begin, self._null_class, self.places)
        except Exception as error:
            lost = set(chosen) | set(batch.lives if batch is not None else ())  # their images were on the move
            self._survive(error, [one for one in live if one in lost])
            return None

    def _begin(self, live: LiveRequest) -> None:
        """What `tdc_fast.sample` draws first: the labels."""
        live.generator = torch.Generator().manual_seed(live.request.seed)
        if self.classes:
            allowed = self.classes if live.request.label is None else (live.request.label,)
            live.labels = draw_labels(allowed, live.request.num_images, live.generator)

    def _step(self, batch: Batch, began: float) -> Batch | None:
        """Take a step, hand previews and images out, and count; None where the batch is lost."""
        try:
            batch.step()
            for live in batch.lives if batch.has_previews or not batch.left else ():
                if not live.remaining:
                    self._finish(live, batch)
                elif live.request.preview_every and live.position % live.request.preview_every == 0:
                    images = to_uint8(self._decoded(batch.predicted(live)))
                    live.generation.show(Preview(live.position, live.plan.timesteps.size, images))
        except Exception as error:
            self._survive(error, batch.lives)
            return None
        statistics = self.statistics
        with statistics.lock:
            seconds = time.perf_counter() - began
            statistics.count_step(batch.expert_rows, batch.padding, seconds, self._stepper.forward_seconds)
        return batch

    def _finish(self, live: LiveRequest, batch: Batch) -> None:
        samples = self._decoded(batch.images(live))
        if not samples.isfinite().all():
            self._end(live, Diverged("the images hold infinities or NaN: the weights or the guidance diverge"))
            return
        now = time.monotonic()
        assert live.started is not None
        result = Result(samples, live.labels, live.started - live.submitted, now - live.submitted)
        self._end(live, result)

    def _decoded(self, drawn: Tensor) -> Tensor:
        return drawn if self._decoder is None else self._decoder(drawn).cpu()

    def _survive(self, error: Exception, lives: Sequence[LiveRequest]) -> None:
        """After a step that raised: its requests fail, and where memory ran out, batches get smaller for a while."""
        what = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
        kind = OutOfMemory if is_out_of_memory(error) else StepFailed
        if kind is OutOfMemory:
            rows = min(sum(live.rows for live in lives), self.places)  # more are lost where batches were changed
            with self._changed:
                self._places.shrink(rows, time.monotonic())
                self._is_dirty = True
            what = f"a step of {rows} places ran out of memory, and batches are smaller for a while; ask again ({what})"
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
        else:
            what = f"a step raised {what}"
        with self.statistics.lock:
            self.statistics.failed_steps += 1
        for live in lives:
            if not live.generation.done():
                self._end(live, kind(what))

    def _end(self, live: LiveRequest, outcome: Result | RequestFailed) -> None:
        """Take a request out, count how it ended, and tell its caller."""
        with self._changed:
            self._live.remove(live)
            self._is_dirty = True
        with self.statistics.lock:
            if isinstance(outcome, Result):
                self.statistics.images += live.request.num_images
                self.statistics.latency_seconds.add(outcome.took)
                self.statistics.waiting_seconds.add(outcome.waited)
        self._count("completed" if isinstance(outcome, Result) else outcome.reason)
        live.generation.finish(outcome)

    def _end_all(self, failure: EngineClosed) -> None:
        with self._changed:
            self._closing = True
            lives = list(self._live)
        for live in lives:
            self._end(live, failure)

    def _count(self, outcome: str) -> None:
        with self.statistics.lock:
            self.statistics.outcomes[outcome] += 1


def _expired(live: LiveRequest) -> str:
    steps = live.plan.timesteps.size
    return f"{live.position} of {steps} steps were done when the {live.request.timeout:g} s of the request were over"
