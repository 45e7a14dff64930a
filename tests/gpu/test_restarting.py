"""Tests on a GPU go on after one that hangs, breaks the GPU or ends its process; here they are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import restarting

TESTS = """
import os
import pytest
from tests.gpu import restarting

pytestmark = pytest.mark.gpu

def test_passes(): pass
def test_fails(): assert 1 == 2, "wrong channels"
def test_hangs(request):
    if restarting.ALONE in os.environ:
        print("alone it waits for a barrier")
        return
    restarting.note(request.node.nodeid, restarting.HANGS)
    os._exit(3)
def test_breaks(request):
    restarting.note(request.node.nodeid, restarting.BREAKS, "an illegal instruction was encountered")
    request.session.shouldstop = "it is over"
    assert False, "whatever else"
def test_aborts(): os.abort()
def test_is_skipped(): pytest.skip("no compiler")
def test_comes_last(): pass
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record; tests are those above."""
    (tmp_path / "test_made_up.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(restarting.ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(restarting, "ROOT", tmp_path)
    return tmp_path / "record"


def test_every_test_runs_whatever_becomes_of_others(made_up: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert restarting.main(["--record", str(made_up), "test_made_up.py"]) == 1
    out, _ = capfd.readouterr()
    assert "alone it waits for a barrier" in out
    assert out.split("\n\n")[-1].splitlines() == [
        "1 ended the process, 1 failed, 1 hangs, 1 leaves the GPU unusable, 2 passed, 1 skipped",
        "failed: test_made_up.py::test_fails AssertionError: wrong channels",
        "hangs: test_made_up.py::test_hangs",
        "leaves the GPU unusable: test_made_up.py::test_breaks an illegal instruction was encountered",
        "ended the process: test_made_up.py::test_aborts",
        "Skipped: no compiler",
    ]


def test_what_was_stopped_runs_in_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, codes = tmp_path / "record", [None, 0]

    def run(arguments: list[str], seconds: float, **variables: str) -> int | None:
        assert variables[restarting.RECORD] == str(record)
        begins = [test for test in ("first", "second") if test not in restarting.over(record)]
        for test in begins:
            restarting.note(test, restarting.BEGAN, record=record)
            if test == "first" or codes[0] is not None:
                restarting.note(test, "passed", record=record)
        return codes.pop(0)

    monkeypatch.setattr(restarting, "run", run)
    assert restarting.main(["--record", str(record)]) == 1
    assert restarting.read(record) == {"first": ("passed", ""), "second": (restarting.STOPPED, "")}
    assert restarting.over(record) == {"first"}
    assert restarting.main(["--record", str(record)]) == 0
    assert restarting.over(record) == {"first", "second"}
