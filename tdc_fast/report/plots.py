"""The figures of a report as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from colorsys import hls_to_rgb
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tdc_fast.data.pixels import grid_image
from tdc_fast.evaluation.heldout import compare
from tdc_fast.figures import GROUP_SHADES, INK, MEASURED, MUTED, RULE, new_figure
from tdc_fast.report.numbers import Comparison, Curve, ExpertWidths, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# They differ in lightness as well as in hue: baselines are grey, experts coloured.
FAMILY_COLOURS = {
    "uniform": ("#2f3a48", "#8f9baa", "#c2a14d", "#7d6428"),
    "experts": ("#0f7f8c", "#d9662b", "#7a58a6", "#b8336a"),
}


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def smooth(values: Sequence[float | None], window: int) -> np.ndarray:
    """Running mean over the last `window` values, fewer at the start; missing values are left out."""
    array = np.array([np.nan if value is None else value for value in values], dtype=float)
    known = np.isfinite(array)
    sums = np.cumsum(np.where(known, array, 0.0))
    counts = np.cumsum(known).astype(float)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def colour(comparison: Comparison, model: ModelResult) -> str:
    """The model's colour in every figure and table, which no other model has."""
    tints, place = FAMILY_COLOURS[model.family], comparison.place_in_family(model)
    if place < len(tints):
        return tints[place]
    # Hues a golden section apart, so that neighbours in the legend differ most.
    further = place - len(tints)
    strength = 0.6 if model.family == "experts" else 0.3
    shares = hls_to_rgb((0.35 + 0.618 * further) % 1, (0.35, 0.5, 0.65)[further % 3], strength)
    return "#" + "".join(f"{round(255 * share):02x}" for share in shares)


def _legend(figure: Figure, most_columns: int) -> None:
    """A legend above the axes, in as many columns as fit; the figure grows by all of its rows but one."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    for columns in range(min(most_columns, len(labels)), 0, -1):
        legend = figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(labels) // columns) - 1))
            return
        legend.remove()


def trained(comparison: Comparison) -> list[ModelResult]:
    """The models with training curves of their own; merged experts have that of the experts, which come first."""
    models = comparison.models
    return [model for place, model in enumerate(models) if all(model.curve != other.curve for other in models[:place])]


def loss_curves(comparison: Comparison) -> str:
    """Training loss against compute, one panel per group."""
    num_groups = len(comparison.boundaries) - 1
    columns = min(4, num_groups)
    rows = -(-num_groups // columns)
    figure, axes = new_figure(11, 2.9 * rows + 0.5, rows, columns, sharex=True)
    total = comparison.baseline.training_macs
    for group in range(num_groups):
        axis = axes.flat[group]
        for model in trained(comparison):
            label = model.label if group == 0 else None
            _draw_curve(axis, model.curve, group, total, colour(comparison, model), label)
        start, stop = comparison.boundaries[group], comparison.boundaries[group + 1]
        axis.set_title(f"{comparison.interval} {group}: t {start} to {stop - 1}")
    for axis in axes.flat[num_groups:]:
        axis.set_visible(False)
    figure.supxlabel("training compute (C)", color=MUTED, fontsize=10)
    figure.supylabel("training loss", color=MUTED, fontsize=10)
    _legend(figure, most_columns=5)
    return _svg(figure)


def _draw_curve(axis: Axes, curve: Curve, group: int, total: float, tint: str, label: str | None) -> None:
    losses = smooth(curve.losses[group], max(1, len(curve.macs) // 25))
    x = np.array(curve.macs) / total
    shown = np.isfinite(losses) & (x > 0.1)  # the steep start would flatten the rest
    axis.plot(x[shown], losses[shown], color=tint, linewidth=1.5, label=label)


def snr_curve(comparison: Comparison) -> str:
    """SNR over the timesteps with the groups; below it the MACs of each expert and its budget."""
    figure, axes = new_figure(11, 4.4, 2, 1, sharex=True, height_ratios=[1.7, 1])
    top, bottom = axes[0, 0], axes[1, 0]
    boundaries, plan = comparison.widths.boundaries, comparison.widths
    top.plot(range(len(comparison.snr_db)), comparison.snr_db, color=INK, linewidth=1.8)
    top.set_ylabel("SNR (dB)", fontsize=9)
    for group, (start, stop) in enumerate(zip(boundaries[:-1], boundaries[1:], strict=True)):
        for axis in (top, bottom):
            axis.axvspan(start, stop, color=GROUP_SHADES[group % 2], zorder=0, linewidth=0)
        middle = (start + stop) / 2
        top.annotate(
            f"group {group}", (middle, 0.94), xycoords=("data", "axes fraction"), ha="center", va="top",
            color=MUTED, fontsize=9,
        )  # fmt: skip
        label = {"budget": "budget", "measured": "measured"} if group == 0 else {}
        if plan.budgets:
            bottom.bar(
                middle,
                plan.budgets[group],
                width=0.82 * (stop - start),
                color="#cfd8e1",
                label=label.get("budget"),
            )
        bottom.bar(
            middle, plan.macs[group], width=0.46 * (stop - start), color=MEASURED,
            label=label.get("measured"),
        )  # fmt: skip
        bottom.annotate(
            _cost_of(plan, group), (middle, plan.budgets[group] if plan.budgets else plan.macs[group]),
            ha="center", va="bottom", color=INK, fontsize=9, xytext=(0, 2), textcoords="offset points",
        )  # fmt: skip
    for axis in (top, bottom):
        axis.grid(False)
        axis.set_xlim(0, boundaries[-1])
    bottom.set_ylim(0, 1.5 if plan.times else 1.3)  # room for a second line
    bottom.set_ylabel("expert's MACs / base", fontsize=9)
    bottom.set_xlabel("timestep t (0: almost clean, right end: noise)", fontsize=9)
    bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    return _svg(figure)


def _cost_of(plan: ExpertWidths, group: int) -> str:
    """An expert's MACs and its estimated time, each with its budget where there is one."""
    text = f"{plan.macs[group]:.3f}" + (f" of {plan.budgets[group]:.3f}" if plan.budgets else "")
    if plan.times:
        allowed = f" of {plan.time_budgets[group]:.3f}" if plan.time_budgets else ""
        text += f"\ntime {plan.times[group]:.3f}{allowed}"
    return text


