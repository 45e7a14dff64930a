"""The part of every batch that one of several processes trains on.

All processes draw the timesteps, the noise and the order of the images of the whole batch, from generators in the same
state, and each keeps its own part. So a stage trains on the same samples however many processes there are, and what a
checkpoint says of generators and data does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_fast.diffusion.timestep_samplers import StratifiedSampler, TimestepSampler
from tdc_fast.distributed import GradientSum, World, losses_named
from tdc_fast.training.random_state import derived_seed


@dataclass(frozen=True)
class Portion:
    """Every `members`-th sample of the batch, or of those samples that are of some groups.

    Attributes:
        batch_size: samples of the whole batch, B.
        member: number of the process among those that share these samples.
        members: how many they are.
        groups: the groups whose samples they are; None for all samples.
    """

    batch_size: int
    member: int
    members: int
    groups: tuple[int, ...] | None = None

    def places(self, groups: np.ndarray | None) -> np.ndarray:
        """The places of the samples in the batch, ascending, int64 (b,).

        Args:
            groups: the group of each sample of the batch, (B,); None where they do not matter.
        """
        if self.groups is None:
            return np.arange(self.member, self.batch_size, self.members)
        assert groups is not None
        return np.flatnonzero(np.isin(groups, self.groups))[self.member :: self.members]

    def later(self, sampler: TimestepSampler, ahead: int) -> np.ndarray:
        """The places in a later batch as far as they can be foreseen.

        Args:
            sampler: after it has prepared the current batch.
            ahead: how many batches after the current one, at least 1.
        """
        foreseen = isinstance(sampler, StratifiedSampler) and self.groups is not None
        return self.places(sampler.groups_ahead(self.batch_size, ahead - 1) if foreseen else None)  # type: ignore[attr-defined]


class Shard:
    """What a training step does as one of several processes.

    Args:
        portion: its part of every batch.
        world: the processes.
        device: where the step runs.
        gradients: adds up the gradients of the processes with the same weights; None for weights of its own.
        group: the process group of those, for the losses that a sampler learns from; likewise.
        num_groups: N, for the experts of `portion.groups`.

    Attributes:
        generator: draws what all processes draw alike.
        experts: for each group the number of its expert in this process's model, int64 (N,); None without groups.
    """

    def __init__(
        self,
        portion: Portion,
        world: World,
        device: torch.device,
        gradients: GradientSum | None,
        group: Any = None,
        num_groups: int = 0,
    ) -> None:
        self.portion, self.world, self.gradients = portion, world, gradients
        self.generator = torch.Generator(device)
        self._group, self._device = group, device
        self.experts: Tensor | None = None
        if portion.groups is not None:
            own = torch.zeros(num_groups, dtype=torch.int64)
            own[list(portion.groups)] = torch.arange(len(portion.groups))
            self.experts = own.to(device)

    def begin_draws(self, stored: Mapping[str, Any] | None = None) -> None:
        """Let `generator` go on where the device's default generator is, which is equal in all processes.

        Args:
            stored: or where that of a run was that is continued, as `random_state` gives it.
        """
        on_gpu = self._device.type == "cuda"
        if on_gpu and stored is not None and stored["cuda"]:
            self.generator.set_state(stored["cuda"][0].cpu())  # of the one GPU of one process, or alike on all
        else:
            self.generator.set_state(torch.cuda.get_rng_state(self._device) if on_gpu else torch.get_rng_state())

    def own_draws(self, *purpose: object) -> None:
        """Seed the device's default generator, from which dropout draws, for this process alone."""
        seed = derived_seed(0, "dropout", self.world.rank, self.world.size, *purpose)
        (torch.cuda.manual_seed if self._device.type == "cuda" else torch.default_generator.manual_seed)(seed)

    def noise_like(self, x: Tensor) -> Tensor:
        """Noise for the whole batch, as `randn_like` draws it for images as x (b, C, H, W) in their memory format."""
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        shape, layout = (
            (self.portion.batch_size, *x.shape[1:]),
            torch.channels_last if last else torch.contiguous_format,
        )
        noise = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        return noise.normal_(generator=self.generator)

    def losses_of_all(self, losses: Tensor) -> Tensor:
        """The losses (B,) of the whole batch, from each process's (b,), in the order of the samples."""
        if self.portion.members == 1:
            return losses
        import torch.distributed as dist

        size, members = self.portion.batch_size, self.portion.members
        own = losses.new_zeros(-(-size // members))
        own[: len(losses)] = losses
        parts = [torch.empty_like(own) for _ in range(members)]
        with losses_named():
            dist.all_gather(parts, own, group=self._group)
        self.world.sent["telemetry"] += own.nbytes
        return torch.stack(parts, 1).flatten()[:size]


def groups_in(prepared: Mapping[str, Tensor]) -> np.ndarray | None:
    """The group of each sample (B,) in what a sampler prepared; None without groups."""
    return prepared["groups"].numpy() if "groups" in prepared else None


def subset(values: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The values of some groups out of one per group, or of none where there are none."""
    return [values[group] for group in groups] if values else []
