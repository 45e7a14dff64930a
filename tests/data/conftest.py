from __future__ import annotations

import pytest

from tests.data.images import pixels, write


@pytest.fixture
def folder(tmp_path):
    """Eight 6x6 images of the classes ant, bee, cat, spread over directories."""
    names = ["b/cat_1.png", "b/ant_2.PNG", "a/bee_1.png", "a/deep/ant_1.gif", "cat_3.png", "bee_2_x.png"]
    for number, name in enumerate(names):
        write(tmp_path / name, pixels(6, 6, 3, seed=number))
    write(tmp_path / "c" / "cat_4.jpeg", pixels(6, 6, 3, seed=7))
    write(tmp_path / "c" / "cat_5.jpg", pixels(6, 6, seed=8))  # grey
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path
