"""The tables: which recipes each one compares, and which question that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.paper.recipes import Recipe, merged
from tdc_fast.errors import invalid

WHOLE = {"k": 1.0}
ONE = {"groups": 1, **WHOLE}
# Low-SNR groups at 0.7 of the base, the others whole; more of each batch for high SNR, where losses are largest.
BY_HAND = {"budgets": "0.7,0.7,1,1", "stage2_shares": "0.33,0.25,0.21,0.21"}

UNIFORM = Recipe("uniform", "uniform, C")
UNIFORM_80 = Recipe("uniform-80", "uniform, 0.8 C", 0.8)
SMALL = Recipe("uniform-small", "uniform, small batch, C", small_batch=True)
SMALL_80 = Recipe("uniform-small-80", "uniform, small batch, 0.8 C", 0.8, small_batch=True)
TDC_WHOLE = Recipe("tdc-whole", "TDC, whole experts, C", experts=WHOLE)
TDC = Recipe("tdc", "TDC, pruned, 0.8 C", 0.8, experts={})


def _option(name: str, label: str, **changes: Any) -> Recipe:
    by_group = {key: ends for key, ends in changes.items() if isinstance(ends, tuple)}
    experts = {key: value for key, value in changes.items() if key not in by_group}
    return Recipe(f"variant-{name}", f"TDC, pruned, 0.8 C, {label}", 0.8, experts=experts, by_group=by_group)


PAIRS = "convolutions:2,attention:2"
VARIANTS = {
    recipe.key.removeprefix("variant-"): recipe
    for recipe in (
        _option("shared", "convolutions and attention shared", shared_layers="convolutions,attention"),
        _option("shared-pairs", "convolutions and attention shared by pairs", shared_layers=PAIRS),
        _option("shared-convolutions", "convolutions shared", shared_layers="convolutions"),
        _option("shared-level0", "the level of highest resolution shared", shared_layers="level0"),
        _option("lr-high-snr", "learning rate 1 to 0.5 from high to low SNR", stage2_lr_factors=(1.0, 0.5)),
        _option("lr-low-snr", "learning rate 0.5 to 1 from high to low SNR", stage2_lr_factors=(0.5, 1.0)),
        _option("ema-high-snr", "averages 4 to 1 times as long from high to low SNR", stage2_ema_factors=(4.0, 1.0)),
        _option("ema-low-snr", "averages 1 to 4 times as long from high to low SNR", stage2_ema_factors=(1.0, 4.0)),
        _option("slope", "shares of the batch by the slope of the loss", stage2_slope_windows=32),
        _option("distillation", "distillation from the base, weight 1", distillation_weight=1.0),
        _option("distillation-weak", "distillation from the base, weight 0.1", distillation_weight=0.1),
    )
}
"""Models that differ from TDC in one thing, by the name that `--variants` has for it."""
WHOLE_EXPERTS = "whole-"


def variant(name: str) -> Recipe:
    """The recipe of a variant: a name of `VARIANTS`, or `whole-` and such a name for whole experts at C.

    Raises:
        ValueError: there is no such variant.
    """
    recipe = VARIANTS.get(name.removeprefix(WHOLE_EXPERTS))
    if recipe is None:
        raise invalid("variants", name, f"{', '.join(VARIANTS)}, or {WHOLE_EXPERTS} before one of them")
    if not name.startswith(WHOLE_EXPERTS):
        return recipe
    label = recipe.label.replace("pruned, 0.8 C", "whole experts, C")
    return replace(recipe, key=f"{recipe.key}-whole", label=label, cost=1.0, experts={**WHOLE, **recipe.experts})  # type: ignore[dict-item]


@dataclass(frozen=True)
class Table:
    """Rows of models, the baseline first."""

    name: str
    question: str
    rows: tuple[Recipe, ...]


def with_merged(table: Table, scales: Sequence[float]) -> Table:
    """A table with a further row for each scale after every row of several experts: these, merged."""
    rows = []
    for recipe in table.rows:
        rows.append(recipe)
        if recipe.experts is not None and recipe.experts.get("groups") != 1:
            rows += [merged(recipe, scale) for scale in dict.fromkeys(scales)]
    return replace(table, rows=tuple(rows))


def _settings() -> tuple[Recipe, ...]:
    def row(key: str, label: str, **changes: object) -> Recipe:
        return Recipe(f"settings-{key}", label, 0.8, experts=changes)

    return (
        replace(TDC, label="TDC: k = 0.6, N = 4, groups of equal width, 8 images per expert and step"),
        *(row(f"k{k}", f"k = {k}", k=k) for k in (0.4, 0.8, 1.0)),
        *(row(f"n{n}", f"N = {n}, {32 // n} images per expert and step", groups=n) for n in (2, 8)),
        *(row(g, f"grouping by {g}", grouping=g) for g in ("snr", "difficulty", "similarity")),
        row("snr-reversed", "low SNR counts as hard", difficulty="snr-reversed"),
        row("loss", "high loss counts as hard", difficulty="loss"),
        row("loss-reversed", "low loss counts as hard", difficulty="loss-reversed"),
        row("by-hand", "budgets and shares of the batch by hand", **BY_HAND),
    )


SEARCH = {"rounds": 4, "candidates": 8, "calibration_batches": 2}


def _agents() -> tuple[Recipe, ...]:
    def row(agent: str, label: str, **changes: object) -> Recipe:
        key = f"agent-{agent}" + ("" if changes.get("memory", True) else "-forgetful")
        return Recipe(key, label, 0.8, experts={**BY_HAND, **SEARCH, "agent": agent, **changes})

    return (
        *(row(agent, f"{agent}, one proposal") for agent in ("taylor", "magnitude")),
        *(row(agent, f"{agent}, 32 candidates") for agent in ("random", "greedy", "evolution", "tpe")),
        *(row(agent, f"{agent}, 32 candidates, no memory", memory=False) for agent in ("evolution", "tpe")),
    )


TABLES = {
    table.name: table
    for table in (
        Table(
            "main",
            "Does TDC at 0.8 C beat one uniform model at C, and every control?",
            (
                UNIFORM,
                UNIFORM_80,
                SMALL,
                SMALL_80,
                Recipe("one", "N = 1, the experts' recipe, C", experts=ONE, small_batch=True),
                Recipe("one-pruned", "N = 1, pruned, 0.8 C", 0.8, experts=ONE, small_batch=True, mean_budget=True),
                TDC_WHOLE,
                TDC,
            ),
        ),
        Table(
            "stages",
            "Are two stages better than experts from scratch at equal cost?",
            (
                UNIFORM,
                Recipe(
                    "uniform-small-throughout",
                    "uniform, small steps throughout, C",
                    small_batch=True,
                    small_stage1=True,
                ),
                TDC_WHOLE,
                Recipe(
                    "tdc-whole-small", "TDC, whole experts, C, stage 1 in small steps", experts=WHOLE, small_stage1=True
                ),
                Recipe("scratch", "experts from scratch, C", experts=WHOLE, from_scratch=True),
                TDC,
                Recipe("tdc-small", "TDC, pruned, 0.8 C, stage 1 in small steps", 0.8, experts={}, small_stage1=True),
                Recipe("scratch-80", "experts from scratch, 0.8 C", 0.8, experts=WHOLE, from_scratch=True),
            ),
        ),
        Table(
            "settings",
            "How much do k, the number of groups, the grouping and the order of difficulty matter? (all at 0.8 C)",
            (UNIFORM, UNIFORM_80, *_settings()),
        ),
        Table(
            "variants",
            "How much does each option of stage 2 matter? (all at 0.8 C)",
            (UNIFORM, TDC, *VARIANTS.values()),
        ),
        Table(
            "agents",
            "Which agent finds the best widths with as many scored candidates, and what is its memory worth?",
            (UNIFORM, *_agents()),
        ),
    )
}
