"""Validation of operator arguments, and the problem they describe.

Shapes, dtypes and devices are checked once per combination (the operators remember the problem); the numbers in
tensors, in check_values.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdc_fast.errors import invalid, is_integer
from tdc_fast.kernels.problems import ConvProblem, ConvTensors, NormProblem, NormTensors
from tdc_fast.kernels.tile_table import total_rows

_MAX_PIXELS = 2**20  # pixels that a stride or a padding may be
_STRIDED = torch.strided
_PYTHON = torch._C.DispatchKey.Python
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensors(optional: tuple[str, ...] = (), **arguments: Any) -> None:
    """Raises ValueError for the first argument that is not a dense tensor; those named in `optional` may be None."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if value.layout is not _STRIDED or value.is_nested:
                kind = "a nested tensor" if value.is_nested else value.layout
                raise invalid(name, kind, "a dense tensor: convert it with to_dense() or to_padded_tensor()")
        elif value is not None or name not in optional:
            raise invalid(name, value, "a torch tensor" + (" or None" if name in optional else ""))


def require_backend_name(backend: Any) -> None:
    """Raises ValueError for a backend that is neither a name nor None."""
    if backend is not None and not isinstance(backend, str):
        raise invalid("backend", backend, "the name of a backend, or None")


def pair(name: str, value: int | tuple[int, int] | list[int], minimum: int) -> tuple[int, int]:
    """Returns an int or a pair of ints as a pair; ValueError for one below `minimum`."""
    if type(value) is int and minimum <= value < _MAX_PIXELS:
        return value, value
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is type(second) is int and minimum <= first < _MAX_PIXELS and minimum <= second < _MAX_PIXELS:
            return value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(is_integer(v) and minimum <= v < _MAX_PIXELS for v in values):
        raise invalid(name, value, f"an int or a pair of ints, each at least {minimum} (and below {_MAX_PIXELS})")
    return int(values[0]), int(values[1])


def conv_problem(
    op: str,
    t: ConvTensors,
    stride: tuple[int, int],
    padding: tuple[int, int],
    upsample: int = 1,
    *,
    dy: Tensor | None = None,
    image_size: Sequence[int] = (),
    x2_channels: int = 0,
) -> ConvProblem:
    """Checks the arguments of a convolution and returns the problem that they describe.

    Args:
        op: Name of the registered operator.
        t: Its tensors; those that are None are not checked.
        stride: (height, width).
        padding: (height, width).
        upsample: 1 or 2.
        dy: Gradient of the result, for dgrad and wgrad.
        image_size: Height and width of x, where there is no x (dgrad).
        x2_channels: Channels of x2, where there is no x.

    Raises:
        ValueError: Naming argument, value and remedy.
    """
    weight = t.weight
    if t.x is not None:
        like, image = t.x, tuple(t.x.shape)
        x2_channels = 0
        _check_activation("x", image, like.dtype)
        if t.x2 is not None:
            x2_channels = _check_x2(t.x2, t.x)
            image = (image[0], image[1] + x2_channels, *image[2:])
    else:
        assert dy is not None
        like, image = dy, (dy.shape[0], weight.shape[2] if weight.dim() == 5 else 0, *image_size)
        _check_activation("x", image, like.dtype)
    if weight.dim() != 5:
        raise invalid("weight", tuple(weight.shape), "rank 5: (E, C_out, C_in, R, S)")
    batch, in_channels, height, width = image
    experts, out_channels, weight_channels, rows, columns = weight.shape
    _check_like("weight", weight, like)
    if weight_channels != in_channels:
        whose = "x and x2" if x2_channels else "x"
        raise invalid("weight", tuple(weight.shape), f"C_in to be the {in_channels} channels of {whose}")
    if t.x is None and not 0 <= x2_channels < in_channels:
        raise invalid("x2_channels", x2_channels, f"0, or fewer than the {in_channels} input channels")
    for name, size in (("E", experts), ("C_out", out_channels), ("R", rows), ("S", columns)):
        if size < 1:
            raise invalid("weight", tuple(weight.shape), f"{name} of at least 1")
    full_height, full_width = upsample * height + 2 * padding[0], upsample * width + 2 * padding[1]
    if full_height < rows or full_width < columns:
        raise invalid("x", image, f"an image that, with padding {padding}, holds the {rows}x{columns} filter once")
    out_height = (full_height - rows) // stride[0] + 1
    out_width = (full_width - columns) // stride[1] + 1
    out_shape = (batch, out_channels, out_height, out_width)
    for argument, tensor, shape in (
        ("bias", t.bias, (experts, out_channels)),
        ("sample_bias", t.sample_bias, (batch, out_channels)),
        ("residual", t.residual, out_shape),
        ("dy", dy, out_shape),
    ):
        if tensor is not None:
            _check_shaped(argument, tensor, shape, like)
    groups = _check_routing(t.offsets, t.weight_index, like)
    if t.tiles is not None:
        _check_tiles(t.tiles, batch, groups, like)
    _check_widths("in_widths", t.in_widths, groups, like)
    _check_widths("out_widths", t.out_widths, groups, like)
    return ConvProblem(
        op, like.device, like.dtype, batch, height, width, in_channels, out_channels, (rows, columns), stride,
        padding, out_height, out_width, groups, experts, like.dtype == torch.float32 and tf32_is_allowed(),
        x2_channels, upsample,
    )  # fmt: skip


