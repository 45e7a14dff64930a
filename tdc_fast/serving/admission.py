"""Which requests an engine takes: their values, the steps they ask for, and whether there is room."""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.errors import invalid, is_integer
from tdc_fast.evaluation.conditions import check_class, check_guidance
from tdc_fast.routing import TimestepGroups
from tdc_fast.serving.failures import OutOfMemory, Overloaded
from tdc_fast.serving.live import LiveRequest, Plan, rows_of
from tdc_fast.serving.request import Request

_COPIES_PER_IMAGE = 6
"""Tensors of an image's size that a live request may keep: x, x0, noise, and their copies while batches change."""
_MAX_PLANS = 64
_MAX_ETA = 1000


def bytes_per_image(image_shape: tuple[int, int, int]) -> int:
    """Memory that an image (C, H, W) of a live request may take, in bytes."""
    return 4 * math.prod(image_shape) * _COPIES_PER_IMAGE


class Admission:
    """Checks requests; arguments as those of `Engine`. May be called from any thread."""

    def __init__(
        self,
        diffusion: Diffusion,
        groups: TimestepGroups | None,
        image_shape: tuple[int, int, int],
        max_batch: int,
        *,
        classes: Sequence[int],
        num_classes: int,
        null_class: int | None,
        max_queue: int,
        max_memory: int,
    ) -> None:
        if null_class is not None:
            check_guidance(1.0, null_class, num_classes)
        self._diffusion, self._groups, self._max_batch = diffusion, groups, max_batch
        self._classes, self._num_classes, self._null_class = tuple(classes), num_classes, null_class
        self._max_queue = max_queue
        least = bytes_per_image(image_shape)
        if max_memory < least:
            raise invalid("max_memory", max_memory, f"at least {least} bytes, for one image")
        self._most_images = max_memory // least
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, request: Request) -> Plan:
        """The steps of a request.

        Raises:
            ValueError: naming the field that the model or the engine cannot serve.
        """
        _check_types(request)
        if request.num_images < 1:
            raise invalid("num_images", request.num_images, "at least 1")
        if not 0 <= request.seed < 2**63:
            raise invalid("seed", request.seed, "a number from 0 to 2**63 - 1")
        check_guidance(request.guidance_scale, self._null_class, self._num_classes, self._groups)
        if request.num_images > self._most_images:
            remedy = f"at most {self._most_images}, for which there is memory (max_memory)"
            raise invalid("num_images", request.num_images, remedy)
        rows = rows_of(request)
        if rows > self._max_batch:
            most = self._max_batch * request.num_images // rows
            guided = " with guidance" if rows > request.num_images else ""
            raise invalid("num_images", request.num_images, f"at most {most}{guided}; the rest in other requests")
        if request.label is not None:
            if not self._classes:
                raise invalid("label", request.label, "none, as the model has no classes")
            check_class("label", request.label, self._classes)
        if request.preview_every < 0:
            raise invalid("preview_every", request.preview_every, "a number of steps, or 0 for no previews")
        if request.timeout is not None and not request.timeout > 0:
            raise invalid("timeout", request.timeout, "a number of seconds above 0, or none")
        return self._plan(request)

    def _plan(self, request: Request) -> Plan:
        key = (request.sampler, request.steps, request.eta)
        with self._lock:
            if key not in self._plans:
                trajectory = Trajectory.plan(self._diffusion, request.sampler, request.steps, eta=request.eta)
                self._plans[key] = Plan.of(trajectory, self._experts_of)
                if len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return self._plans[key]

    def _experts_of(self, timesteps: Tensor) -> Tensor:
        return torch.zeros_like(timesteps) if self._groups is None else self._groups.group_of(timesteps)

    def refuse_excess(self, request: Request, live: Sequence[LiveRequest], places: int, seconds_per_row: float) -> None:
        """Refuse a request that there is no room for.

        Args:
            request: what is asked for.
            live: the requests that were taken and have not ended.
            places: places in a batch now.
            seconds_per_row: time that a place takes in a step.

        Raises:
            Overloaded: too many requests wait, or too many images are held.
            OutOfMemory: after memory ran out, batches are smaller than the request.
        """
        if rows_of(request) > places:
            raise too_large(rows_of(request), places)
        waiting = sum(one.started is None for one in live)
        images = sum(one.request.num_images for one in live)
        if waiting >= self._max_queue:
            reason = f"{waiting} requests are waiting, and no more may (max_queue)"
        elif images + request.num_images > self._most_images:
            reason = f"{images} images are waiting or being drawn, and at most {self._most_images} may (max_memory)"
        else:
            return
        seconds = sum(one.work for one in live) * seconds_per_row
        raise Overloaded(f"{reason}; the work at hand takes about {max(1, round(seconds))} s", seconds / 2)


def _check_types(request: Request) -> None:
    """Refuse values that no step can be computed from: they would fail whoever shares the step."""
    for name in ("num_images", "seed", "steps", "label", "preview_every"):
        value = getattr(request, name)
        if not (is_integer(value) or (name == "label" and value is None)):
            raise invalid(name, value, "an integer")
    for name in ("eta", "timeout"):
        value = getattr(request, name)
        if not (_is_number(value) or (name == "timeout" and value is None)):
            raise invalid(name, value, "a number")
    scale = request.guidance_scale
    if not (_is_number(scale) or (isinstance(scale, list | tuple) and all(map(_is_number, scale)))):
        raise invalid("guidance_scale", scale, "a number, or a list of one for each group of timesteps")
    if not isinstance(request.sampler, str):
        raise invalid("sampler", request.sampler, "the name of a sampler")
    if request.eta > _MAX_ETA:
        raise invalid("eta", request.eta, f"a number from 0 to {_MAX_ETA}")


def _is_number(value: object) -> bool:
    """Whether it is a number in the range of floats."""
    if is_integer(value):
        return int(value).bit_length() < sys.float_info.max_exp
    return isinstance(value, float)


def too_large(rows: int, places: int) -> OutOfMemory:
    """The failure of a request that needs more places than batches have since memory ran out."""
    remedy = "Ask for fewer images"
    return OutOfMemory(f"the request needs {rows} places in a batch; since memory ran out there are {places}. {remedy}")
