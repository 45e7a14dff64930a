"""Modules that no kernel serves: they run once for each group of the batch, with the parameters of its expert.

That is how parameters of a module's own (`self.scale = nn.Parameter(...)`) reach what its forward does with them, and
how layers without a routed kernel (grouped and dilated convolutions, layers of other packages) are packed. The module's
forward sees the samples of one group at a time, as a dense expert would. Layers inside it are routed layers all the
same, each launched once per group.

What it costs: one launch per group, and on a GPU the host waits for the sizes of the groups, so that such a model is
neither captured in CUDA graphs nor compiled as one graph.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from tdc_fast.errors import invalid
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.nn.plan_scope import Running
from tdc_fast.nn.sample_arguments import map_samples
from tdc_fast.nn.sharing import Rows
from tdc_fast.ops.plan import RoutingPlan


def holders(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a module that are not packed on their own.

    These are lists of parameters, the output projection of torch's attention, which reads its parameters
    directly, and the norm of diffusers' attention, which checks its class.
    """
    whole = isinstance(module, nn.MultiheadAttention)
    asked = "norm_cross" if hasattr(module, "norm_encoder_hidden_states") else None
    return {
        name: child
        for name, child in module.named_children()
        if whole or name == asked or isinstance(child, nn.ParameterList | nn.ParameterDict)
    }


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module's own forward reads, by name: its direct ones, and those of its `holders`."""
    own = dict(module.named_parameters(recurse=False))
    for name, child in holders(module).items():
        own |= {f"{name}.{key}": parameter for key, parameter in child.named_parameters()}
    return own


