"""What docs/method.md says of the figures is what they show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdc_fast.grouping import Probes
from tdc_fast.grouping.plot import draw_similarity
from tdc_fast.grouping.similarity import TaskSimilarity

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")


def test_the_colours_of_similarity_are_those_that_the_page_names():
    from matplotlib import colormaps

    low, high = colormaps["YlGnBu"](0.0), colormaps["YlGnBu"](1.0)
    assert (
        low[0] > 0.9 and low[1] > 0.9 and high[2] > high[0] and sum(high[:3]) < sum(low[:3])
    )  # pale yellow, dark blue
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `similarity.png`")]
    assert "dark blue blocks (similar gradients) inside the frames, pale yellow outside" in row
    assert 'cmap="YlGnBu"' in Path(draw_similarity.__code__.co_filename).read_text(encoding="utf-8")


@pytest.mark.parametrize(("least", "said"), [(0.95, True), (0.2, False)])
def test_gradients_that_are_all_similar_are_said_to_show_no_groups(tmp_path, capsys, least, said):
    matrix = np.full((4, 4), least)
    np.fill_diagonal(matrix, 1.0)
    draw_similarity(tmp_path, TaskSimilarity(Probes.evenly(100, 4), matrix), (0, 50, 100))
    assert ("similar (0.95 to 1)" in capsys.readouterr().out) == said
    assert (tmp_path / "similarity.png").is_file()
