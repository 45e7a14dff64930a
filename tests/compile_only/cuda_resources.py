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
# "/*0a10*/  @!P0 BRA 0x3a0 ;" in SASS: address, predicate, operation, operands.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(@\S+ )?(\S+)([^;]*);", re.MULTILINE)
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


def registers_moved(code: str) -> list[tuple[str, int, int]]:
    """Where warpgroups give and take registers, in the SASS of a kernel: (DEALLOC or TRY_ALLOC, registers of a thread
    from there on, how many of them instructions name that can be reached from there)."""
    instructions = [(int(at, 16), bool(guard), *rest) for at, guard, *rest in _INSTRUCTION.findall(code)]
    index_of = {at: index for index, (at, *_) in enumerate(instructions)}
    moved = []
    for start, (_, _, operation, operands) in enumerate(instructions):
        if not operation.startswith("USETMAXREG"):
            continue
        reached: set[int] = set()
        waiting, named = [start + 1], 0
        while waiting:
            index = waiting.pop()
            if index in reached or index >= len(instructions):
                continue
            reached.add(index)
            _, guarded, name, used = instructions[index]
            named = max(named, _registers_named(name, used))
            if name == "BRA":
                waiting += [index_of[int(target, 16)] for target in re.findall(r"0x([0-9a-f]+)", used)]
                guarded = guarded or "P" in used  # a uniform predicate is an operand
            if guarded or name not in ("BRA", "EXIT"):
                waiting.append(index + 1)
        moved.append((operation.split(".")[1], int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16), named))
    return moved


def _registers_named(operation: str, operands: str) -> int:
    """One more than the number of the last register that an instruction reads or writes."""
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
    if not registers:
        return 0
    columns = re.match(r"HGMMA\.64x(\d+)x16", operation)
    width = int(columns[1]) // 2 if columns else 4 if ".128" in operation else 2 if ".64" in operation else 1
    data = registers[-1] if operation.startswith("ST") else registers[0]
    return max(*registers, data + width - 1) + 1
