"""The requests that take their steps together, and the tensors of a step: which place belongs to whom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tdc_fast.serving.live import LiveRequest
from tdc_fast.serving.stepper import Stepper

Begin = Callable[[LiveRequest], None]
_STEPS_AHEAD = 64


class Batch:
    """A composition of requests. It serves any number of steps, until one of them ends or others take part.

    Its places are the images of all requests in turn, then a second place for every guided image, where the prediction
    for no class is made, then padding up to the size of a bucket.

    Args:
        stepper: what computes the steps.
        lives: who takes part; those without a generator begin now.
        before: the batch that holds the images of some of them; what it holds of others is handed back to them.
        begin: sets generator and labels of a request whose first step comes.
        null_class: the label for no class.
        places: the most places that it may have.

    Attributes:
        lives: who takes part.
        rows: places of images and of their second halves.
        padding: places that only fill the bucket.
        left: steps until the first of them ends, or needs another number of places, and the batch ends with it.
        has_previews: some of them want previews.
        expert_rows: the expert of every row of the last step, int64 (rows,).
    """

    def __init__(
        self,
        stepper: Stepper,
        lives: Sequence[LiveRequest],
        before: Batch | None,
        begin: Begin,
        null_class: int | None,
        places: int,
    ) -> None:
        self.lives, self._stepper = tuple(lives), stepper
        counts = [live.request.num_images for live in lives]
        starts = list(itertools.accumulate(counts, initial=0))
        self._places = {live: slice(a, b) for live, (a, b) in zip(lives, itertools.pairwise(starts), strict=True)}
        images = starts[-1]
        owner = np.repeat(np.arange(len(lives)), counts)
        guided = np.flatnonzero(np.repeat([live.is_guided for live in lives], counts))
        self.rows = images + len(guided)
        size = stepper.size_for(self.rows, places)
        self.padding = size - self.rows
        filler = np.zeros(self.padding, dtype=np.int64)
        source = np.concatenate([np.arange(images), guided, filler])  # the place with the image that each place reads
        self.left = min(live.alike for live in lives)
        self.has_previews = any(live.request.preview_every for live in lives)
        self._index_plans(owner[source])
        self._x, self._last_x0 = stepper.empty(size).zero_(), stepper.empty(size).zero_()
        self._hold_images(before, begin)
        self._build_constants(source, images, guided, null_class)

    def _index_plans(self, owner: np.ndarray) -> None:
        """Lay the plans of all requests end to end, and find where each place stands in them."""
        lengths = [live.plan.timesteps.size for live in self.lives]
        offsets = np.cumsum([0, *lengths[:-1]]) + [live.position for live in self.lives]
        self._timesteps = np.concatenate([live.plan.timesteps for live in self.lives])
        self._weights = np.concatenate([live.plan.weights for live in self.lives], axis=1)
        self._experts = np.concatenate([live.plan.experts for live in self.lives])
        self._scales = np.concatenate([live.guidance for live in self.lives])
        self._standing = offsets[owner]
        self._ahead: Iterator[tuple[Tensor, Tensor, Tensor | None, np.ndarray]] = iter(())

    def _hold_images(self, before: Batch | None, begin: Begin) -> None:
        """Gather the images of all who take part; those who do not any more get theirs back."""
        held = {} if before is None else before._places
        for live, place in held.items():
            if live not in self._places and live.remaining:
                assert before is not None
                live.x = before._x[place].clone()
                live.last_x0 = before._last_x0[place].clone() if live.plan.remembers else None
        stay = [live for live in self.lives if live in held]
        if stay:
            assert before is not None
            self._take_over(before, stay)
        for live, place in self._places.items():
            if live.generator is None:
                begin(live)
                live.started = time.monotonic()
                self._x[place].copy_(torch.randn(self._x[place].shape, generator=live.generator))
            elif live not in held:
                assert live.x is not None
                self._x[place] = live.x
                if live.last_x0 is not None:
                    self._last_x0[place] = live.last_x0
                live.x = live.last_x0 = None

    def _take_over(self, before: Batch, stay: Sequence[LiveRequest]) -> None:
        """Copy the images of those who were in the batch before, all at once."""
        source, target = (
            torch.tensor([row for live in stay for row in range(places[live].start, places[live].stop)])
            for places in (before._places, self._places)
        )
        source, target = source.to(self._stepper.device), target.to(self._stepper.device)
        self._x.index_copy_(0, target, before._x.index_select(0, source))
        if any(live.plan.remembers for live in stay):
            self._last_x0.index_copy_(0, target, before._last_x0.index_select(0, source))

    def _build_constants(self, source: np.ndarray, images: int, guided: np.ndarray, null_class: int | None) -> None:
        """What stays the same from step to step."""
        device, is_static = self._stepper.device, self._stepper.is_static
        self._draws_noise = any(live.plan.draws_noise for live in self.lives)
        self._drawn = torch.zeros(self._x.shape if self._draws_noise or is_static else 0)
        self._noise_parts = [
            (self._drawn[place], live.generator) for live, place in self._places.items() if live.plan.draws_noise
        ]
        self._remembers = any(live.plan.remembers for live in self.lives)
        self._labels: Tensor | None = None
        self._partner: Tensor | None = None
        self._source: Tensor | None = None
        if is_static or len(source) > images:
            self._source = torch.from_numpy(source).to(device)
        if self.lives[0].labels is None:
            return
        labels = torch.cat([live.labels for live in self.lives if live.labels is not None])
        labels = labels[torch.from_numpy(source)]
        if len(guided):
            assert null_class is not None
            labels[images : self.rows] = null_class
        self._labels = labels.to(device)
        if is_static or len(guided):
            partner = np.arange(len(source))
            partner[guided] = np.arange(images, self.rows)
            self._partner = torch.from_numpy(partner).to(device)

    def _look_ahead(self) -> None:
        """Timesteps, weights, guidance and experts of the steps that are known: one copy for many steps."""
        steps = min(self.left, _STEPS_AHEAD)
        standing = self._standing + np.arange(steps)[:, None]  # (steps, places)
        self._standing = self._standing + steps
        # (steps, 8, places); a copy has the strides that steps are captured with, for one place too.
        weights = self._weights[:, standing].transpose(1, 0, 2).copy()
        device = self._stepper.device
        guidance: Sequence[Tensor | None] = [None] * steps
        if self._partner is not None:
            guidance = torch.from_numpy(self._scales[standing]).to(device).unbind()
        self._ahead = zip(
            torch.from_numpy(self._timesteps[standing]).to(device).unbind(),
            torch.from_numpy(weights).to(device).unbind(),
            guidance,
            self._experts[standing[:, : self.rows]],
            strict=True,
        )

    def step(self) -> None:
        """Take everyone one step."""
        coming = next(self._ahead, None)
        if coming is None:
            self._look_ahead()
            coming = next(self._ahead)
        t, weights, guidance, experts = coming
        is_static = self._stepper.is_static
        self._x, self._last_x0 = self._stepper.run(
            x=self._x,
            t=t,
            weights=weights,
            noise=self._noise() if self._draws_noise or is_static else None,
            last_x0=self._last_x0 if self._remembers or is_static else None,
            labels=self._labels,
            source=self._source,
            partner=self._partner,
            guidance=guidance,
        )
        for live in self.lives:
            live.position += 1
        self.left -= 1
        self.expert_rows = experts

    def _noise(self) -> Tensor:
        """Noise like x: what each request draws for itself, zeros elsewhere."""
        for part, generator in self._noise_parts:
            part.normal_(generator=generator)
        noise = torch.empty(self._x.shape, memory_format=torch.channels_last).copy_(self._drawn)
        if self._stepper.device.type == "cuda":
            noise = noise.pin_memory()  # so that the host goes on while the GPU works
        return noise.to(self._stepper.device, non_blocking=True)

    def images(self, live: LiveRequest) -> Tensor:
        """A copy of a request's images as they are now, on the CPU."""
        return self._x[self._places[live]].to("cpu", copy=True)

    def predicted(self, live: LiveRequest) -> Tensor:
        """A copy of a request's clean images as the last step predicted them, on the CPU."""
        return self._last_x0[self._places[live]].to("cpu", copy=True)