def norm_problem(
    op: str,
    t: NormTensors,
    num_groups: int,
    eps: float,
    silu: bool,
    *,
    dy: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> NormProblem:
    """Checks the arguments of a group norm and returns the problem that they describe.

    Args:
        op: Name of the registered operator.
        t: Its tensors.
        num_groups: Norm groups of the full width.
        eps: Added to the variance.
        silu: Whether SiLU follows.
        dy: Gradient of the result, for the backward.
        mean: (B, num_groups) from the forward, for the backward.
        rstd: (B, num_groups) from the forward, for the backward.

    Raises:
        ValueError: Naming argument, value and remedy.
    """
    x = t.x
    _check_activation("x", x.shape, x.dtype)
    batch, channels, height, width = x.shape
    x2_channels, whose = (0, "x") if t.x2 is None else (_check_x2(t.x2, x), "x and x2")
    channels += x2_channels
    shape_of_y = (batch, channels, height, width)
    if num_groups < 1 or channels % num_groups:
        raise invalid("num_groups", num_groups, f"a divisor of the {channels} channels of {whose}")
    if not eps > 0:
        raise invalid("eps", eps, "a positive number")
    if t.weight.dim() != 2 or t.weight.shape[0] < 1:
        raise invalid("weight", tuple(t.weight.shape), f"shape (E, {channels}) with E at least 1")
    experts = t.weight.shape[0]
    _check_shaped("weight", t.weight, (experts, channels), x)
    _check_shaped("bias", t.bias, (experts, channels), x)
    for argument, tensor, shape in (
        ("scale", t.scale, (batch, channels)),
        ("shift", t.shift, (batch, channels)),
        ("dy", dy, shape_of_y),
    ):
        if tensor is not None:
            _check_shaped(argument, tensor, shape, x)
    statistics, precise = (batch, num_groups), accumulate_dtype(x.dtype)
    for argument, tensor, shape, dtype in (
        ("mean", mean, statistics, precise),
        ("rstd", rstd, statistics, precise),
        ("counters", t.counters, (experts, num_groups), torch.int32),
    ):
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise invalid(argument, describe(tensor), "what the forward returned")
    groups = _check_routing(t.offsets, t.weight_index, x)
    _check_widths("widths", t.widths, groups, x)
    return NormProblem(
        op, x.device, x.dtype, batch, height, width, channels, num_groups, eps, silu, groups, experts, x2_channels
    )


def tf32_is_allowed() -> bool:
    """Whether torch.set_float32_matmul_precision lets fp32 products be rounded to tf32 (not by default)."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set through torch.backends.cuda.matmul.fp32_precision, torch's newer name
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def signature(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Everything about these tensors that a problem and `extents` depend on, hashable."""
    stride = Tensor.stride
    return tuple([None if t is None else (t.shape, stride(t), t.dtype, t.device) for t in tensors])


def extents(tensors: Sequence[Tensor | None]) -> list[int]:
    """The bytes from the first element of each tensor to the end of its last; 0 for None, and without elements."""
    spans = []
    for t in tensors:
        if t is None or not t.numel():
            spans.append(0)
        else:
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            spans.append((last + 1) * t.itemsize)
    return spans


def are_in_memory(tensors: Sequence[Tensor | None], spans: Sequence[int]) -> bool:
    """Whether the storage of every tensor covers it, given their `extents`; runs on every call of an operator."""
    storage, size, offset = Tensor.untyped_storage, torch.UntypedStorage.nbytes, Tensor.storage_offset
    for t, span in zip(tensors, spans):  # noqa: B905  (of one length; to say so takes as long as a tensor's check)
        if span:
            rest = size(storage(t)) - span  # type: ignore[arg-type]
            if rest < 0 or ((start := offset(t)) and rest < start * t.itemsize):  # type: ignore[union-attr,arg-type]
                return False
    return True


def check_memory(**tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor whose storage was freed or shrunk: kernels would read what is not theirs.

    Tensors that are not in memory of their own, such as fake and batched ones, pass.
    """
    for name, t in tensors.items():
        if t is not None and is_in_memory(t) and not are_in_memory((t,), extents((t,))):
            held = f"a tensor of shape {tuple(t.shape)} whose storage holds {t.untyped_storage().nbytes()} bytes"
            raise invalid(name, held, "a tensor whose memory was not freed")


def can_read(t: Tensor) -> bool:
    """Whether a check may read values: not on a GPU, which it would wait for, and not where there are none to read.

    These are torch.compile, transforms of torch.func that hold the tensor, and traces (torch.func.linearize, make_fx).
    """
    return t.device.type == "cpu" and is_seen(t)


def is_seen(t: Tensor) -> bool:
    """Whether the values of a tensor on any device are there to be read."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def is_in_memory(t: Tensor) -> bool:
    """Whether a tensor has memory of its own, which fake and batched ones have not."""
    return not (torch._C._dispatch_keys(t).has(_PYTHON) or torch._C._functorch.is_functorch_wrapped_tensor(t))


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in another dtype; ValueError if its memory, which that reads, was freed."""
    if tensor.dtype == dtype:
        return tensor
    if not torch.compiler.is_compiling():
        check_memory(**{name: tensor})
    return tensor.to(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_activation(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if len(shape) != 4:
        raise invalid(name, tuple(shape), "rank 4: (B, C, H, W)")
    if dtype not in _FLOAT_DTYPES:
        raise invalid(name, dtype, "float32, bfloat16, float16 or float64")
    if shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise invalid(name, tuple(shape), "channels, height and width of at least 1")


def _check_x2(x2: Tensor, x: Tensor) -> int:
    """Checks the second input of an operator and returns its channels."""
    if x2.dim() != 4 or x2.shape[1] < 1 or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
        batch, _, height, width = x.shape
        remedy = f"shape ({batch}, C, {height}, {width}) with C at least 1, like x but for its channels"
        raise invalid("x2", tuple(x2.shape), remedy)
    _check_like("x2", x2, x)
    return x2.shape[1]


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise invalid(name, tensor.dtype, f"{x.dtype}, the dtype of x: convert it, or run under torch.autocast")
    if tensor.device != x.device:
        raise invalid(name, tensor.device, f"{x.device}, where x is: move it there")


def _check_shaped(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.dim() != len(shape) or tuple(tensor.shape) != shape:
        raise invalid(name, tuple(tensor.shape), f"shape {shape}")
    _check_like(name, tensor, x)


def _check_routing(offsets: Tensor, weight_index: Tensor, x: Tensor) -> int:
    """Checks what a plan holds and returns N."""
    if weight_index.dim() != 1 or weight_index.shape[0] < 1 or weight_index.dtype != torch.int32:
        raise invalid("weight_index", describe(weight_index), "int32 of shape (N,)")
    groups = weight_index.shape[0]
    if offsets.dim() != 1 or offsets.shape[0] != groups + 1 or offsets.dtype != torch.int32:
        raise invalid("plan", f"offsets {describe(offsets)}", f"int32 of shape ({groups + 1},)")
    for tensor in (offsets, weight_index):
        if tensor.device != x.device:
            raise invalid("plan", tensor.device, f"a plan built on {x.device}, where x is")
    return groups


def _check_tiles(tiles: Tensor, batch: int, groups: int, x: Tensor) -> None:
    if tiles.device != x.device:
        raise invalid("plan", tiles.device, f"a plan built on {x.device}, where x is")
    rows = 0 if x.device.type == "cpu" else total_rows(batch, groups)
    if tiles.dim() != 2 or tuple(tiles.shape) != (rows, 3) or tiles.dtype != torch.int32:
        raise invalid("plan", f"tiles {describe(tiles)}", f"the plan of this batch: int32 of shape ({rows}, 3)")


def _check_widths(name: str, widths: Tensor | None, groups: int, x: Tensor) -> None:
    if widths is None:
        return
    if widths.dim() != 1 or widths.shape[0] != groups or widths.dtype != torch.int32:
        remedy = f"int32 of shape ({groups},), one width per group"
        if widths.dtype != torch.int32:
            remedy += f": once, before the calls, {name} = {name}.to(torch.int32)"
        raise invalid(name, describe(widths), remedy)
    if widths.device != x.device:
        raise invalid(name, widths.device, f"{x.device}, where x is: move it there")


def describe(tensor: Tensor) -> str:
    """The dtype and shape of a tensor, for errors."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
