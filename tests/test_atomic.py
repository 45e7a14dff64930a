"""Files that are whole or absent."""

from __future__ import annotations

import pytest

from tdc_fast.atomic import atomic_file, remove_leftovers


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