def width_heatmap(comparison: Comparison) -> str:
    """Share of channels kept, a row per prunable unit and a column per expert."""
    plan = comparison.widths
    num_units, num_experts = len(plan.units), len(plan.widths[0])
    figure, axes = new_figure(max(6.0, 2.6 + 1.25 * num_experts), 1.0 + 0.36 * num_units)
    axis = axes[0, 0]
    share = np.array(plan.widths, dtype=float) / np.array(plan.channels, dtype=float)[:, None]
    image = axis.imshow(share, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for unit in range(num_units):
        for expert in range(num_experts):
            text = f"{plan.widths[unit][expert]} / {plan.channels[unit]}"
            tint = "white" if share[unit, expert] > 0.6 else INK
            axis.text(expert, unit, text, ha="center", va="center", color=tint, fontsize=9)
    axis.set_xticks(range(num_experts), [f"expert {i}" for i in range(num_experts)])
    axis.set_yticks(range(num_units), plan.units)
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
    bar.set_label("live channels", color=MUTED, fontsize=9)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return _svg(figure)


def heldout_differences(comparison: Comparison) -> str:
    """Held-out loss relative to the baseline, overall and by group, with two standard errors either side."""
    figure, axes = new_figure(11, 3.2)
    axis = axes[0, 0]
    others = comparison.models[1:]
    num_groups = len(comparison.boundaries) - 1
    labels = ["all timesteps", *(f"{comparison.interval} {g}" for g in range(num_groups))]
    pitch = min(0.16, 0.8 / max(1, len(others)))
    for place, model in enumerate(others):
        overall, per_group = compare(model.heldout, comparison.baseline.heldout)
        differences = [overall, *per_group]
        x = np.arange(len(labels)) + (place - (len(others) - 1) / 2) * pitch
        axis.errorbar(
            x,
            [100 * d.relative for d in differences],
            yerr=[200 * d.standard_error for d in differences],
            fmt="o", markersize=6, capsize=3, linewidth=1.4, color=colour(comparison, model), label=model.label,
        )  # fmt: skip
    axis.axhline(0, color=colour(comparison, comparison.baseline), linewidth=1.4)
    axis.axvline(0.5, color=RULE, linewidth=1)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.set_ylabel(f"loss against {comparison.baseline.label} (%)", fontsize=9)
    _legend(figure, most_columns=4)
    return _svg(figure)


def frechet_draws(comparison: Comparison) -> str:
    """Distances of all draws, their means, and distances between real images."""
    figure, axes = new_figure(11, 0.75 + 0.42 * len(comparison.models) + 0.42 * len(comparison.floors))
    axis = axes[0, 0]
    names = [model.label for model in comparison.models]
    for row, model in enumerate(comparison.models):
        values, tint = model.frechet.values, colour(comparison, model)
        axis.plot(values, [row] * len(values), "o", color=tint, alpha=0.55, markersize=7, markeredgewidth=0)
        axis.plot([model.frechet.mean] * 2, [row - 0.28, row + 0.28], color=tint, linewidth=2.4)
    for place, floor in enumerate(comparison.floors):
        row = len(comparison.models) + place
        names.append(f"real, {floor.kind} (n = {floor.n})")
        axis.plot(floor.values, [row] * len(floor.values), "|", color=MUTED, markersize=10)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel("Fréchet distance (lower is better)", fontsize=9)
    return _svg(figure)


def sample_grid(images: Tensor) -> str:
    """A picture of images in rows of 10, four times as large, as a data URI.

    Args:
        images: (M, C, H, W) uint8, C 1 or 3.
    """
    buffer = io.BytesIO()
    grid_image(images, columns=10, scale=4, gap=1).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
