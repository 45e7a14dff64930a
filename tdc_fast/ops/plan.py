"""RoutingPlan and its operators: a stable counting sort of the samples of a batch by group.

`tdc_fast::routing_plan(groups, num_groups) -> (order, inverse, offsets, sorted_groups, tiles)` and
`tdc_fast::permute_samples(x, index, inverse) -> x[index]`, whose gradient is the inverse permutation (a gather, so
deterministic and without atomics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from tdc_fast.errors import integer, invalid
from tdc_fast.kernels.tile_table import no_tiles, tile_table, total_rows
from tdc_fast.ops import cpu, cuda, library, native
from tdc_fast.ops.checks import check_memory, converted, describe, require_tensors

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


Integers = Tensor | np.ndarray | Sequence[int]  # what `as_integers` takes

_Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # order, inverse, offsets, sorted_groups, tiles


def as_integers(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Returns integers as a tensor: a tensor itself, a sequence or a numpy array as int64 on a device.

    Copying a sequence or an array to a GPU waits for it.

    Args:
        name: What errors call them.
        value: The integers.
        device: Where a sequence or an array goes; None is torch's default device.

    Raises:
        ValueError: naming what does not hold integers.
    """
    if isinstance(value, Tensor):
        require_tensors((), **{name: value})
        if value.dtype not in INTEGER_DTYPES:
            raise invalid(name, value.dtype, "integers")
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise invalid(name, value, "integers: a tensor, a numpy array or a sequence") from error
    truths = not isinstance(value, np.ndarray) and array.ndim == 1 and any(isinstance(item, bool) for item in value)
    if truths or array.ndim == 0 or (array.size and array.dtype.kind not in "iu"):
        raise invalid(name, value, "integers: a tensor, a numpy array or a sequence")
    return torch.tensor(array.astype(np.int64), device=device)


def _plan(groups: Tensor, num_groups: int) -> _Plan:
    _check_groups(groups, num_groups)
    check_memory(groups=groups)
    if groups.device.type == "cpu":
        return *_plan_on_host(groups, num_groups), no_tiles(groups.device)
    return _plan_on_device(groups, num_groups)


def _check_groups(groups: Tensor, num_groups: int) -> None:
    if groups.dim() != 1:
        raise invalid("groups", tuple(groups.shape), "a tensor of shape (B,)")
    if groups.dtype != torch.int64:
        raise invalid("groups", groups.dtype, "int64 group ids")
    if num_groups < 1:
        raise invalid("num_groups", num_groups, "at least 1")


def _bad_group(value: int, sample: int, num_groups: int) -> ValueError:
    return invalid("groups", f"{value} for sample {sample}", f"group ids in [0, {num_groups})")


