"""Packing experts: channels permuted by each expert's own order and cut to its widths, in one launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tdc_fast.errors import invalid
from tdc_fast.ops import cuda_launch, native
from tdc_fast.ops.checks import check_memory, require_tensors

_ELEMENT_SIZES = (2, 4, 8)


@torch.no_grad()
def pack_channels(
    source: Tensor,
    *,
    out_order: Tensor | None = None,
    in_order: Tensor | None = None,
    out_widths: Tensor | None = None,
    in_widths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """packed[e, o, i, ...] = source[e, out_order[e, o], in_order[e, i], ...], zero past the widths of expert e.

    On a GPU this is one launch, and the host does not wait for it; an order's live entry outside the source stops the
    kernel, and the error appears at the next call that waits. On the CPU, and where no kernel serves, it is a gather in
    torch. Not differentiable.

    Args:
        source: (E, C_out), (E, C_out, C_in) or (E, C_out, C_in, R, S), any strides: a bias or a norm's affine, a linear
            layer's weight, a convolution's weight. With E = 1, every expert is cut from this one base.
        out_order: int32 (E, C_out'), the source channel of each packed channel; None is the identity. Entries past the
            width of an expert do not matter.
        in_order: int32 (E, C_in'), likewise; None for a source without input channels.
        out_widths: int32 (E,), live output channels of each expert; None is all.
        in_widths: int32 (E,), live input channels of each expert; None is all.
        out: Where to write, of the result's shape and dtype, in any memory order; None makes a dense tensor.

    Returns:
        (E, C_out', C_in', ...).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or on the CPU, a live entry of an order is outside the source.
    """
    orders = {"out_order": out_order, "in_order": in_order}
    widths = {"out_widths": out_widths, "in_widths": in_widths}
    require_tensors((*orders, *widths, "out"), source=source, **orders, **widths, out=out)
    check_memory(source=source, **orders, **widths, out=out)
    experts = _check_experts(source, orders | widths)
    shape = list(source.shape)
    shape[0] = experts
    for dim, order in enumerate((out_order, in_order), start=1):
        if order is not None:
            shape[dim] = order.shape[1]
    if out is None:
        out = torch.empty(shape, dtype=source.dtype, device=source.device)
    elif (out.shape, out.dtype, out.device) != (torch.Size(shape), source.dtype, source.device):
        raise invalid("out", f"{tuple(out.shape)} {out.dtype} on {out.device}", f"{tuple(shape)}, otherwise as source")
    elif any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise invalid("out", f"strides {out.stride()}", "memory of its own for every element")
    if not _launch(source, out, out_order, in_order, out_widths, in_widths):
        out.copy_(_gather(source, tuple(shape), out_order, in_order, out_widths, in_widths))
    return out


def _check_experts(source: Tensor, per_expert: dict[str, Tensor | None]) -> int:
    """Checks that everything given per expert is of the same number of experts, and returns it."""
    if source.dim() not in (2, 3, 5):
        raise invalid("source", tuple(source.shape), "shape (E, C_out), (E, C_out, C_in) or (E, C_out, C_in, R, S)")
    experts = source.shape[0]
    for name, tensor in per_expert.items():
        if tensor is None:
            continue
        if name.startswith("in_") and source.dim() == 2:
            raise invalid(name, tuple(tensor.shape), "None: the source has no input channels")
        if tensor.dtype != torch.int32 or tensor.device != source.device:
            raise invalid(name, f"{tensor.dtype} on {tensor.device}", f"int32 on {source.device}")
        if tensor.dim() != (2 if name.endswith("order") else 1):
            raise invalid(name, tuple(tensor.shape), "shape (E, channels) for an order, (E,) for widths")
        if experts == 1:
            experts = tensor.shape[0]
        if tensor.shape[0] != experts:
            raise invalid(name, tuple(tensor.shape), f"{experts} experts, as the other arguments have")
    return experts


def _launch(
    source: Tensor,
    out: Tensor,
    out_order: Tensor | None,
    in_order: Tensor | None,
    out_widths: Tensor | None,
    in_widths: Tensor | None,
) -> bool:
    """Packs with a kernel; returns False where none serves."""
    device = source.device
    launcher, _ = cuda_launch.launcher_for(device)
    if launcher is None or source.element_size() not in _ELEMENT_SIZES or out.numel() == 0:
        return False
    if out.is_complex() or source.is_conj() or source.is_neg():
        return False
    taps = _taps(source), _taps(out)
    if taps[0] is None or taps[1] is None:
        return False
    owners = [None if t is None else t.contiguous() for t in (out_order, in_order, out_widths, in_widths)]
    order_out, order_in, width_out, width_in = (0 if t is None else t.data_ptr() for t in owners)
    has_inputs = source.dim() > 2
    arguments = {
        "source": source.data_ptr(),
        "target": out.data_ptr(),
        "out_order": order_out,
        "in_order": order_in,
        "out_widths": width_out,
        "in_widths": width_in,
        "element_size": source.element_size(),
        "num_experts": out.shape[0],
        "out_channels": out.shape[1],
        "in_channels": out.shape[2] if has_inputs else 1,
        "taps": taps[1][0],
        "source_out_channels": source.shape[1],
        "source_in_channels": source.shape[2] if has_inputs else 1,
        "source_expert_stride": 0 if source.shape[0] == 1 else source.stride(0),
        "source_out_stride": source.stride(1),
        "source_in_stride": source.stride(2) if has_inputs else 1,
        "source_tap_stride": taps[0][1],
        "target_expert_stride": out.stride(0),
        "target_out_stride": out.stride(1),
        "target_in_stride": out.stride(2) if has_inputs else 1,
        "target_tap_stride": taps[1][1],
    }
    cuda_launch.launch_planned(native.module.cuda_launches_pack_experts, device, arguments)
    return True


def _taps(weight: Tensor) -> tuple[int, int] | None:
    """The number of filter taps and the elements between neighbours; None where these are not evenly spaced."""
    if weight.dim() < 5:
        return 1, 1
    rows, columns = weight.shape[3:]
    if columns == 1:
        return rows, weight.stride(3)
    if rows > 1 and weight.stride(3) != columns * weight.stride(4):
        return None
    return rows * columns, weight.stride(4)


def _gather(
    source: Tensor,
    shape: tuple[int, ...],
    out_order: Tensor | None,
    in_order: Tensor | None,
    out_widths: Tensor | None,
    in_widths: Tensor | None,
) -> Tensor:
    """Packs by indexing, in torch."""
    packed = source.expand(shape[0], *source.shape[1:])
    for dim, order, widths in ((1, out_order, out_widths), (2, in_order, in_widths)):
        if dim >= source.dim():
            continue
        position = torch.arange(shape[dim], device=source.device)
        live = None if widths is None else position < widths[:, None]  # (E, channels)
        if order is not None:
            _check_order("out_order" if dim == 1 else "in_order", order, live, source.shape[dim])
            chosen = order.long() if live is None else order.long().where(live, 0)
            if source.shape[dim] == 0:
                packed = packed.new_zeros(*packed.shape[:dim], shape[dim], *packed.shape[dim + 1 :])
            else:
                packed = torch.take_along_dim(packed, _on_axis(chosen, dim, packed.dim()), dim)
        if live is not None:
            packed = packed.where(_on_axis(live, dim, packed.dim()), 0)
    return packed


def _check_order(name: str, order: Tensor, live: Tensor | None, channels: int) -> None:
    """Refuses live entries outside the source; torch would count them from the other end, or over again."""
    bad = (order < 0) | (order >= channels)
    bad = bad if live is None else bad & live
    if order.device.type == "cpu":
        if bad.any():
            raise invalid(name, int(order[bad][0]), f"channels of the source, from 0 to {channels - 1}")
    elif order.device.type != "meta":
        torch._assert_async(~bad.any(), f"{name}: an entry is outside the source")


def _on_axis(per_expert: Tensor, dim: int, dims: int) -> Tensor:
    """Views (E, channels) as `dims` axes, with the channels on axis `dim` and ones elsewhere."""
    shape = [1] * dims
    shape[0], shape[dim] = per_expert.shape
    return per_expert.view(shape)
