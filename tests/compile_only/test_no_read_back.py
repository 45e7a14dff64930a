"""The device path reads nothing back: no call in it can make the host wait for the GPU.

On a GPU tests/gpu proves it by running; here the source is read, for what makes a host wait: the methods below, and the
value of a tensor as a Python number. Each exception is named, with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAITS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "unique_consecutive", "bincount"),
    *("argwhere", "is_nonzero", "equal", "allclose", "synchronize", "pin_memory"),
    *("tensor", "as_tensor", "from_numpy"),  # a copy from pageable host memory
    *("int", "float", "bool"),
}
HOST = "tensors in host memory only"
ALLOWED = {
    ("tdc_fast/ops/plan.py", "_plan_on_host", "nonzero"): HOST,
    ("tdc_fast/ops/plan.py", "_plan_on_host", "int"): HOST,
    ("tdc_fast/ops/plan.py", "from_groups", "int"): "only with validate=True, which is documented to wait",
    ("tdc_fast/ops/plan.py", "as_integers", "tensor"): "of a sequence or numpy array, which is documented to wait",
    ("tdc_fast/ops/plan.py", "_permute", "tolist"): "for the text of an error that torch raises in host memory only",
    ("tdc_fast/ops/pack.py", "_check_order", "int"): HOST,
    ("tdc_fast/ops/cuda_native.py", "build_covers", "int"): "of a string",
    ("tdc_fast/ops/checks.py", "pair", "int"): "of Python's and numpy's integers",
    ("tdc_fast/ops/check_values.py", "_check_routing_values", "tolist"): HOST,
    ("tdc_fast/ops/check_values.py", "_check_width_values", "tolist"): HOST,
    **dict.fromkeys(
        [("tdc_fast/ops/check_values.py", "check_dead_inputs", name) for name in ("int", "float", "nonzero")],
        "only with validate=True, which is documented to wait",
    ),
    ("kernels/launch.py", "_hooked", "bool"): "of lists of functions",
    ("tdc_fast/nn/leaf.py", "widths", "tensor"): "while packing, not in a forward",
    ("tdc_fast/nn/leaf.py", "__setstate__", "tolist"): "while a module is copied or read from a file, not in a forward",
    ("tdc_fast/nn/leaf.py", "share", "tensor"): "while packing, not in a forward",
    ("tdc_fast/nn/leaf.py", "has_hooks", "bool"): "of dictionaries of functions",
    ("tdc_fast/nn/routed.py", "forward", "int"): HOST,
    ("tdc_fast/nn/routed.py", "_are_positions", "bool"): HOST,
    ("tdc_fast/nn/routed.py", "_are_positions", "equal"): HOST,
    ("tdc_fast/nn/attention.py", "qkv_attention", "nonzero"): HOST,
    ("tdc_fast/nn/timesteps.py", "one_per_sample", "int"): "of a Python number",
    ("tdc_fast/nn/timesteps.py", "one_per_sample", "float"): "of a Python number",
    ("tdc_fast/nn/timesteps.py", "original_index", "equal"): HOST,
    ("tdc_fast/nn/timesteps.py", "original_index", "item"): HOST,
}
DEVICE_PATH = [
    *("tdc_fast/ops/cuda.py", "tdc_fast/ops/cuda_launch.py", "tdc_fast/ops/cuda_device.py"),
    *("tdc_fast/ops/cuda_native.py", "tdc_fast/ops/cuda_nvrtc.py", "tdc_fast/ops/triton.py", "tdc_fast/ops/pack.py"),
    *("tdc_fast/ops/conv2d.py", "tdc_fast/ops/group_norm.py", "tdc_fast/ops/linear.py", "tdc_fast/ops/plan.py"),
    *("tdc_fast/ops/conv2d_operators.py", "tdc_fast/ops/linear_operators.py", "tdc_fast/ops/group_norm_operators.py"),
    *("kernels/tile_table.py", "tdc_fast/ops/layout.py", "tdc_fast/ops/library.py", "tdc_fast/ops/checks.py"),
    "tdc_fast/ops/check_values.py",
    *("tdc_fast/nn/plan_scope.py", "tdc_fast/nn/leaf.py", "tdc_fast/nn/routed.py", "tdc_fast/nn/layers.py"),
    "tdc_fast/nn/attention.py",
    *("tdc_fast/nn/casts.py", "tdc_fast/nn/one_input.py", "tdc_fast/nn/sample_arguments.py"),
    *("tdc_fast/nn/timesteps.py", "tdc_fast/nn/routed_attention.py", "tdc_fast/nn/routed_layer_norm.py"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")),
]


def calls(source: str) -> Iterator[tuple[str, str]]:
    """(innermost function, name of what it calls) of every call in a source; "" is the module itself."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                # tensor.float() is a cast on the device; only the builtin makes a number.
                if node.func.attr not in ("int", "float", "bool"):
                    yield function, node.func.attr
            elif isinstance(node.func, ast.Name):
                yield function, node.func.id
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    return visit(ast.parse(source), "")


def waits(path: str, source: str) -> list[tuple[str, str, str]]:
    """What in a source's functions may wait: (path, function, name of what it calls)."""
    return [(path, function, name) for function, name in calls(source) if name in WAITS and function]


@pytest.mark.parametrize("path", DEVICE_PATH)
def test_nothing_on_the_device_path_waits_for_the_device(path: str) -> None:
    found = set(waits(path, (ROOT / path).read_text())) - set(ALLOWED)
    assert not found, f"{found}: read it on the device, or name it in ALLOWED with the reason why it does not wait"


def test_every_exception_is_still_needed() -> None:
    found = {entry for path in DEVICE_PATH for entry in waits(path, (ROOT / path).read_text())}
    assert set(ALLOWED) <= found


def test_the_check_sees_what_it_is_for() -> None:
    source = """
def conv(x, offsets, widths):
    rows = offsets.tolist()
    size = int(offsets[-1])
    y = x.float()
    return torch.tensor(rows, device=x.device), widths.max().item()
"""
    assert [name for _, _, name in waits("a.py", source)] == ["tolist", "int", "tensor", "item"]
