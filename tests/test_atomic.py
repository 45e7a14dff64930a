"""Files that are whole or absent."""

from __future__ import annotations

import pytest

from tdc_fast.atomic import atomic_file, remove_leftovers, write_json, writing_to


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "model.pt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_write_that_the_system_refuses_names_the_file_the_cause_and_the_free_space(tmp_path):
    path = tmp_path / "file"
    said = rf"^{path} cannot be written \({{}}; \d+ MiB are free there\)$"
    for block in (atomic_file, writing_to):
        with pytest.raises(OSError, match=said.format("No space left on device")), block(path):
            raise OSError(28, "No space left on device")
        with pytest.raises(OSError, match=said.format("the system took only a part of it")), block(path):
            raise OSError("96 requested and 32 written")
    assert not list(tmp_path.iterdir())
    path.write_text("")
    with pytest.raises(OSError, match="^.*/file/a.json cannot be written .Not a directory; "):
        write_json(path / "a.json", {})
