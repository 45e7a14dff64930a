"""Imports point down: every module imports only from rooms below its own, and no two files import each other.

The packages are those of CONTRIBUTING.md. All imports count, also those inside functions, under TYPE_CHECKING and by
`importlib.import_module`: what a reader has to follow is the same.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Top to bottom. Rooms of one line do not import each other.
ROOMS = (
    ("__main__",),
    ("train", "prune", "sample", "serve", "evaluate", "nll", "encode", "latency", "convert", "merge", "demo"),
    ("command_line",),
    ("experiments",),
    ("report", "serving"),
    ("training", "evaluation"),
    ("runs",),
    ("data", "grouping", "pruning"),
    ("diffusers_models",),
    ("models",),
    ("diffusion", "nn"),
    ("routing",),
    ("ops",),
    ("kernels", "_native"),
    ("figures", "graphs", "atomic", "progress", "text_files", "distributed"),
    ("errors", "entry"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below tdc_fast -> file, of every module but the package itself, whose names load on first use."""
    found = {}
    for name, folder in (("", ROOT / "tdc_fast"), ("kernels.", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "tdc_fast" and path.relative_to(folder).parts[0] in ("kernels", "cuda_sources"):
                continue  # links that an installation may have made
            parts = path.relative_to(folder).with_suffix("").parts
            dotted = name + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if dotted:
                found[dotted.rstrip(".")] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """The modules below tdc_fast that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names = [ast.literal_eval(name) for name in node.args if isinstance(name, ast.Constant)]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            assert package not in ("bench", "examples", "tests"), f"{path}: imports {name}"
            if package == "tdc_fast" and rest:
                found.add(rest if rest in MODULES else rest.rpartition(".")[0] or rest)
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {name: imports_of(path) - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in MODULES} <= set(LEVEL)


def test_modules_import_only_from_rooms_below_their_own() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, all_imported in graph().items()
        for imported in all_imported
        if room(imported) != room(module) and LEVEL[room(imported)] <= LEVEL[room(module)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_kernels_import_only_kernels() -> None:
    assert all(room(imported) == "kernels" for name in MODULES if room(name) == "kernels" for imported in graph()[name])


def test_no_two_modules_import_each_other_even_by_a_detour() -> None:
    graphlib.TopologicalSorter(graph()).prepare()  # raises CycleError, which names the circle
