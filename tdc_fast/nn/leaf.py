"""What all routed leaves share: stacked weights, the plan to find them by, and each expert's live channels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from tdc_fast.errors import integer, invalid
from tdc_fast.nn.plan_scope import Running, Sharing, UsesPlan
from tdc_fast.nn.sharing import Rows
from tdc_fast.ops.checks import check_memory, is_in_memory
from tdc_fast.ops.dead_channels import note_widths, noted_widths
from tdc_fast.routing import RoutingPlan


@dataclass(frozen=True)
class LiveAxis:
    """Which entries of a channel axis each group's expert uses.

    A dense axis is `copies` consecutive blocks. The stacked axis interleaves them (entry i of copy c is at
    i * copies + c), so that the live entries are a prefix for any number of copies.

    Attributes:
        counts: live entries per copy, for each of the N groups.
        copies: blocks of the dense axis.
    """

    counts: tuple[int, ...]
    copies: int = 1

    @property
    def size(self) -> int:
        """Physical length of the stacked axis: what the widest expert needs."""
        return max(self.counts) * self.copies

    def widths(self, device: torch.device | None = None) -> Tensor | None:
        """Number of live entries of each group, int32 (N,); None when all groups use the whole stacked axis."""
        if min(self.counts) == max(self.counts):
            return None
        return torch.tensor([count * self.copies for count in self.counts], dtype=torch.int32, device=device)

    def positions(self, expert: int) -> Tensor:
        """Stacked position of every entry of the expert's dense axis, int64, in host memory."""
        entries = torch.arange(self.counts[expert], device="cpu")
        return torch.cat([entries * self.copies + copy for copy in range(self.copies)])


