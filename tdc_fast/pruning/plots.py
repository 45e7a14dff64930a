"""The figures of a pruning search, as PNG files: scores against cost, the chosen widths, agents side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdc_fast.atomic import write_bytes
from tdc_fast.errors import invalid
from tdc_fast.figures import GROUP_SHADES, INK, MEASURED, MUTED, new_figure, png
from tdc_fast.nn.units import PruningUnit
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.memory import searches_of
from tdc_fast.pruning.search import Pruning
from tdc_fast.pruning.task import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0f7f8c", "#d9662b", "#7a58a6", "#2f3a48", "#c2a14d", "#5a8f3c", "#8f9baa")


def draw_search(directory: Path, found: Pruning, units: Sequence[PruningUnit]) -> None:
    """Draw widths.png; for a search that scored candidates search.png, and with earlier searches agents.png.

    Without matplotlib it prints that the pictures are left out. If the search scored nothing, search.png of an earlier
    search is deleted.

    Args:
        directory: the run's directory, with the memories of its searches.
        found: the search.
        units: the pruning units of the base.
    """
    scored = any(_scored(trials) for trials in found.trials)
    if not scored:
        (directory / "search.png").unlink(missing_ok=True)  # an earlier search's, with other widths
    try:
        write_bytes(directory / "widths.png", widths_plot(found.plan, units))
        if not scored:
            return
        write_bytes(directory / "search.png", search_plot(found.trials, found.plan))
        searches = searches_of(directory)
        if len(searches) > 1:
            write_bytes(directory / "agents.png", agent_comparison(searches))
    except ImportError:
        (directory / "widths.png").unlink(missing_ok=True)
        print("the pictures of the search are left out: they need matplotlib (pip install 'tdc_fast[demo]')")


def search_plot(trials: Sequence[Sequence[Trial]], plan: WidthPlan) -> bytes:
    """A PNG: for each searched group every candidate's score against its cost, and the best score so far.

    Args:
        trials: per group, as in `Pruning.trials`; groups without scores are left out.
        plan: the widths that were chosen.

    Raises:
        ValueError: no group has scores.
    """
    groups = [group for group, tried in enumerate(trials) if _scored(tried)]
    if not groups:
        raise invalid("trials", trials, "the trials of a search that scores its candidates")
    figure, axes = new_figure(10, 0.6 + 2.5 * len(groups), len(groups), 2, width_ratios=[1.5, 1])
    for (left, right), group in zip(axes, groups, strict=True):
        scored = _scored(trials[group])
        rounds = np.array([trial.round for trial in scored])
        costs = np.array([trial.cost for trial in scored]) / (plan.budgets or plan.latency_budgets)[group]
        scores = np.array([trial.score for trial in scored])
        dots = left.scatter(costs, scores, c=rounds + 1, cmap=_shades(), edgecolors=MUTED, linewidths=0.4, s=28)
        best = int(np.argmin(scores))
        left.plot(costs[best], scores[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=MEASURED,
                  markeredgewidth=1.8, label="best")  # fmt: skip
        left.set_title(f"group {group} (t {plan.boundaries[group]} to {plan.boundaries[group + 1] - 1})")
        left.set_ylabel("score (loss)", fontsize=9)
        cut = _robust_limits(left, scores)
        if cut:
            left.text(0.99, 0.98, f"{cut} worse candidate{'s' if cut > 1 else ''} above", transform=left.transAxes,
                      ha="right", va="top", color=MUTED, fontsize=8)  # fmt: skip
        ticks = sorted({int(r) for r in np.linspace(1, rounds.max() + 1, 5)})
        bar = figure.colorbar(dots, ax=left, shrink=0.85, pad=0.01, ticks=ticks)
        bar.set_label("round", color=MUTED, fontsize=9)
        bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
        bar.outline.set_visible(False)
        right.plot(*best_so_far(scored), color=MEASURED, linewidth=1.8, drawstyle="steps-post", label="best so far")
        right.plot(np.arange(1, len(scored) + 1), scores, ".", color=MUTED, markersize=4, label="candidate")
        _robust_limits(right, scores)
        for start in np.flatnonzero(np.diff(rounds)) + 1.5:
            right.axvline(start, color=GROUP_SHADES[0], linewidth=1.2, zorder=0)
    axes[-1, 0].set_xlabel("MACs / budget" if plan.budgets else "estimated time / budget", fontsize=9)
    axes[-1, 1].set_xlabel("candidates scored", fontsize=9)
    axes[0, 1].legend(loc="upper right", frameon=False, fontsize=9)
    return png(figure)


def widths_plot(plan: WidthPlan, units: Sequence[PruningUnit]) -> bytes:
    """A PNG: the share of live channels of every unit (rows, from input to output) in every expert (columns).

    Below each expert are its timesteps, its MACs and its estimated time, where the plan has them.
    """
    experts = range(len(plan.experts))
    live = np.array([[plan.experts[e][unit.name].width for e in experts] for unit in units], dtype=float)
    share = live / np.array([unit.channels for unit in units], dtype=float)[:, None]
    figure, axes = new_figure(max(6.0, 3.0 + 1.0 * len(experts)), 1.2 + 0.3 * len(units))
    axis = axes[0, 0]
    image = axis.imshow(share, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for row, unit in enumerate(units):
        for expert in experts:
            tint = "white" if share[row, expert] > 0.6 else INK
            text = f"{int(live[row, expert])} / {unit.channels}" if live[row, expert] else "skipped"
            axis.text(expert, row, text, ha="center", va="center", color=tint, fontsize=8)
    axis.set_xticks(experts, [_described(plan, expert) for expert in experts])
    axis.set_yticks(
        range(len(units)), [f"{unit.name}{' (heads)' if unit.kind == 'attention' else ''}" for unit in units]
    )
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02)
    bar.set_label("live channels", color=MUTED, fontsize=9)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.outline.set_visible(False)
    return png(figure)


def _described(plan: WidthPlan, expert: int) -> str:
    lines = [f"expert {expert}", f"t {plan.boundaries[expert]} to {plan.boundaries[expert + 1] - 1}"]
    if plan.macs:
        lines.append(f"{plan.macs[expert] / 1e6:.4g} M MACs")
    if plan.latency:
        lines.append(f"{plan.latency[expert] / 1e6:.4g} ms")
    return "\n".join(lines)


def agent_comparison(searches: Mapping[str, Sequence[Trial]]) -> bytes:
    """A PNG: how far each search's best score after n candidates is above the best of all; one panel per group.

    Args:
        searches: {label: its trials}, such as those of several memory files (`read_trials`).

    Raises:
        ValueError: nothing was scored.
    """
    groups = sorted({trial.group for trials in searches.values() for trial in _scored(trials)})
    if not groups:
        raise invalid("searches", list(searches), "searches that score their candidates")
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = new_figure(3.7 * columns + 0.6, 2.8 * rows + 0.6, rows, columns)
    lines: dict[str, Any] = {}
    for axis, group in zip(axes.flat, groups, strict=False):
        own = {label: [t for t in trials if t.group == group] for label, trials in searches.items()}
        curves = {label: best_so_far(trials) for label, trials in own.items() if _scored(trials)}
        least = min(best[-1] for _, best in curves.values())
        for number, label in enumerate(searches):
            if label in curves:
                count, best = curves[label]
                style = "-" if len(count) > 1 else "o"
                (lines[label],) = axis.plot(
                    count, 100 * (best / least - 1), style, color=COLOURS[number % len(COLOURS)], linewidth=1.8,
                    drawstyle="steps-post",
                )  # fmt: skip
        axis.set_title(f"group {group}")
        axis.set_xlabel("candidates scored", fontsize=9)
        axis.set_ylim(bottom=-0.02 * axis.get_ylim()[1])
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("best so far above the best of all (%)", fontsize=9)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False, fontsize=9)
    return png(figure)


def best_so_far(trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """The number of scored candidates (1, 2, ...), and the lowest score among them, each (n,)."""
    scores = np.array([trial.score for trial in _scored(trials)], dtype=float)
    return np.arange(1, len(scores) + 1), np.minimum.accumulate(scores)


def _shades() -> Any:
    """A colour map from pale to dark, without shades too pale for a white page."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["YlGnBu"](np.linspace(0.25, 1.0, 128)))


def _scored(trials: Sequence[Trial]) -> list[Trial]:
    """The trials with a score, without repetitions of widths that were scored before."""
    first: dict[tuple[object, ...], Trial] = {}
    for trial in trials:
        if trial.score is not None:
            first.setdefault((trial.group, *sorted(trial.widths.items())), trial)
    return list(first.values())


def _robust_limits(axis: Axes, scores: np.ndarray) -> int:
    """Leave the worst tenth outside the axis where it would compress all others; how many scores that cuts off."""
    low, high = float(scores.min()), float(np.quantile(scores, 0.9))
    if not (float(scores.max()) > high + (high - low) and high > low):
        return 0
    top = high + 0.15 * (high - low)
    axis.set_ylim(low - 0.08 * (high - low), top)
    return int((scores > top).sum())
