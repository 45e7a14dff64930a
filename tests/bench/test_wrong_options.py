"""A bench that cannot do what its command line says tells so at once, measures nothing and leaves no file."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.files import write_results

MISSING, HERE = "/nowhere/at/all", "{}"
REFUSED = {
    "bench.gpu.__main__": [
        f"--out {HERE}/out --dry-run --seconds nan",
        f"--out {HERE}/out --dry-run --seconds -5",
        f"--out {HERE}/out --dry-run --train-seconds inf",
        f"--out {HERE}/out --dry-run --backend foo",
        f"--out {HERE}/out --dry-run --images {MISSING}",
        f"--out {HERE}/file/out --dry-run",
        f"--out {HERE}/out --dry-run --warm 3",
        f"--out {HERE}/out --dry-run --warm 4/4",
    ],
    "bench.gpu_time": ["whole --dry-run --batch 0", "whole --dry-run --num-groups -1"],
    "bench.serving.__main__": ["--device cuda", "--device nonsense"],
    "bench.serving.simulation": ["--device cuda", "--requests 0", "--batches 16,x", "--loads nan"],
    "bench.serving.soak": ["--minutes -1"],
    "bench.tune": ["--dry-run --seconds nan", "--dry-run --batch 1.5"],
    "bench.launch_host": ["--rounds 0"],
}
CASES = [(module, words) for module, lines in REFUSED.items() for words in lines]


@pytest.mark.parametrize(("module", "words"), CASES, ids=[" ".join(case) for case in CASES])
def test_wrong_options_are_refused(
    module: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(words.replace(HERE, str(tmp_path)).split())
    assert ended.value.code == 2
    option = next(word for word in reversed(words.split()) if word.startswith("--") and word != "--dry-run")
    assert f"{option}:" in (said := capsys.readouterr().err) or f"{option} takes" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("module", ["bench.backend_times", "bench.roofline"])
@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"rows": []}'])
def test_a_file_that_is_no_result_is_refused(
    module: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    assert import_module(module).main([str(path)]) == 2
    assert "a JSON file that bench.gpu wrote" in capsys.readouterr().err


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path: Path) -> None:
    write_results({"rows": [1]}, "old", tmp_path, "here")
    with pytest.raises(TypeError):
        write_results({"rows": [object()]}, "new", tmp_path, "here")
    assert json.loads((tmp_path / "here.json").read_text()) == {"rows": [1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.json", "here.md"]
