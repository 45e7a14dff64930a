"""Packing N experts into one model, and taking one out again."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tdc_fast.errors import integer, invalid
from tdc_fast.graphs import is_capturing
from tdc_fast.nn.architectures import check_same_architecture, dotted_path
from tdc_fast.nn.blocks import narrow
from tdc_fast.nn.casts import Copies, autocast_key
from tdc_fast.nn.leaf import LiveAxis, RoutedLeaf
from tdc_fast.nn.leaves import find_leaves, note_path, with_path
from tdc_fast.nn.per_group import PerGroup, dense_module, pack_per_group, stacked_parameters
from tdc_fast.nn.plan_scope import Kept, PlanScope, Running, UsesPlan
from tdc_fast.nn.sample_arguments import RESULT, checked_names, map_samples
from tdc_fast.nn.sharing import Rows, in_common_orders, shared_rows, sharers
from tdc_fast.nn.stacking import apart_where_closed, check_equal, fill, slices_by_leaf
from tdc_fast.nn.timesteps import groups_of, one_per_sample, other_arguments, timestep_argument
from tdc_fast.nn.twins import routed_twin
from tdc_fast.nn.units import Prunable, PruningUnit, module_of, set_unit_width, units_of, with_memory, without_weights
from tdc_fast.nn.width_plan import WidthPlan, base_hash
from tdc_fast.ops.checks import require_tensors
from tdc_fast.ops.plan import Integers, as_integers
from tdc_fast.routing import RoutingPlan, TimestepGroups


class RoutedModel(nn.Module):
    """One model that computes every sample with the expert of its timestep's group; `pack_experts` makes it.

    Its modules, and hooks on them, see the samples sorted by group; what the model returns is in the caller's order.

    A state dict also holds the group boundaries and the units' widths; loading one that differs in them is an error.

    Attributes:
        model: the base with routed layers, whose parameters are those of all experts, (E, ...).
        groups: which expert a timestep belongs to.
        widths: the `WidthPlan` of pruned experts, else None.
        routing: holds the plan of the running forward.
        per_sample: the arguments that have an entry per sample, as `pack_experts` takes them.
        shared_layers: as `pack_experts` takes them, in one string.
        num_experts: N, one per group.
        skeleton: (the base without weights,), from which pruned experts are cut; () if no expert is pruned, or if the
            base has a method `with_widths`.
        shared: the layers of which groups share the weights, by path: for each group its row of the parameters.
    """

    group_boundaries: Tensor
    unit_widths: Tensor

    def __init__(
        self,
        model: nn.Module,
        groups: TimestepGroups,
        widths: WidthPlan | None,
        routing: PlanScope,
        per_sample: tuple[str, ...] | None = None,
        shared_layers: str = "",
    ) -> None:
        super().__init__()
        self.model, self.groups, self.widths, self.routing = model, groups, widths, routing
        self.per_sample, self.shared_layers = per_sample, shared_layers
        self._timestep = timestep_argument(dense_module(model))
        self.skeleton: tuple[nn.Module, ...] = ()
        leaves = self.routed_leaves().values()
        self._computing = [leaf for leaf in leaves if leaf.in_autocast_dtype]
        self.num_experts = groups.num_groups
        self._sharing = {leaf.sharing: leaf for leaf in leaves if leaf.rows is not None}  # one leaf of every kind
        device = next((parameter.device for parameter in model.parameters()), None)
        for name, value in self._identity().items():
            self.register_buffer(name, value.to(device))

    def forward(
        self, x: Tensor, t: Tensor | float, *args: Any, expert_ids: Integers | None = None, **kwargs: Any
    ) -> Any:
        """Compute a batch of samples from any mix of groups.

        Args:
            x: samples (B, ...).
            t: original timesteps: a tensor (B,), or a number or a tensor of one number for all samples. Floats must be
                whole numbers; a GPU rounds them, as it would have to wait for a check. The model gets a tensor (B,) of
                their own dtype, as its second argument; where its forward has an argument `timestep`, `timesteps` or
                `t` further back, as that.
            *args: the model's other arguments in order. What has an entry per sample, such as labels, is sorted with x:
                unless `pack_experts` was told otherwise (`per_sample`), every tensor whose first dimension is B, also
                in dicts, lists and tuples. All else is passed on unchanged; what a function or an iterator holds
                cannot be seen, so its tensors keep the caller's order.
            expert_ids: the expert of each sample, integers (B,); None takes that of its timestep's group. Training
                with soft group boundaries passes them.
            **kwargs: likewise.

        Returns:
            The model's output, in the order of x; in an output of several tensors, the same rule tells which have an
            entry per sample.

        Raises:
            ValueError: for timesteps that are not whole numbers or are out of range, for wrong shapes, and for an
                argument that may have entries per sample but cannot be sorted: an array of numpy or a list of texts of
                length B, or tensors in an object of another kind.
        """
        require_tensors(x=x)
        if not x.dim():
            raise invalid("x", x, "a torch tensor with one entry per sample")
        t = one_per_sample(t, x)
        ids = groups_of(self.groups, t) if expert_ids is None else as_integers("expert_ids", expert_ids, t.device)
        if ids.shape != t.shape:
            raise invalid("expert_ids", tuple(ids.shape), f"one expert for each of the {x.shape[0]} samples")
        plan = RoutingPlan.from_groups(ids, self.num_experts)
        batch, named = x.shape[0], self.per_sample
        args = tuple(
            map_samples(plan.sort, value, name, batch, named)
            for name, value in zip(self._names_of(len(args)), args, strict=True)
        )
        kwargs = {name: map_samples(plan.sort, value, name, batch, named) for name, value in kwargs.items()}
        place, timestep = self._timestep
        if timestep is not None and len(args) < place:
            kwargs[timestep] = plan.sort(t)
        else:
            args = (*args[:place], plan.sort(t), *args[place:])
        shared = {how: leaf.shared_plan(plan) for how, leaf in self._sharing.items()}
        given_ids: tuple[Tensor, ...] = ()
        if x.device.type == "cpu":  # only there are ids read
            leaves = _pytree.tree_leaves((args, kwargs))
            given_ids = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 1)
        running = Running(plan, self._copies(x.device), shared, given_ids)
        try:
            out = self.routing.run(self.model, running, plan.sort(x), *args, **kwargs)
        except ValueError as error:
            raise with_path(error, self.model) from error
        except RuntimeError as error:
            note_path(error, self.model)
            raise
        if isinstance(out, Tensor):
            return plan.unsort(out)
        if named is not None and not any(name.partition(".")[0] == RESULT for name in named):
            named = None
        return map_samples(plan.unsort, out, RESULT, batch, named)

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Within the block, forwards under autocast share one cast of the parameters; outside, each makes its own.

        For the microbatches of a step, with their backwards: the parameters must not change inside. A CUDA graph that
        is captured inside has casts of its own, as its replays may come after the block.
        """
        before, self.routing.kept = self.routing.kept, Kept(is_capturing(), {})
        try:
            yield
        finally:
            self.routing.kept = before

    def _copies(self, device: torch.device) -> Copies | None:
        """The parameters in the dtype of autocast, which one launch or a few make of all; None without autocast."""
        key = autocast_key(device)
        if key is None:
            return None
        within = self.routing.kept
        kept = {} if within is None or within.captured != is_capturing() else within.copies
        if key not in kept:
            parameters = (value for leaf in self._computing for value in leaf.own_parameters().values())
            kept[key] = Copies(parameters, key[0])
        return kept[key]

    def _names_of(self, count: int) -> list[str]:
        """The names of the first `count` arguments of the model after x and t."""
        if count == 0:
            return []
        names = other_arguments(dense_module(self.model))
        return [*names[:count], *(f"args.{index}" for index in range(len(names), count))]

    def routed_leaves(self) -> dict[str, RoutedLeaf]:
        """The routed leaves by their path in the dense model."""
        return {name: leaf for name, leaf in self.model.named_modules() if isinstance(leaf, RoutedLeaf)}

    @property
    def shared(self) -> dict[str, Rows]:
        """See the class."""
        return {name: leaf.rows for name, leaf in self.routed_leaves().items() if leaf.rows is not None}

    def expert(self, index: int) -> nn.Module:
        """Expert `index` as an ordinary module of the base's class, with a copy of its weights.

        A pruned expert is physically smaller; a unit of width 0 leaves only the skip path. For timesteps of group
        `index` its output equals this model's. It runs on torch's kernels; `tdc_fast.for_inference` runs it on the
        routed ones, and in 16 bits.
        """
        index = self._checked_index(index)
        if self.widths is not None:
            dense = self._narrowed(self.widths, index)
            dense.load_state_dict(self.expert_state(index))
        else:
            leaves = self.routed_leaves().values()
            memo: dict[int, Any] = {id(self.routing): self.routing}  # not part of the expert, so nothing to copy
            memo |= {id(leaf): leaf.dense(index) for leaf in leaves if not isinstance(leaf, PerGroup)}
            for leaf in reversed(leaves):  # what is inside first
                if isinstance(leaf, PerGroup):
                    memo[id(leaf)] = leaf.module_of(index, memo)
            dense = copy.deepcopy(self.model, memo)
            _set_routing(dense, None)
        return dense

    def _checked_index(self, index: int | Tensor) -> int:
        """The number of an expert, which may be an element of a tensor of numbers."""
        number: object = index
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_meta:
            number = index.item()
        return integer("index", number, 0, self.num_experts - 1)

    def expert_state(self, index: int) -> dict[str, Tensor]:
        """The state dict of `expert(index)`: the dense model's keys, copies at their own live sizes."""
        index = self._checked_index(index)
        state = {
            dotted_path(name, key): value
            for name, leaf in self._leaves_of(index).items()
            for key, value in leaf.expert_state(index).items()
        }
        own = self._buffers_of_model()
        return {**state, **{name: value.clone() for name, value in own.items()}}

    def load_expert_state(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Write what `expert_state(index)` gives into the stacked parameters.

        A layer that other groups share changes for them too.

        Raises:
            ValueError: naming a missing key, an unknown key or a wrong shape; nothing is written then.
        """
        expected = self.expert_state(index)
        for name in sorted(expected.keys() ^ state.keys()):
            raise invalid("state", name, "exactly the keys of expert_state(index); this key is missing or unknown")
        for name, value in expected.items():
            if value.shape != state[name].shape:
                raise invalid(f"state[{name!r}]", tuple(state[name].shape), f"shape {tuple(value.shape)}")
        for name, leaf in self._leaves_of(index).items():
            leaf.load_expert(index, {key: state[dotted_path(name, key)] for key in leaf.own_parameters()})

    def _leaves_of(self, expert: int) -> dict[str, RoutedLeaf]:
        """The routed leaves that this expert has, all but those inside a unit of width 0, by all their paths."""
        named = self.model.named_modules(remove_duplicate=False)
        leaves = {name: leaf for name, leaf in named if isinstance(leaf, RoutedLeaf)}
        if self.widths is None or all(unit.width for unit in self.widths.experts[expert].values()):
            return leaves
        present = {name for name, _ in self._narrowed(self.widths, expert).named_modules(remove_duplicate=False)}
        return {name: leaf for name, leaf in leaves.items() if name in present}

    def _narrowed(self, widths: WidthPlan, expert: int) -> nn.Module:
        """A dense model with the widths of an expert, uninitialised."""
        if isinstance(self.model, Prunable):
            return self.model.with_widths(widths.expert_widths(expert))
        model, like = copy.deepcopy(self.skeleton[0]), next(self.model.parameters())
        narrow(model, widths.expert_widths(expert))
        model = with_memory(model, like).train(self.model.training)
        return model if next(model.parameters()).dtype == like.dtype else model.to(like.dtype)

    def _buffers_of_model(self) -> dict[str, Tensor]:
        """Persistent buffers outside the leaves, which the experts share."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in self.model.state_dict().items() if name not in parameters}

    def _identity(self) -> dict[str, Tensor]:
        """What a state dict holds to tell which experts it is of."""
        experts = () if self.widths is None else self.widths.experts
        live = [[expert[name].width for name in sorted(expert)] for expert in experts]
        identity = {
            "group_boundaries": torch.tensor(self.groups.boundaries, dtype=torch.int64, device="cpu"),
            "unit_widths": torch.tensor(live, dtype=torch.int32, device="cpu").reshape(self.num_experts, -1),
        }
        if self._sharing:  # in a row for each leaf, so that a file of other sharing with the same shapes is refused
            own = [leaf.rows or range(self.num_experts) for leaf in self.routed_leaves().values()]
            identity["weight_rows"] = torch.tensor([list(rows) for rows in own], dtype=torch.int32, device="cpu")
        return identity

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        errors = args[-1]
        for name, own in self._identity().items():
            saved = state_dict.get(prefix + name)
            if saved is not None and (saved.shape != own.shape or not torch.equal(saved.cpu(), own)):
                errors.append(
                    f"{prefix}{name}: got {saved.tolist()}; expected {own.tolist()}: the file is of other experts"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def pack_experts(
    base_or_experts: nn.Module | Sequence[nn.Module],
    groups: TimestepGroups,
    widths: WidthPlan | None = None,
    *,
    per_sample: Collection[str] | None = None,
    shared_layers: str | Sequence[str] = "",
) -> RoutedModel:
    """One `RoutedModel` from N copies of a base, or from N models of one architecture.

    Any module can be packed whose layers take and return samples in their first dimension. Conv2d, Linear, GroupNorm,
    LayerNorm, Embedding, MultiheadAttention and 1x1 Conv1d layers of torch and of `tdc_fast.nn.layers` are computed for
    all samples at once; every other module with parameters of its own, convolutions with groups or dilation among them,
    runs once per group (`tdc_fast.nn.per_group`). A parameter that a module reads from another one, and what draws
    statistics from the batch, cannot be routed. The inputs are not changed.
    `tdc_fast.nn.verification.check_against_experts` shows whether a model of your own computes what its experts do.

    Args:
        base_or_experts: the base, or a sequence of N models; model i serves group i.
        groups: the N groups of timesteps.
        widths: for pruned experts: each expert's weights are permuted by the orders of its units and cut to its
            widths. The module then has `pruning_units()` and `with_widths()`, as the UNet does, or blocks in which
            `tdc_fast.nn.blocks` finds inner channels, as diffusers' UNets and transformers have.
        per_sample: names of the arguments of the model's forward, besides x and t, that have an entry per sample:
            `("y",)`, or `("cond.text",)` for a part of a dict, or `("return.0",)` for a part of an output of several
            tensors. Everything else is shared by the samples. None takes every tensor whose first dimension is the
            batch size, which is wrong for a shared tensor that happens to have that length.
        shared_layers: layers whose weights neighbouring groups share: a comma list of terms such as `"convolutions"`,
            `"level0:1"` or `"input_blocks.*:2"` (see `tdc_fast.nn.sharing.shared_rows`; the names are those of the
            base's `layer_sets()`, if it has them). Groups keep their own widths; they take the first channels of a
            common order, so a narrower group may keep no channel that a wider one drops.

    Raises:
        ValueError: naming a module that cannot be routed, experts that do not match, or what in `widths` does not fit
            (another base, other boundaries, an unknown unit, a wrong order or width); a name in `shared_layers` that
            no layer has, or experts that differ in a layer that they are to share.
    """
    if not isinstance(groups, TimestepGroups):
        raise invalid("groups", groups, "TimestepGroups, such as TimestepGroups.uniform(1000, 4)")
    if widths is not None and not isinstance(widths, WidthPlan):
        raise invalid("widths", widths, "a WidthPlan, or None")
    many = base_or_experts if isinstance(base_or_experts, Sequence) else [base_or_experts]
    if not all(isinstance(module, nn.Module) for module in many):
        raise invalid("base_or_experts", base_or_experts, "a module, or a sequence of modules")
    count = groups.num_groups
    shared = isinstance(base_or_experts, nn.Module)
    experts = [base_or_experts] * count if isinstance(base_or_experts, nn.Module) else list(base_or_experts)
    if len(experts) != count:
        raise invalid("base_or_experts", f"{len(experts)} experts", f"one for each of the {count} groups")
    base = experts[0]
    units: Sequence[PruningUnit] = ()
    if widths is not None:
        units = units_of(module_of(base, "base_or_experts"))
        widths.check(units, base=base_hash(base) if shared else None, boundaries=groups.boundaries)
    names = checked_names(per_sample, base)
    dense_leaves = find_leaves(base)
    if not shared:
        check_same_architecture(experts)
    rows_of = shared_rows(base, shared_layers, count, dense_leaves)
    if widths is not None and rows_of:
        widths = in_common_orders(widths, units, rows_of)

    slices = slices_by_leaf(units)
    routing, memo = PlanScope(), {}
    per_group: dict[str, dict[str, nn.Parameter]] = {}
    for name, layer in dense_leaves.items():
        axes = {
            dim: LiveAxis(tuple(expert[unit.name].width * part.scale for expert in widths.experts), part.copies)
            for dim, (unit, part) in slices.get(name, {}).items()
            if widths is not None
        }
        closes = "in" in axes and 0 in axes["in"].counts
        rows = apart_where_closed(rows_of[name], axes["in"].counts) if closes and name in rows_of else rows_of.get(name)
        members = [[group] for group in range(count)] if rows is None else sharers(rows)
        if rows is not None:
            check_equal(name, [[experts[group].get_submodule(name) for group in groups] for groups in members])
        layers_of_leaf = [layer] if shared else [experts[groups[0]].get_submodule(name) for groups in members]
        leaf = routed_twin(name, layer, len(members), axes.get("out"), axes.get("in"))
        if leaf is None:
            per_group[name] = stacked_parameters(layers_of_leaf, len(members))
            continue
        if rows is not None:
            leaf.share(rows)
        fill(leaf, layers_of_leaf, slices.get(name, {}), widths, members)
        if closes:
            gate = [[axes["in"].counts[groups[0]] > 0] for groups in members]
            leaf.closing_gate = torch.tensor(gate, device=next(leaf.parameters()).device)
        memo[id(layer)] = leaf
    pack_per_group(base, per_group, rows_of, memo)
    model = copy.deepcopy(base, memo)
    for unit in units:
        set_unit_width(model, unit, widths.max_width(unit.name))  # type: ignore[union-attr]
    _set_routing(model, routing)
    terms = shared_layers if isinstance(shared_layers, str) else ",".join(shared_layers)
    routed = RoutedModel(model, groups, widths, routing, names, terms).train(base.training)
    if widths is not None and not isinstance(base, Prunable):
        routed.skeleton = (without_weights(base),)
    return routed


def _set_routing(model: nn.Module, routing: PlanScope | None) -> None:
    for module in model.modules():
        if isinstance(module, UsesPlan):
            module.routing = routing
