"""A class of diffusers whose blocks have the widths that its configuration says."""

from __future__ import annotations

from typing import Any

from tdc_fast.nn.blocks import narrow


# Its source is written beside narrower models, where `narrow` and `Any` are in the same file.
def narrower(base: type) -> type:
    """The class `Narrower<base>`: the base's arguments and `unit_widths`, inner channels by the path of the block."""
    import inspect

    def init(self: Any, *args: Any, unit_widths: Any = None, auto_map: Any = None, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        self.register_to_config(unit_widths=unit_widths, auto_map=auto_map)
        narrow(self, unit_widths or {})

    given = inspect.signature(base.__init__)  # type: ignore[misc]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("unit_widths", "auto_map")
    ]
    init.__signature__ = given.replace(parameters=[*given.parameters.values(), *own])  # type: ignore[attr-defined]
    return type(f"Narrower{base.__name__}", (base,), {"__init__": init, "__module__": __name__})