class PerGroup(RoutedLeaf):
    """A module with parameters of its own, each stacked over the experts: (E, ...).

    It stands in for the module: it has the module's parameters, buffers and children under the same names, and other
    attributes are read from and written to the module.

    Args:
        module: the module, whose children are routed already. It becomes part of this one.
        path: its path, for errors.
        stacked: the stacked parameters by name.
    """

    in_autocast_dtype = False  # torch's own operators cast them
    _inner: tuple[nn.Module, ...]

    def __init__(self, module: nn.Module, path: str, stacked: Mapping[str, nn.Parameter]) -> None:
        super().__init__(len(next(iter(stacked.values()))))
        taken = sorted(vars(self).keys() & vars(module).keys() - vars(nn.Module()).keys())
        taken += [name for name in (*module._parameters, *module._buffers, *module._modules) if hasattr(self, name)]
        if taken:
            raise invalid(f"module {path!r}", taken[0], "another name for this attribute, which a packed module needs")
        self.training, self._path, self._stacked = module.training, path, tuple(stacked)
        own = tuple(module._buffers)
        self._buffers.update(module._buffers)
        self._non_persistent_buffers_set |= module._non_persistent_buffers_set
        self._parameters, self._modules = module._parameters, module._modules
        module._buffers = self._buffers
        self._own_buffers = own
        # Attributes and hooks that are its own methods: `self.branch = self._first`.
        self._with_methods = [key for key, value in vars(module).items() if _rebound(value, module, self) is not value]
        for name, parameter in stacked.items():
            holder, _, key = name.rpartition(".")
            (self._modules[holder] if holder else self)._parameters[key] = parameter  # type: ignore[union-attr]
        self.__dict__["_inner"] = (module,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_inner")
            if inner is None or name.startswith("__"):
                raise
            return getattr(inner[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_inner")
        if inner is not None and name not in self.__dict__ and name in vars(inner[0]):
            setattr(inner[0], name, value)
        else:
            super().__setattr__(name, value)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The stacked parameters by name."""
        return {name: self.get_parameter(name) for name in self._stacked}

    def _current_parameters(self) -> dict[str, Tensor]:
        """The same, or the tensors that stand in their places for a call (`torch.func.functional_call`)."""
        owners = (name.rpartition(".") for name in self._stacked)
        return {f"{owner}{dot}{key}": getattr(self.get_submodule(owner), key) for owner, dot, key in owners}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, for one group after the other.

        Args:
            *args: as the module takes them. Every tensor whose first dimension is the batch, also in dicts, lists and
                tuples, has an entry per sample; at least one must be there unless all that the module returns has a
                first dimension of 1.
            **kwargs: likewise.

        Returns:
            What the module returns, put together: tensors with an entry per sample of the group.

        Raises:
            ValueError: naming the module, when the batch cannot be divided or the results cannot be put together.
        """
        plan = self.current_plan(None)
        bounds, rows = plan.offsets.tolist(), plan.weight_index.tolist()
        parts = [(rows[g], a, b) for g, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b] or [(rows[0], 0, 0)]
        experts = {name: parameter.unbind(0) for name, parameter in self._current_parameters().items()}
        results, batch = [], plan.batch_size
        for row, start, stop in parts:
            view = self._of_expert({name: of_rows[row] for name, of_rows in experts.items()})
            given = _slices((args, kwargs), slice(start, stop), batch, self._path)
            results.append(self._run(view, start, stop, *given))
            self._buffers.update({name: view._buffers[name] for name in self._own_buffers})  # it may assign to them
        sizes = [stop - start for _, start, stop in parts]
        return _put_together(results, sizes, self._path)

    def _run(self, view: nn.Module, start: int, stop: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The module on samples start to stop; the layers in it get the plan of these samples."""
        running = None if self.routing is None else self.routing.running
        inside = (module for child in self.children() for module in child.modules())
        if running is None or self.routing is None or not any(isinstance(module, RoutedLeaf) for module in inside):
            return view(*args, **kwargs)
        whole = running.plan
        plan = RoutingPlan.from_groups(whole.groups[start:stop], whole.num_groups, whole.weight_index)
        return self.routing.run(view, Running(plan, running.copies), *args, **kwargs)

    def _of_expert(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """The module with these parameters: an object of its own, so that threads do not see each other's."""
        inner = self._inner[0]
        modules = dict(self._modules)
        for name, holder in holders(inner).items():
            modules[name] = _with_parameters(holder, dict(holder._parameters))
        view = _with_parameters(inner, dict(self._parameters))
        view.__dict__.update({key: _rebound(vars(view)[key], inner, view) for key in self._with_methods})
        view.__dict__.update(_modules=modules, training=self.training)
        view.__dict__["_buffers"] = {name: self._buffers[name] for name in self._own_buffers}
        for name, value in parameters.items():
            owner, _, key = name.rpartition(".")
            (modules[owner] if owner else view)._parameters[key] = value  # type: ignore[union-attr,assignment]
        return view

    @torch.no_grad()
    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """Copies of one expert's own parameters by name."""
        return {name: stack[self.row_of(expert)].clone() for name, stack in self.own_parameters().items()}

    @torch.no_grad()
    def load_expert(self, expert: int, state: Mapping[str, Tensor]) -> None:
        """Writes what `expert_state` gives into the parameters."""
        for name, stack in self.own_parameters().items():
            stack[self.row_of(expert)].copy_(state[name])

    def module_of(self, expert: int, memo: dict[int, Any]) -> nn.Module:
        """The module as it was packed, with one expert's parameters; `memo` has the copies of what is in it."""
        state = self.expert_state(expert)
        own = {name: nn.Parameter(value, self.get_parameter(name).requires_grad) for name, value in state.items()}
        module = self._of_expert(own)
        memo = memo | {id(module): module, id(self._inner[0]): module}  # what it holds may refer to it
        module.__dict__.update({key: copy.deepcopy(value, memo) for key, value in vars(module).items()})
        return module


def dense_module(module: nn.Module) -> nn.Module:
    """The module that a packed one stands in for: itself, unless it runs once per group."""
    return module._inner[0] if isinstance(module, PerGroup) else module


@torch.no_grad()
def stacked_parameters(modules: Sequence[nn.Module], num_experts: int) -> dict[str, nn.Parameter]:
    """The own parameters of a module, stacked over the experts: (E, ...) by name.

    `modules` holds the module of every expert, or one that all experts start from.
    """
    stacked = {}
    for name, parameter in own_parameters(modules[0]).items():
        rows = [module.get_parameter(name).to(parameter.device, parameter.dtype) for module in modules]
        value = torch.stack(rows if len(rows) == num_experts else rows * num_experts)
        stacked[name] = nn.Parameter(value, parameter.requires_grad)
    return stacked


def pack_per_group(
    base: nn.Module,
    stacked: Mapping[str, Mapping[str, nn.Parameter]],
    rows_of: Mapping[str, Rows],
    memo: dict[int, Any],
) -> None:
    """Makes the modules that run once per group.

    Args:
        base: the model that is packed.
        stacked: their stacked parameters, by path and name.
        rows_of: the row of each group, by path, for those whose parameters groups share.
        memo: of a deep copy of `base`; receives them.
    """
    for path, parameters in stacked.items():
        own = own_parameters(base.get_submodule(path))
        memo.update({id(own[name]): stack for name, stack in parameters.items()})
    for path in reversed(list(stacked)):  # what is inside first
        module = base.get_submodule(path)
        leaf = PerGroup(copy.deepcopy(module, memo), path, stacked[path])
        if path in rows_of:
            leaf.share(rows_of[path])
        memo[id(module)] = leaf


def _with_parameters(module: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """A shallow copy of a module with other parameters, also such as are no `nn.Parameter`."""
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_parameters": parameters}
    return twin


def _rebound(value: Any, inner: nn.Module, view: nn.Module) -> Any:
    """A method of `inner` as that of `view`, also in a partial function, a container or hooks; else the value."""
    if isinstance(value, MethodType) and value.__self__ is inner:
        return MethodType(value.__func__, view)
    if type(value) is functools.partial:
        function = _rebound(value.func, inner, view)
        return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
    if type(value) in (list, tuple):
        parts = [_rebound(part, inner, view) for part in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if type(value) in (dict, OrderedDict):
        values = _rebound([*value.values()], inner, view)
        return value if all(map(operator.is_, values, value.values())) else type(value)(zip(value, values, strict=True))
    return value


def _slices(given: Any, part: slice, batch: int, path: str) -> Any:
    if part == slice(0, batch):
        return given
    return map_samples(lambda value: value[part], given, f"arguments of {path!r}", batch, None)


def _put_together(results: list[Any], sizes: list[int], path: str) -> Any:
    """Joins the results of the groups along the samples; ValueError where they are not per sample."""
    leaves, spec = zip(*(_pytree.tree_flatten(result) for result in results), strict=True)
    if any(other != spec[0] for other in spec):
        raise invalid(f"results of {path!r}", "another structure from group to group", "the same one for all groups")
    return _pytree.tree_unflatten([_concatenated(parts, sizes, path) for parts in zip(*leaves, strict=True)], spec[0])


def _concatenated(parts: Sequence[Any], sizes: list[int], path: str) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if all(part.shape[:1] == (size,) for part, size in zip(parts, sizes, strict=True)):
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if all(part.shape[:1] == (1,) for part in parts):  # one for all samples of a group
        return torch.cat([part.expand(size, *part.shape[1:]) for part, size in zip(parts, sizes, strict=True)])
    raise invalid(
        f"module {path!r}",
        f"a result of shape {tuple(parts[0].shape)} for {sizes[0]} samples",
        "samples in the first dimension of what a module with parameters of its own, or without a routed kernel, "
        "takes and returns",
    )
