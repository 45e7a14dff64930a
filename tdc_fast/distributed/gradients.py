"""Sums of gradients over the processes that train the same weights, in buckets, while the backward still runs.

It does what DistributedDataParallel does, in a form that a CUDA graph can hold from its third step on: gradients are
new tensors in every step, and the model is called through casts and kernels of its own, not by its `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.distributed.world import World, losses_named

BUCKET = 25 * 2**20
"""Bytes of a bucket, as of DistributedDataParallel: large enough for the bandwidth, small enough to begin early."""


class GradientSum:
    """Adds up the gradients of some parameters over a team of processes.

    Args:
        parameters: in the order of the model. Gradients become complete from the last to the first.
        group: the team's process group.
        world: counts the bytes.
        bucket: bytes of a bucket.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Any, world: World, bucket: int = BUCKET) -> None:
        self._group, self._world = group, world
        self._buckets: list[list[nn.Parameter]] = []
        size = bucket
        for parameter in reversed(parameters):
            if size + parameter.nbytes > bucket or self._buckets[-1][0].dtype != parameter.dtype:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        self._bucket_of = {p: number for number, members in enumerate(self._buckets) for p in members}
        self._missing: list[int] = []
        self._flying: list[tuple[Tensor, list[nn.Parameter], Any]] = []
        self._active = False
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Gradients that become complete in the block are added up; at its end all processes have the sums.

        For the last backward of a step: gradients of the microbatches before are in it already.
        """
        self._missing = [len(members) for members in self._buckets]
        self._flying, self._active = [], True
        try:
            yield
        finally:
            self._active = False
        for number in range(len(self._flying), len(self._buckets)):  # a parameter had no gradient
            self._launch(number)
        for flat, members, work in self._flying:
            with losses_named():
                work.wait()
            sums = flat.split([parameter.numel() for parameter in members])
            # A parameter that had no gradient still has none, so that the optimizer passes it over.
            found = [(p.grad, part.view(p.shape)) for p, part in zip(members, sums, strict=True) if p.grad is not None]
            if found:
                torch._foreach_copy_([grad for grad, _ in found], [part for _, part in found])
        self._flying = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        # In their order, so that all processes add up the same bucket.
        while len(self._flying) < len(self._buckets) and not self._missing[len(self._flying)]:
            self._launch(len(self._flying))

    @torch.no_grad()
    def _launch(self, number: int) -> None:
        import torch.distributed as dist

        members = self._buckets[number]
        parts = [p.grad.reshape(-1) if p.grad is not None else torch.zeros_like(p).reshape(-1) for p in members]
        flat = torch.cat(parts)
        with losses_named():
            work = dist.all_reduce(flat, group=self._group, async_op=True)
        self._world.sent["gradients"] += flat.nbytes
        self._flying.append((flat, members, work))
