"""Tests of Triton kernels on the CPU, in Triton's interpreter.

The interpreter replaces kernels when they are imported, so these tests run in a separate process: test_interpreter.py
starts it, and is the only file of this folder that an ordinary run collects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if (path.name == "test_interpreter.py") is INTERPRETING
]

if INTERPRETING:
    from tests.interpreter.lean import make_lean

    make_lean()


@pytest.fixture
def multiply_adds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The multiply-adds of every product of tiles that the interpreter computes from here on."""
    from triton.runtime.interpreter import InterpreterBuilder

    taken: list[int] = []
    multiply = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *more: Any) -> Any:
        taken.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return multiply(self, a, b, *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    return taken
