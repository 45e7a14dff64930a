"""A class of diffusers whose blocks have the widths that its configuration says."""

from __future__ import annotations

from typing import Any

from tdc_fast.nn.blocks import narrow


# Its source is written beside narrower models, where `narrow` and `Any` are in the same file.
def narrower(base: type) -> type:
    """The class `Narrower<base>`: the base's arguments and `unit_widths`, inner channels by the path of the block."""
    import inspect

    from diffusers import ConfigMixin, ModelMixin

    def init(self: Any, *args: Any, unit_widths: Any = None, auto_map: Any = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.register_to_config(unit_widths=unit_widths, auto_map=auto_map)
        narrow(self, unit_widths or {})

    given = inspect.signature(base.__init__)  # type: ignore[misc]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("unit_widths", "auto_map")
    ]
    init.__signature__ = given.replace(parameters=[*given.parameters.values(), *own])  # type: ignore[attr-defined]
    # Transformer2DModel loads in a way of its own, which looks the class up by name and fails on any other name.
    loading = {"from_pretrained": vars(ModelMixin)["from_pretrained"], "from_config": vars(ConfigMixin)["from_config"]}
    return type(f"Narrower{base.__name__}", (base,), {"__init__": init, "__module__": __name__, **loading})
