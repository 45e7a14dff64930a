"""The style of all figures: an empty figure without pyplot, its colours, and its PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from tdc_fast.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1d2733", "#66717f", "#d9dee5"
MEASURED = "#d9662b"
GROUP_SHADES = ("#eef3f8", "#f8f5ee")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Figure, Any]:
    """Create a figure without pyplot: no global state, no display.

    Args:
        width: in inches.
        height: in inches.
        rows: rows of axes.
        columns: columns of axes.
        layout: arguments of matplotlib's `Figure.subplots`.

    Returns:
        The figure and its axes, an array (rows, columns).
    """
    require("matplotlib", "demo")
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "tdc_fast"  # element ids are the same in every run
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    for axis in axes.flat:
        _style(axis)
    return figure, axes


def _style(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(RULE)
    axis.tick_params(colors=MUTED, labelsize=9, length=0)
    axis.title.set_color(INK)
    axis.title.set_fontsize(10)
    axis.xaxis.label.set_color(MUTED)
    axis.yaxis.label.set_color(MUTED)
    axis.grid(True, color=RULE, linewidth=0.6, alpha=0.7)
    axis.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file of the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
