"""Without a GPU: no line between a routed call and its kernels reads a tensor's numbers.

On a GPU `test_networks` proves it by torch's own check; this finds a read-back where there is none to ask.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "masked_select", "unique", "synchronize", "wait"}
# What runs for tensors on a GPU. Functions that never see one are named with the condition that keeps them away.
FILES = {
    "tdc_fast/ops/plan.py": {"_plan_on_host", "from_groups"},  # from_groups: waits only when asked to validate
    "tdc_fast/ops/conv2d.py": set(),
    "tdc_fast/ops/linear.py": set(),
    "tdc_fast/ops/group_norm.py": set(),
    "tdc_fast/ops/library.py": set(),
    "tdc_fast/ops/tiles.py": set(),
    "tdc_fast/ops/layout.py": set(),
    "tdc_fast/ops/triton.py": set(),
    "tdc_fast/ops/cuda.py": set(),
    "tdc_fast/ops/cuda_launch.py": {"build_covers"},  # reads a build's architectures, from text
    "tdc_fast/ops/cuda_nvrtc.py": set(),
    "tdc_fast/nn/plan_scope.py": set(),
}


def files() -> list[str]:
    kernels = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py"))
    return [name for name in [*FILES, *kernels] if (ROOT / name).is_file()]


def read_backs(source: str, allowed: set[str]) -> Iterator[str]:
    """Calls that wait for the device: by name, and int, float, bool of a subscripted tensor-like value."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef) and node.name in allowed:
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS:
            yield f"line {node.lineno}: .{node.func.attr}()"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("int", "float", "bool")
            and node.args
            and isinstance(node.args[0], ast.Subscript | ast.Call)
        ):
            yield f"line {node.lineno}: {node.func.id}(...) of {ast.unparse(node.args[0])}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


@pytest.mark.parametrize("name", files())
def test_nothing_is_read_back(name: str) -> None:
    found = list(read_backs((ROOT / name).read_text(), FILES.get(name, set())))
    assert not found, f"{name} waits for the device: {found}"


@pytest.mark.parametrize(
    "line", ["n = x.item()", "n = int(offsets[3])", "b = offsets.tolist()", "y = x.cpu()", "i = m.nonzero()"]
)
def test_a_read_back_would_be_found(line: str) -> None:
    assert list(read_backs(f"def launch(x, offsets, m):\n    {line}\n", set()))
