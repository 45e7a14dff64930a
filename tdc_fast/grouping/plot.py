"""The figure of a grouping by similarity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tdc_fast.atomic import write_bytes
from tdc_fast.figures import INK, MUTED, new_figure, png
from tdc_fast.grouping.similarity import TaskSimilarity

ALL_SIMILAR = 0.9
"""Where every two timesteps are at least this similar, the picture shows no groups."""


def draw_similarity(directory: Path, similarity: TaskSimilarity, boundaries: Sequence[int]) -> None:
    """Write similarity.png; without matplotlib, print that it is left out. Also print if all timesteps are similar.

    Args:
        directory: the run's directory.
        similarity: what was measured.
        boundaries: the N + 1 boundaries of the groups, timesteps.
    """
    if _all_similar(similarity):
        print(
            f"note: the gradients of all timesteps are similar ({similarity.matrix.min():.2f} to 1): the base gives "
            "grouping by similarity little basis; train it longer, or take --grouping snr",
            flush=True,
        )
    try:
        write_bytes(directory / "similarity.png", similarity_plot(similarity, boundaries))
    except ImportError:
        print("similarity.png is left out: it needs matplotlib (pip install 'tdc_fast[demo]')")


def _all_similar(similarity: TaskSimilarity) -> bool:
    return bool(similarity.matrix.min() >= ALL_SIMILAR)


def similarity_plot(similarity: TaskSimilarity, boundaries: Sequence[int]) -> bytes:
    """A PNG: cosine similarity of the loss gradients between timesteps, with the groups framed on the diagonal.

    Args:
        similarity: what was measured.
        boundaries: the N + 1 boundaries of the groups, timesteps.
    """
    figure, axes = new_figure(6.6, 5.6)
    axis, edges = axes[0, 0], similarity.probes.edges
    axis.grid(False)
    image = axis.pcolormesh(edges, edges, similarity.matrix, cmap="YlGnBu", rasterized=True)  # scaled to its own range
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        axis.plot([start, stop, stop, start, start], [start, start, stop, stop, start], color=INK, linewidth=1.6)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    axis.set_xlabel("timestep t (0: almost clean, right end: noise)", fontsize=9)
    axis.set_ylabel("timestep t", fontsize=9)
    title = f"{len(boundaries) - 1} groups: {', '.join(map(str, boundaries))}"
    axis.set_title(title + ("\nall timesteps are similar: read the bar" if _all_similar(similarity) else ""))
    bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
    bar.set_label("cosine similarity of gradients", color=MUTED, fontsize=9)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return png(figure)
