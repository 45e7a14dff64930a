"""Registers the backends that come with the library."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tdc_fast.kernels.problems import Problem
from tdc_fast.ops import backends, cpu, cuda, hopper, reference


class LazyTriton:
    """The `triton` backend, imported at the first problem that it might serve: importing triton takes seconds."""

    name = "triton"
    fuses = ("x2", "upsample")  # as in tdc_fast.ops.triton

    def supports(self, problem: Problem) -> str | None:
        """None where the backend serves the problem, else the reason why not."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # tests set it to run kernels in host memory
        if problem.device.type != "cuda" and not (interpreted and problem.device.type == "cpu"):
            return f"its tensors live on a CUDA device, not on {problem.device}"
        try:
            return self.module().supports(problem)
        except ImportError as error:
            return f"triton cannot be imported: pip install 'tdc_fast[gpu]' ({error})"

    def leads(self, problem: Problem) -> bool:
        """It has no kernels that come first out of turn; said here, for to ask the module would import it."""
        return False

    def module(self) -> Any:
        """tdc_fast.ops.triton. ImportError where triton is not installed."""
        return importlib.import_module("tdc_fast.ops.triton")

    def __getattr__(self, function: str) -> Any:
        return getattr(self.module(), function)


for _backend in (reference, hopper, cuda, LazyTriton(), cpu):  # each goes before those registered earlier
    backends.register(_backend)
