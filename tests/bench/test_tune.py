"""Tuning writes the table of tiles that the kernels read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.files import ROOT


def test_tuning_writes_the_table_that_the_kernels_read(tmp_path: Path) -> None:
    """In a process of its own: Triton's interpreter has to be asked for before the kernels are imported."""
    script = (
        "import sys\n"
        "from bench import tune\n"
        "tune.GAIN = float('inf')  # every winner is noted\n"
        "assert tune.main(['--dry-run', '--out', sys.argv[1]]) == 0\n"
        "from tdc_fast.kernels import tile_shapes, wgrad_tiles\n"
        "from pathlib import Path\n"
        "tile_shapes.TUNED = Path(sys.argv[1])\n"
        "print(sorted([*tile_shapes.load_tuned('interpreter'), *wgrad_tiles.load_tuned_wgrad('interpreter')]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert {key.partition(" ")[0] for key in table["tiles"]} == {"forward", "dgrad"}
    assert {key.partition(" ")[0] for key in table["wgrad"]} == {"wgrad"}
    assert result.stdout.splitlines()[-1] == str(sorted([*table["tiles"], *table["wgrad"]]))


def test_a_dry_run_leaves_the_kernels_own_tables_alone() -> None:
    from bench import tune

    assert tune.parse([]).out == ROOT / "kernels" / "tuned"
    assert ROOT not in tune.parse(["--dry-run"]).out.parents
