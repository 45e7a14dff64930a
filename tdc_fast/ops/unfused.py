"""Calls that fuse more into reading their input than a backend has: the tensors are made first.

torch.cat of x and x2, nearest upsampling, then the backend's own kernel; in the backward the kernel, then the sum over
2 x 2 pixels and the two parts. Memory and time are those of a program without the fusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors, Problem
from tdc_fast.ops.inputs import joined, split_channels, upsampled


class Unfused:
    """A backend that serves one problem through copies.

    Attributes:
        backend: the backend.
        problem: what is left for it.
        copies: which tensors are made first, in words.
    """

    def __init__(self, backend: Any, problem: Problem) -> None:
        self.name, self.problem = backend.name, problem.unfused()
        words = {"x2": "torch.cat of x and x2", "upsample": "nearest upsampling"}
        self.copies = " and ".join(words[what] for what in problem.fused)
        self.backend = backend

    def conv2d(self, p: ConvProblem, t: ConvTensors) -> Tensor:
        """As of a backend."""
        return self.backend.conv2d(self.problem, _plain(p, t))

    def conv2d_dgrad(self, p: ConvProblem, dy: Tensor, t: ConvTensors) -> tuple[Tensor, Tensor | None]:
        """As of a backend."""
        dx, _ = self.backend.conv2d_dgrad(self.problem, dy, t)
        if p.upsample > 1:
            size = [p.batch, p.in_channels, p.height, p.width]
            dx = torch.ops.aten.upsample_nearest2d_backward(dx, list(dx.shape[2:]), size)
        return split_channels(dx, p.x2_channels)

    def conv2d_wgrad(
        self, p: ConvProblem, dy: Tensor, t: ConvTensors, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """As of a backend."""
        return self.backend.conv2d_wgrad(self.problem, dy, _plain(p, t) if mask[0] else t, mask)

    def group_norm(self, p: NormProblem, t: NormTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As of a backend."""
        return self.backend.group_norm(self.problem, t._replace(x=joined(t.x, t.x2), x2=None))

    def group_norm_backward(
        self, p: NormProblem, dy: Tensor, mean: Tensor, rstd: Tensor, t: NormTensors, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """As of a backend."""
        one = t._replace(x=joined(t.x, t.x2), x2=None)
        wanted = (mask[0] or mask[5], *mask[1:5], False)
        dx, *rest, _ = self.backend.group_norm_backward(self.problem, dy, mean, rstd, one, wanted)
        dx, dx2 = (None, None) if dx is None else split_channels(dx, p.x2_channels)
        return dx if mask[0] else None, *rest, dx2 if mask[5] else None


def _plain(p: ConvProblem, t: ConvTensors) -> ConvTensors:
    """The tensors with one input of its final size."""
    x = joined(t.x, t.x2)
    return t._replace(x=upsampled(x) if p.upsample > 1 else x, x2=None)
