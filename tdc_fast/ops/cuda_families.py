"""The families of CUDA kernels and the sources that each is compiled from, as shipped with the package.

`families.def` lists every family and its headers; nvcc (through CMake), NVRTC and the emulator of the tests all compile
the translation unit that follows from a row of it.
"""

from __future__ import annotations

import functools
import importlib.resources
import re

SOURCES = "tdc_fast.cuda_sources"  # csrc/cuda, installed as package data
_FAMILY = re.compile(r"^(?:HOPPER_)?FAMILY\((\w+), (.+)\)$", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(cuda/[^"]+)"', re.MULTILINE)


def families() -> list[str]:
    """The names of all families."""
    return list(_headers())


def translation_unit(family: str) -> str:
    """The source text that a compiler is given for a family."""
    includes = "".join(f"#include {header}\n" for header in _headers()[family])
    return f"{includes}TDC_KERNELS_{family}(TDC_DEFINE_KERNEL)\n"


def read_sources(family: str) -> dict[str, str]:
    """{include name: text} of a family's translation unit, which comes first, and of all that it includes."""
    found = {f"{family}.cu": translation_unit(family)}
    waiting = _INCLUDE.findall(found[f"{family}.cu"])
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = _read(name)
            waiting += _INCLUDE.findall(found[name])
    return found


@functools.cache
def _headers() -> dict[str, list[str]]:
    return {name: headers.split(", ") for name, headers in _FAMILY.findall(_read("cuda/families.def"))}


def _read(name: str) -> str:
    path = importlib.resources.files(SOURCES).joinpath(*name.split("/")[1:])
    return path.read_text(encoding="utf-8")