def _plan_on_host(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks the group ids before anything is indexed with them, and sorts."""
    if native.module is None:
        if groups.numel():
            bad = ((groups < 0) | (groups >= num_groups)).nonzero()
            if len(bad):
                raise _bad_group(int(groups[bad[0]]), int(bad[0]), num_groups)
        return _sort(groups, num_groups)
    order, inverse, offsets, bad_sample = cpu.routing_plan(groups, num_groups)
    if bad_sample >= 0:
        raise _bad_group(int(groups[bad_sample]), bad_sample, num_groups)
    return order, inverse, offsets, groups.index_select(0, order)


def _plan_on_device(groups: Tensor, num_groups: int) -> _Plan:
    """Sorts without waiting for the device. The kernel checks the group ids itself."""
    if groups.device.type == "cuda":
        planned = cuda.routing_plan(groups, num_groups)
        if planned is not None:
            return planned
        torch._assert_async(((groups >= 0) & (groups < num_groups)).all(), "groups: a group id is out of range")
    order, inverse, offsets, sorted_groups = _sort(groups, num_groups)
    return order, inverse, offsets, sorted_groups, tile_table(offsets, len(groups))


def _sort(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sort in torch operators."""
    sorted_groups, order = torch.sort(groups, stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(len(order), device=order.device))
    bounds = torch.arange(num_groups + 1, device=groups.device)
    offsets = torch.searchsorted(sorted_groups, bounds, out_int32=True)
    return order, inverse, offsets, sorted_groups


def _plan_fake(groups: Tensor, num_groups: int) -> _Plan:
    _check_groups(groups, num_groups)
    order = torch.empty_like(groups)
    offsets = groups.new_empty((num_groups + 1,), dtype=torch.int32)
    rows = 0 if groups.device.type == "cpu" else total_rows(groups.shape[0], num_groups)
    tiles = groups.new_empty((rows, 3), dtype=torch.int32)
    return order, torch.empty_like(groups), offsets, torch.empty_like(groups), tiles


routing_plan = library.define(
    "routing_plan(Tensor groups, int num_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _plan, _plan_fake
)


def _permute(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    check_memory(x=x, plan=index)
    try:
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        return x.index_select(0, index)
    except IndexError as error:
        raise invalid("plan", index.tolist(), f"a permutation of {x.shape[0]} samples") from error


def _permute_fake(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


permute_samples = library.define(
    "permute_samples(Tensor x, Tensor index, Tensor inverse) -> Tensor", _permute, _permute_fake
)


def _save(ctx: Any, args: tuple[Tensor, Tensor, Tensor], result: Tensor) -> None:
    ctx.save_for_backward(*args[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return permute_samples(grad, inverse, index), None, None


def _tangent(args: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor, None, None]) -> Tensor:
    return permute_samples(tangents[0], *args[1:])


library.add_autograd(permute_samples, _save, _backward, _tangent)


class RoutingPlan:
    """A batch of B samples sorted by group: every routed operator takes one.

    Build it with `from_groups`. Nothing here waits for a GPU that is given tensors.

    Attributes:
        order: int64 (B,), the original sample at each sorted position (a stable sort).
        inverse: int64 (B,), the inverse permutation.
        offsets: int32 (N + 1,); group g occupies sorted positions [offsets[g], offsets[g + 1]).
        groups: int64 (B,), group of each sorted position.
        tiles: int32 (rows, 3), what each program of a GPU kernel works on (kernels/tile_table.py); no rows in host
            memory.
        weight_index: int32 (N,), the expert whose weights a group uses (the identity by default).
        num_groups: N.
        validate: Whether operators check that channels past the widths are zeros, which waits for a GPU. Not kept where
            a plan goes through torch.compile or a transform.

    Raises:
        ValueError: Naming what has a wrong dtype or shape.
    """

    __slots__ = ("groups", "inverse", "num_groups", "offsets", "order", "tiles", "validate", "weight_index")

    def __init__(
        self,
        order: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        groups: Tensor,
        tiles: Tensor,
        weight_index: Tensor,
        num_groups: int,
        validate: bool = False,
    ) -> None:
        tensors = {"order": order, "inverse": inverse, "offsets": offsets, "groups": groups, "tiles": tiles}
        tensors["weight_index"] = weight_index
        require_tensors((), **tensors)
        shapes = {"offsets": (num_groups + 1,), "weight_index": (num_groups,), "tiles": (*tiles.shape[:1], 3)}
        for name, tensor in tensors.items():
            dtype = torch.int32 if name in shapes else torch.int64
            shape = shapes.get(name, tuple(order.shape[:1]))
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise invalid(name, describe(tensor), f"{dtype} of shape {shape}")
            if tensor.device != order.device:
                raise invalid(name, tensor.device, f"{order.device}, where the order is")
        self.order = order
        self.inverse = inverse
        self.offsets = offsets
        self.groups = groups
        self.tiles = tiles
        self.weight_index = weight_index
        self.num_groups = num_groups
        self.validate = validate

    @classmethod
    def from_groups(
        cls,
        groups: Integers,
        num_groups: int,
        weight_index: Integers | None = None,
        *,
        validate: bool = False,
    ) -> RoutingPlan:
        """Sorts samples by group.

        Args:
            groups: (B,) integers, the group of each sample: a tensor of any integer dtype, a numpy array or a sequence
                (these two are put on torch's default device). B = 0 and groups without samples are allowed.
            num_groups: N.
            weight_index: (N,) integers likewise, the expert of each group; a tensor must be on the device of groups,
                anything else is copied there, which waits for a GPU. None is the identity.
            validate: Let every operator that takes the plan check what its widths promise: that the channels of x at or
                past them are zeros. On a GPU, also wait for it and check the group ids now; on the CPU they are always
                checked. For finding mistakes: each check reads the whole of x, and waits for a GPU.

        Raises:
            ValueError: A group id outside [0, N), a wrong rank or dtype, `validate` for groups on the meta device.
        """
        groups = as_integers("groups", groups)
        num_groups = integer("num_groups", num_groups)
        if validate and groups.is_meta:
            raise invalid("validate", validate, "False for groups on the meta device, which have no values to check")
        if weight_index is None:
            weight_index = torch.arange(num_groups, dtype=torch.int32, device=groups.device)
        else:
            weight_index = _checked_weight_index(weight_index, num_groups, groups.device)
        if validate and groups.device.type != "cpu" and groups.numel():
            low, high = (int(v) for v in torch.aminmax(groups))
            if low < 0 or high >= num_groups:
                raise invalid("groups", low if low < 0 else high, f"group ids in [0, {num_groups})")
        order, inverse, offsets, sorted_groups, tiles = routing_plan(
            converted("groups", groups, torch.int64), num_groups
        )
        return cls(order, inverse, offsets, sorted_groups, tiles, weight_index, num_groups, validate)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.order.shape[0]

    def sort(self, x: Tensor) -> Tensor:
        """Returns x[order] for x (B, ...): samples of a group become adjacent. Differentiable; keeps channels_last."""
        self._check_batch(x)
        return permute_samples(x, self.order, self.inverse)

    def unsort(self, x: Tensor) -> Tensor:
        """Undoes `sort`: returns samples to their original order."""
        self._check_batch(x)
        return permute_samples(x, self.inverse, self.order)

    def with_weight_index(self, weight_index: Integers) -> RoutingPlan:
        """Returns the same sort with another weight_index (N,), of integers as `from_groups` takes them."""
        weight_index = _checked_weight_index(weight_index, self.num_groups, self.order.device)
        sort = (self.order, self.inverse, self.offsets, self.groups, self.tiles)
        return RoutingPlan(*sort, weight_index, self.num_groups, self.validate)

    def merged(self, weight_index: Integers, num_experts: int) -> RoutingPlan:
        """The plan of the sorted batch for E experts, where neighbouring groups with one expert become one group.

        Args:
            weight_index: (N,) ascending integers as `from_groups` takes them, the expert of each group.
            num_experts: E.
        """
        weight_index = _checked_weight_index(weight_index, self.num_groups, self.order.device)
        return RoutingPlan.from_groups(weight_index[self.groups], num_experts, validate=self.validate)

    def repeated(self, times: int, num_experts: int) -> RoutingPlan:
        """The plan of `times` copies of the sorted batch, one after the other, each with groups and experts of its own.

        Group g of copy c is group c * N + g, and uses expert c * num_experts + weight_index[g].
        """
        copy = torch.arange(times, dtype=torch.int32, device=self.groups.device)[:, None]
        groups = (self.groups + copy * self.num_groups).flatten()
        weight_index = (self.weight_index + copy * num_experts).flatten()
        return RoutingPlan.from_groups(groups, times * self.num_groups, weight_index, validate=self.validate)

    def _check_batch(self, x: Tensor) -> None:
        require_tensors(x=x)
        if x.dim() < 1 or x.shape[0] != self.order.shape[0]:
            raise invalid("x", tuple(x.shape), f"{self.order.shape[0]} samples, the batch of this plan")
        if x.device != self.order.device:
            raise invalid("x", x.device, f"{self.order.device}, where the plan is")

    def __repr__(self) -> str:
        return f"RoutingPlan(batch_size={self.batch_size}, num_groups={self.num_groups})"


def is_plan_of(plan: Any, x: Any) -> bool:
    """Whether `check_plan` would pass a tensor x of rank 1 or more."""
    if not isinstance(plan, RoutingPlan) or not isinstance(x, Tensor) or x.is_nested:
        return False
    return x.dim() > 0 and x.size(0) == plan.order.size(0)


def check_plan(x: Tensor, plan: RoutingPlan) -> None:
    """Raises ValueError unless `plan` is a plan of the batch x, a tensor."""
    if not isinstance(plan, RoutingPlan):
        raise invalid("plan", type(plan).__name__, "a RoutingPlan")
    if x.dim() and x.shape[0] != plan.order.shape[0]:
        raise invalid("plan", plan, f"the plan of this batch, of {x.shape[0]} samples")


def _checked_weight_index(value: Integers, num_groups: int, device: torch.device) -> Tensor:
    """Returns it as int32 on the device; ValueError for a wrong shape, and for a tensor that is elsewhere."""
    weight_index = as_integers("weight_index", value, device)
    if weight_index.dim() != 1 or weight_index.shape[0] != num_groups:
        raise invalid("weight_index", tuple(weight_index.shape), f"shape ({num_groups},)")
    if weight_index.device != device:
        raise invalid("weight_index", weight_index.device, f"{device}, where the groups are")
    if weight_index.dtype == torch.int64:  # what int32 cannot hold stays out of range
        if not torch.compiler.is_compiling():
            check_memory(weight_index=weight_index)
        weight_index = weight_index.clamp(-(2**31), 2**31 - 1)
    return converted("weight_index", weight_index, torch.int32)


def _flatten(plan: RoutingPlan) -> tuple[list[Any], Any]:
    sort = [plan.order, plan.inverse, plan.offsets, plan.groups, plan.tiles]
    return [*sort, plan.weight_index], plan.num_groups


def _unflatten(tensors: Any, num_groups: Any) -> RoutingPlan:
    plan = RoutingPlan.__new__(RoutingPlan)  # unchecked: the leaves of a tree are not always tensors
    plan.order, plan.inverse, plan.offsets, plan.groups, plan.tiles, plan.weight_index = tensors
    plan.num_groups, plan.validate = num_groups, False
    return plan


_pytree.register_pytree_node(RoutingPlan, _flatten, _unflatten, serialized_type_name="tdc_fast.RoutingPlan")
