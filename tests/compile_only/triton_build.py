"""Compiles a Triton kernel without a GPU, and reports what the machine code contains.

The arguments are those of a launch, on any device ("meta" too). Types, constants and multiples of 16 are derived from
them as Triton's launcher does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448}  # bytes that one program may have
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Built:
    """ptx; bytes of shared memory; bytes of stack per thread (spills and local arrays); registers per thread."""

    ptx: str
    shared: int
    stack: int
    registers: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    @property
    def wgmma(self) -> int:
        return self.count(r"wgmma\.mma_async")

    @property
    def wgmma_from_shared(self) -> int:
        """Products that read both operands from shared memory: two descriptors, no register list after the sums."""
        return self.count(r"wgmma\.mma_async[^;]*?\}, *%rd\d+, *%rd\d+,")

    @property
    def mma(self) -> int:
        return self.count(r"\bmma\.sync")

    @property
    def tma(self) -> int:
        return self.count(r"cp\.async\.bulk\.tensor")

    @property
    def cp_async_16(self) -> int:
        return self.count(r"cp\.async\.c[ga]\.shared\.global[^;]*?, 0x10,")


def build(kernel: Any, arguments: dict[str, Any], arch: int, options: dict[str, int]) -> Built:
    """Compiles for sm_<arch>; raises what Triton raises. Launches nothing and needs no driver."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = _type_of(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif isinstance(value, Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    stack, registers = _resources(compiled.asm["cubin"])
    return Built(compiled.asm["ptx"], compiled.metadata.shared, stack, registers)


def _type_of(value: Any, parameter: Any) -> str:
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool):
        return "u1"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(stack bytes, registers) from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert found, listing
    return int(found[2]), int(found[1])
