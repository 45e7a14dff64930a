"""The registers and memory that compiled kernels use, read from a library of kernels or from the assembler's log."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"Function (\w+):\s*\n\s*(REG:.*)")
_LOGGED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_ARCH = re.compile(r"^arch = (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, bytes of stack (where spilled registers go) and of local memory. Per block: bytes of
    static shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


def cuobjdump() -> str | None:
    """The CUDA toolkit's tool on PATH, else the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def resources_of(file: Path, tool: str) -> dict[str, dict[str, Resources]]:
    """{architecture: {kernel: what it uses}} of a library with device code for several."""
    text = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True).stdout
    starts = [(match.start(), match[1]) for match in _ARCH.finditer(text)]
    found: dict[str, dict[str, Resources]] = {}
    for (start, arch), end in zip(starts, [at for at, _ in starts[1:]] + [len(text)], strict=True):
        for match in _FUNCTION.finditer(text[start:end]):
            values = dict(part.split(":") for part in match[2].split() if part.count(":") == 1)
            found.setdefault(arch, {})[match[1]] = Resources(
                int(values["REG"]), int(values["STACK"]), int(values["LOCAL"]), int(values["SHARED"])
            )
    return found


def resources_in_log(log: str) -> dict[str, Resources]:
    """{kernel: what it uses} of a log made with `--ptxas-options=-v`; spilled bytes count as local memory."""
    found = {}
    for match in _LOGGED.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        used = Resources(int(match["registers"]), int(match["stack"]), spilled, int(shared[1]) if shared else 0)
        found[match["name"]] = used
    return found


def table(found: dict[str, dict[str, Resources]]) -> str:
    """Registers / static shared bytes of every kernel on every architecture, one line per kernel."""
    archs = sorted(found, key=lambda name: (len(name), name))
    kernels = sorted({kernel for of_arch in found.values() for kernel in of_arch})
    lines = [f"{'kernel: registers, static shared bytes':48}" + "".join(f"{arch:>14}" for arch in archs)]
    for kernel in kernels:
        cells = (found[arch].get(kernel) for arch in archs)
        lines.append(f"{kernel:48}" + "".join(f"{f'{r.registers}, {r.shared}' if r else '-':>14}" for r in cells))
    return "\n".join(lines)
