"""`TDCModel`: a packed model as a model of diffusers, saved and loaded as diffusers' models are."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdc_fast.atomic import write_bytes
from tdc_fast.errors import invalid, require
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.per_group import dense_module
from tdc_fast.nn.timesteps import one_per_sample, timestep_argument
from tdc_fast.nn.units import units_of
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tdc_fast.ops.checks import can_read
from tdc_fast.routing import TimestepGroups

diffusers = require("diffusers", "diffusers")
_configuration = require("diffusers.configuration_utils", "diffusers")
ModelMixin: Any = diffusers.ModelMixin
"""A pipeline with a TDCModel is loaded only where diffusers finds this name beside the class."""
_BASES: Any = (ModelMixin, diffusers.ConfigMixin)
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")

CODE_FILE = "modeling_tdc.py"
_CODE = '''"""Loads the packed experts in this folder: AutoModel.from_pretrained(folder, trust_remote_code=True)."""

from tdc_fast.diffusers_models import TDCModel

__all__ = ["TDCModel"]
'''


class TDCModel(*_BASES):  # type: ignore[misc]
    """Experts per group of timesteps in place of a denoiser of diffusers.

    It is called as the denoiser is, by any pipeline and scheduler that passes timesteps: every sample gets the expert
    of its timestep. Where a scheduler makes timesteps between the trained ones, the nearest decides. Schedulers that
    pass noise levels instead, such as EDMEulerScheduler and IPNDMScheduler, cannot be used; timesteps in host memory
    are checked for that (a GPU would have to be waited for)::

        model = TDCModel.from_routed(pack_experts(unet, groups, widths))
        DDIMPipeline(model, scheduler)(batch_size=4)
        model.save_pretrained("tdc")  # config.json, safetensors (in shards where large), modeling_tdc.py
        model = AutoModel.from_pretrained("tdc", trust_remote_code=True, torch_dtype=torch.bfloat16)

    Attributes:
        routed: the `RoutedModel`.
        config: the base's configuration, with the arguments below.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _supports_param_buffer_assignment = False  # filters stay as they are in memory, with input channels innermost

    @_configuration.register_to_config
    def __init__(
        self,
        base: Mapping[str, Any],
        boundaries: Sequence[int],
        widths: Sequence[Mapping[str, int]] | None = None,
        base_hash: str = "",
        per_sample: Sequence[str] | None = None,
        shared_layers: str = "",
        auto_map: Mapping[str, str] | None = None,
    ) -> None:
        """Build the model with random weights.

        Args:
            base: the denoiser's configuration, with its class of diffusers as `_class_name`.
            boundaries: the timestep groups' boundaries, N + 1 integers.
            widths: channels by unit of each pruned expert; None where no expert is pruned.
            base_hash: `base_hash` of the base that was pruned.
            per_sample: as for `pack_experts`.
            shared_layers: as for `pack_experts`.
            auto_map: where `AutoModel` finds this class; it is kept in the configuration.

        Raises:
            ValueError: naming what does not fit.
        """
        super().__init__()
        groups = TimestepGroups(boundaries)
        dense = base_class(base.get("_class_name")).from_config(dict(base))
        plan = None if widths is None else _plan(dense, groups, widths, base_hash)
        self.routed = pack_experts(
            [dense] * groups.num_groups, groups, plan, per_sample=per_sample, shared_layers=shared_layers
        )

    @classmethod
    def from_routed(cls, routed: RoutedModel) -> TDCModel:
        """The model around a packed model of a class of diffusers, which it holds itself, not a copy.

        Args:
            routed: the packed model.

        Raises:
            ValueError: the packed model is of another class.
        """
        if not isinstance(routed, RoutedModel):
            raise invalid("routed", type(routed).__name__, "a RoutedModel, which pack_experts makes")
        dense: Any = dense_module(routed.model)
        base_class(type(dense).__name__, type(dense))
        plan = routed.widths
        model = cls.__new__(cls)
        ModelMixin.__init__(model)
        model.register_to_config(
            base={**_public(dense.config), "_class_name": type(dense).__name__},
            boundaries=list(routed.groups.boundaries),
            widths=None if plan is None else [plan.expert_widths(index) for index in range(routed.num_experts)],
            base_hash="" if plan is None else plan.base_hash,
            per_sample=None if routed.per_sample is None else list(routed.per_sample),
            shared_layers=routed.shared_layers,
            auto_map={"AutoModel": f"{Path(CODE_FILE).stem}.{cls.__name__}"},
        )
        model.routed = routed
        return model.train(routed.training)

    @property
    def config(self) -> Any:
        """The base's configuration, which pipelines read, with this model's own."""
        own = self._internal_dict
        return _configuration.FrozenDict({**_public(own["base"]), **own})

    @property
    def groups(self) -> TimestepGroups:
        """Which expert a timestep belongs to."""
        return self.routed.groups

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output; arguments as for the denoiser, `return_dict` among them.

        The timestep is a number, a tensor of one number or one of each sample (B,).

        Raises:
            ValueError: for arguments that cannot be divided among the experts (see `RoutedModel`), for more arguments
                than the denoiser takes or one that is given twice, and for a timestep outside 0 to T.
        """
        denoiser = dense_module(self.routed.model)
        place, _ = timestep_argument(denoiser)
        names = list(inspect.signature(denoiser.forward).parameters)
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names):
            raise invalid("arguments", f"{len(args)} in order", f"at most {len(names)}, as the denoiser has: {names}")
        for name in kwargs:
            if name in given:
                raise invalid(name, "two values", "one: it was given in order and by name")
        given |= kwargs
        for name in (names[0], names[1 + place]):
            if given.get(name) is None:
                raise invalid(name, None, "an argument of every call")
        x, t = given.pop(names[0]), given.pop(names[1 + place])
        of_samples = one_per_sample(t, x)
        _check_range(t, self.routed.groups.num_timesteps)
        return self.routed(x, of_samples, expert_ids=self._experts_of(of_samples), **given)

    def _experts_of(self, t: Tensor) -> Tensor:
        groups = self.routed.groups
        return groups.group_of(t.round().to(torch.int64).clamp(0, groups.num_timesteps - 1))

    def expert(self, index: int) -> nn.Module:
        """Expert `index` as a plain model of diffusers, physically smaller where it is pruned."""
        return self.routed.expert(index)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json, the weights and the code file that `AutoModel` needs.

        Args:
            save_directory: the folder.
            **kwargs: as for diffusers' models: `max_shard_size`, `variant` and so on.

        Raises:
            ValueError: for layers with adapters, such as LoRA, which the configuration does not make.
        """
        check_no_adapters(self.routed)
        hook = self.register_state_dict_post_hook(_contiguous)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            hook.remove()
        if kwargs.get("is_main_process", True):
            write_bytes(Path(save_directory) / CODE_FILE, _CODE.encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; arguments as for diffusers' models.

        The model is built whole before its weights are read: `low_cpu_mem_usage` is False. A `device_map` may name one
        device, where the model goes then.

        Raises:
            ValueError: for a `device_map` that spreads the model, as all its layers take one plan of a batch, and for
                weights that are not in the file: diffusers would only warn, and leave random ones.
        """
        device = _one_device(kwargs.pop("device_map", None))
        asks_how_it_went = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "low_cpu_mem_usage": False, "output_loading_info": True}
        )
        for name in info["missing_keys"]:
            raise invalid("weights", f"none for {name}", "a file of all weights that its config.json asks for")
        model = model if device is None else model.to(device)
        return (model, info) if asks_how_it_went else model


def base_class(name: Any, actual: type | None = None) -> Any:
    """The class of diffusers of this name; ValueError where there is none, or `actual` is another one."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)) or actual not in (None, found):
        raise invalid("base", name, "a class of models that diffusers has, such as UNet2DModel")
    return found


def check_no_adapters(model: nn.Module) -> None:
    """ValueError for layers that peft has wrapped: what is saved of them fits no model that a configuration makes."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            remedy = "plain layers: pack the experts again after fuse_lora() and unload_lora() of each expert(i)"
            raise invalid(f"module {name!r}", "a layer with adapters", remedy)


def _one_device(device_map: Any) -> torch.device | None:
    """The device that a device_map names; None for None."""
    if device_map is None:
        return None
    named = [*device_map.values()] if isinstance(device_map, Mapping) else [device_map]
    remedy = 'one device, such as "cuda" or {"": 0}; layers wait elsewhere by enable_model_cpu_offload() of a pipeline'
    if len(set(named)) != 1 or named[0] in _SPREAD:
        raise invalid("device_map", device_map, remedy)
    try:
        return torch.device(named[0])
    except (RuntimeError, TypeError) as error:
        raise invalid("device_map", device_map, remedy) from error


def _check_range(t: float | Tensor, num_timesteps: int) -> None:
    """ValueError, or a warning where it is not certain, for timesteps in host memory that are none."""
    value = torch.as_tensor(t)
    if not value.numel() or not can_read(value):
        return
    low, high = (float(bound) for bound in torch.aminmax(value.to(torch.float64)))
    remedy = (
        "It chooses the expert; noise levels, as EDMEulerScheduler, EDMDPMSolverMultistepScheduler and IPNDMScheduler "
        "pass them, do not: take a scheduler that passes timesteps, such as DDIMScheduler or EulerDiscreteScheduler, "
        f"with num_train_timesteps={num_timesteps}"
    )
    if not 0 <= low <= high <= num_timesteps:  # those of flow matching go from T to 1
        wrong = low if low < 0 else high
        raise invalid("timestep", wrong, f"one from 0 to {num_timesteps - 1}. {remedy}")
    if 0 < low < 1:
        warnings.warn(f"timestep: between 0 and 1, which is rare for timesteps. {remedy}", stacklevel=3)


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _plan(dense: nn.Module, groups: TimestepGroups, widths: Sequence[Mapping[str, int]], base_hash: str) -> WidthPlan:
    """The plan of packed weights, whose channels are in order already."""
    units = units_of(dense)
    experts = []
    for index, live in enumerate(widths):
        for name in sorted(live.keys() ^ {unit.name for unit in units}):
            raise invalid(f"widths[{index}]", name, "exactly the units of the base; this one is missing or unknown")
        experts.append({unit.name: ExpertUnit(tuple(range(unit.num_atoms)), live[unit.name]) for unit in units})
    return WidthPlan(base_hash=base_hash, boundaries=groups.boundaries, experts=tuple(experts))


def _contiguous(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Safetensors takes no other memory order; filters are stored with their input channels innermost."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.contiguous()
