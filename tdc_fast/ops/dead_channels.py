"""Which gradients are known to be zero in dead channels.

Autograd may hand a convolution whatever a layer of another library left in the dead channels of its gradient. Where one
of our operators wrote that gradient, zeros are there, and a kernel need not mask them. So an operator notes on the
gradient that it returns up to which widths it is not zero, and the operator that receives this very tensor reads the
note. A sum of two gradients is another tensor or another version of it; what a tracing torch passes on is not noted.
Autograd's versions tell who wrote to a tensor, but for what goes around them: a hook must not write through `.data`.

Layers have width tensors of their own, whose numbers are on the device. `note_widths` tells them on the host.

A note holds for the tensor that it names by its `id`: copies of a tensor take its notes along, but count its versions
anew.
"""

from __future__ import annotations

from torch import Tensor

_GRADIENT, _WIDTHS = "_tdc_fast_zeros_past", "_tdc_fast_widths"


def note_widths(widths: Tensor, numbers: tuple[int, ...]) -> None:
    """Notes the numbers of a width tensor on it, until it is written to.

    Args:
        widths: int32 (N,).
        numbers: What it holds.
    """
    widths.__dict__[_WIDTHS] = id(widths), widths._version, numbers


def noted_widths(widths: Tensor | None) -> tuple[int, ...] | None:
    """The numbers that are noted on a width tensor, or None."""
    if widths is None:
        return None
    of, version, numbers = widths.__dict__.get(_WIDTHS, (None, None, None))
    return numbers if of == id(widths) and version == widths._version else None


def note_zeros(gradient: Tensor | None, widths: Tensor | None, offsets: Tensor) -> None:
    """Notes on a gradient that it is zero in dead channels, until it is written to.

    Args:
        gradient: (B, C, H, W), or of a linear layer (B, C) or (B, T, C); sorted by group.
        widths: Live channels of each group, int32 (N,); None where all are live.
        offsets: First sample of each group and their end, int32 (N + 1,).
    """
    if widths is not None and type(gradient) is Tensor and not gradient.is_inference():
        gradient.__dict__[_GRADIENT] = id(gradient), gradient._version, widths, offsets


def are_zeros(gradient: Tensor, widths: Tensor | None, offsets: Tensor) -> bool:
    """Whether a gradient is known to be zero in channels that these widths leave dead; False where there are none."""
    if widths is None or type(gradient) is not Tensor:
        return False
    note = gradient.__dict__.get(_GRADIENT)
    if note is None or gradient.is_inference():
        return False
    of, version, live, starts = note
    if of != id(gradient) or version != gradient._version or not _is_same(starts, offsets):
        return False
    return _is_same(live, widths) or _agree(live, widths)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two index lists are one, perhaps in two tensors, as autograd saves them."""
    return one is other or (one.data_ptr() == other.data_ptr() != 0 and one.shape == other.shape)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether two width tensors are known to hold the same numbers."""
    numbers = noted_widths(one)
    return numbers is not None and numbers == noted_widths(other)
