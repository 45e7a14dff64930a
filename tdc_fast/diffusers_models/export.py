"""Experts as files that plain diffusers loads, without this library."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from tdc_fast.atomic import write_bytes, write_json
from tdc_fast.diffusers_models.model import base_class, check_no_adapters
from tdc_fast.diffusers_models.narrower import narrower
from tdc_fast.errors import invalid
from tdc_fast.nn import blocks
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.nn.units import units_of

CODE_FILE = "modeling_narrower.py"


def save_expert(routed: RoutedModel, index: int, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write one expert as a model of diffusers: config.json and diffusion_pytorch_model.safetensors.

    An expert of full width is of the base's own class. A pruned one is of a class `Narrower...`, which is written
    beside it and needs diffusers alone::

        AutoModel.from_pretrained(folder, trust_remote_code=True)

    Args:
        routed: a packed model of a class of diffusers.
        index: the expert.
        folder: where to write; it is made.
        **options: as for `save_pretrained` of diffusers' models.

    Raises:
        ValueError: no such expert, a model of another class, or layers with adapters, such as LoRA.
    """
    check_no_adapters(routed)
    expert: Any = routed.expert(index)
    base = base_class(type(expert).__name__, type(expert))
    widths = {} if routed.widths is None else routed.widths.expert_widths(index)
    full = {unit.name: unit.channels for skeleton in routed.skeleton for unit in units_of(skeleton)}
    cut = {name: width for name, width in widths.items() if width < full[name]}
    if cut:
        expert.__class__ = narrower(base)
        auto_map = {"AutoModel": f"{Path(CODE_FILE).stem}.{type(expert).__name__}"}
        expert.register_to_config(unit_widths=cut, auto_map=auto_map)
    expert.save_pretrained(folder, **options)
    if cut:
        write_bytes(Path(folder) / CODE_FILE, _code(base).encode())


def save_two_experts(routed: RoutedModel, folder: str | os.PathLike[str], **options: Any) -> float:
    """Write two experts as the two denoisers of a pipeline that changes from one to the other at a boundary.

    Such pipelines (those of Wan 2.2) have `transformer` for the timesteps from the boundary on, the noisier ones, and
    `transformer_2` for those below it, and take the boundary as `boundary_ratio`.

    Args:
        routed: a packed model of two groups.
        folder: receives the folders `transformer` and `transformer_2`, and `boundary.json` with the boundary.
        **options: as for `save_expert`.

    Returns:
        `boundary_ratio`: the first timestep of the noisier group, divided by T.

    Raises:
        ValueError: the model has not two groups.
    """
    if routed.num_experts != 2:
        raise invalid("routed", f"{routed.num_experts} groups", "a packed model of two")
    _, boundary, count = routed.groups.boundaries
    ratio = boundary / count
    save_expert(routed, 1, Path(folder) / "transformer", **options)
    save_expert(routed, 0, Path(folder) / "transformer_2", **options)
    write_json(Path(folder) / "boundary.json", {"boundary_ratio": ratio})
    return ratio


def _code(base: type) -> str:
    """The source of the class of narrower models: `tdc_fast.nn.blocks`, and the function that makes the class."""
    made = f"from diffusers import {base.__name__}\n\n{narrower(base).__name__} = narrower({base.__name__})\n"
    return "\n\n".join([inspect.getsource(blocks), inspect.getsource(narrower), made])