class RoutedLeaf(UsesPlan, nn.Module):
    """What all routed leaves share: the plan, the live axes, and moving one expert's weights in and out.

    Attributes:
        num_experts: E, the number of rows of weights.
        rows: the row of weights of each group where groups share some; None where every group has its own.
        weight_index: the same as an int32 buffer (N,), or None.
        out_widths: live output channels per group, an int32 buffer (N,); None where all experts have the same.
        in_widths: the same for input channels.
        closing_gate: bool (E, 1) of a unit's last layer, whether the expert has the unit at all; None where all have.
        routing: the holder of the running forward's plan.
        live_out: the live entries of the output axis; None where no expert is pruned.
        live_in: the same for the input axis.
        template: the dense twin on the meta device, in a tuple so that it is not a submodule.
    """

    weight_index: Tensor | None
    out_widths: Tensor | None
    in_widths: Tensor | None
    closing_gate: Tensor | None
    weight: Tensor
    bias: Tensor | None
    in_autocast_dtype = True  # whether autocast casts the parameters

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = integer("num_experts", num_experts)
        self.rows: Rows | None = None
        self.routing = None
        self.live_out: LiveAxis | None = None
        self.live_in: LiveAxis | None = None
        self.template: tuple[nn.Module, ...] = ()
        self.register_buffer("weight_index", None, persistent=False)
        self.register_buffer("out_widths", None, persistent=False)
        self.register_buffer("in_widths", None, persistent=False)
        self.register_buffer("closing_gate", None, persistent=False)

    def set_live(self, out: LiveAxis | None, in_: LiveAxis | None) -> None:
        """Gives the leaf the widths of pruned experts; the parameters already have the stacked sizes."""
        self.live_out, self.live_in = out, in_
        device = next(self.parameters()).device
        self.out_widths = None if out is None else out.widths(device)
        self.in_widths = None if in_ is None else in_.widths(device)
        for widths, numbers in self._widths():
            note_widths(widths, numbers)

    def _widths(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The width tensors with the numbers that they were made of."""
        for widths, axis in ((self.out_widths, self.live_out), (self.in_widths, self.live_in)):
            if widths is not None and axis is not None:
                yield widths, tuple(count * axis.copies for count in axis.counts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills a copy, deep or unpickled; its width tensors are others, without notes."""
        super().__setstate__(state)
        for widths, numbers in self._widths():
            has_values = is_in_memory(widths) and not widths.is_meta
            if has_values and widths.tolist() == list(numbers):  # nobody has written to them
                note_widths(widths, numbers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        noted = {name: noted_widths(getattr(self, name)) for name in ("out_widths", "in_widths")}
        result = super()._apply(fn, recurse)  # on another device buffers are other tensors
        for name, numbers in noted.items():
            if numbers is not None:
                note_widths(getattr(self, name), numbers)
        return result

    def share(self, rows: Rows) -> None:
        """Lets groups share weights. `rows` has for each group its row of the parameters, ascending unless pruned."""
        self.rows = rows
        device = next(self.parameters()).device
        self.weight_index = torch.tensor(rows, dtype=torch.int32, device=device)

    @property
    def sharing(self) -> Sharing | None:
        """The key of this leaf's plan: `rows`, and whether groups that share count as one group; None without rows."""
        return None if self.rows is None else (self.rows, self.out_widths is None and self.in_widths is None)

    def shared_plan(self, plan: RoutingPlan) -> RoutingPlan:
        """The plan of the groups as a leaf that shares weights needs it.

        Groups that share weights count as one group, which fills tiles better, unless their widths differ.
        """
        assert self.weight_index is not None and self.sharing is not None
        if self.sharing[1]:
            return plan.merged(self.weight_index, self.num_experts)
        return plan.with_weight_index(self.weight_index)

    def current_plan(self, plan: RoutingPlan | None) -> RoutingPlan:
        """The plan by which this leaf finds its weights.

        Args:
            plan: of the groups; None takes that of the running forward.

        Raises:
            ValueError: there is none.
        """
        return self._plan_within(None if self.routing is None else self.routing.running, plan)

    def _plan_within(self, running: Running | None, plan: RoutingPlan | None) -> RoutingPlan:
        if plan is None:
            plan = _running_plan(running)
        if self.rows is None:
            return plan
        known = running.shared.get(self.sharing) if running is not None and plan is running.plan else None
        return known or self.shared_plan(plan)

    def operands(
        self, dtype: torch.dtype, plan: RoutingPlan | None = None
    ) -> tuple[Tensor, Tensor | None, RoutingPlan]:
        """What a forward computes with.

        Args:
            dtype: of the layer's input.
            plan: of the groups; None takes that of the running forward.

        Returns:
            The weight, the bias and the `current_plan`. Under autocast weight and bias are copies in the lower
            precision. The bias is zero for experts whose unit has width 0, since such a block is only its skip path.
        """
        running = None if self.routing is None else self.routing.running
        weight, bias = self.weight, self.bias
        if running is not None and running.copies is not None:
            of = running.copies.of
            weight, bias = of(weight, dtype), None if bias is None else of(bias, dtype)
        if bias is not None and self.closing_gate is not None:
            if not torch.compiler.is_compiling():
                check_memory(bias=bias)
            bias = torch.where(self.closing_gate, bias, 0)
        return weight, bias, self._plan_within(running, plan)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The stacked parameters by the names that they have in the dense layer."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """Copies of one expert's parameters by name, in the dense layer's layout and at their own live size."""
        state = {}
        for name, parameter in self.named_parameters():
            value = parameter[self.row_of(expert)][self._live_index(parameter, expert)]
            state[name] = value.reshape(self._dense_shape(name, value.shape)).contiguous()
        return state

    @torch.no_grad()
    def load_expert(self, expert: int, state: Mapping[str, Tensor]) -> None:
        """Writes what `expert_state` gives into the parameters.

        Entries past the expert's widths become zero, unless another group shares the row.
        """
        row = self.row_of(expert)
        alone = self.rows is None or self.rows.count(row) == 1
        for name, parameter in self.named_parameters():
            target, index = parameter[row], self._live_index(parameter, expert)
            shape = (*index[0].shape, *target.shape[index[0].dim() :])
            if state[name].shape != self._dense_shape(name, shape):
                raise invalid(name, tuple(state[name].shape), f"the shape {shape} that expert {expert} has")
            value = state[name].to(parameter.device, parameter.dtype).reshape(shape)
            if alone:
                target.zero_()
            target[index] = value

    def dense(self, expert: int) -> nn.Module:
        """One expert's layer as the ordinary layer that this leaf was packed from; not for pruned experts."""
        like = next(self.parameters())  # the leaf may have moved since it was packed
        layer = copy.deepcopy(self.template[0]).to(like.dtype).to_empty(device=like.device)
        layer.load_state_dict(self.expert_state(expert))
        return layer.train(self.training)

    def row_of(self, group: int) -> int:
        """The row of the parameters that a group's expert uses."""
        return group if self.rows is None else self.rows[group]

    def _live_index(self, parameter: Tensor, expert: int) -> tuple[Tensor, ...]:
        """Indices of the expert's live entries on the channel axes of its slice of a parameter."""
        axes = (self.live_out, self.live_in)[: parameter.dim() - 1]
        positions = [
            torch.arange(size, device="cpu") if axis is None else axis.positions(expert)
            for size, axis in zip(parameter.shape[1:3], axes, strict=True)
        ]
        return tuple(index.to(parameter.device) for index in torch.meshgrid(*positions, indexing="ij"))

    def _dense_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks, so that its `__call__` must run."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _running_plan(running: Running | None) -> RoutingPlan:
    """The plan of the running forward; ValueError if there is none."""
    if running is not None:
        return running.plan
    if not torch.compiler.is_compiling() and torch._C._current_autograd_node() is not None:
        remedy = (
            "a part of the model's output as what is differentiated: a checkpoint computes layers again here whose "
            "forward is not reached from the output. Return such an auxiliary loss with the output, or compute it "
            "outside the checkpoint"
        )
        raise invalid("plan", None, remedy)
    raise invalid("plan", None, "a RoutingPlan, or a call from within RoutedModel's forward")
