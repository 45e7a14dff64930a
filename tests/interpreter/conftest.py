"""Tests of Triton kernels on the CPU, in Triton's interpreter.

The interpreter replaces kernels when they are imported, so these tests have a process of their own: test_interpreter.py
starts it, and is the only file of this folder that an ordinary run collects.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if (path.name == "test_interpreter.py") is INTERPRETING
]
