"""A table from its outcomes: means and spreads over seeds, and in how many seeds a row beats the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper.recipes import Study
from bench.paper.run import Outcome
from bench.paper.tables import Table
from tdc_fast.atomic import write_json
from tdc_fast.evaluation.heldout import compare
from tdc_fast.experiments.measure import MeasuringProtocol, Reference


def summarise(
    table: Table,
    study: Study,
    outcomes: dict[str, list[Outcome]],
    seeds: Sequence[int],
    how: MeasuringProtocol,
    reference: Reference,
    environment: dict[str, str],
    cpu_minutes: float | None,
) -> dict[str, Any]:
    """Collect all numbers of a table, as its JSON file holds them."""
    first = outcomes[table.rows[0].key]
    rows = [_row(recipe.label, outcomes[recipe.key], first, study.tells_time) for recipe in table.rows]
    return {
        "table": table.name,
        "question": table.question,
        "study": study.name,
        "seeds": list(seeds),
        "C": {"steps": study.baseline_steps, "macs": first[0].training_macs},
        "rows": rows,
        "score_against_loss": _score_against_loss(rows),
        "frechet": {
            "feature_space": reference.feature_space,
            "samples": how.samples,
            "draws": how.draws,
            "sampler": f"DDIM, {how.sampling_steps} steps",
            "floors": [floor.to_json() for floor in reference.floors],
        },
        "settings": {"model and training": dict(study.settings), "TDC": dict(study.experts)},
        "recipes": {
            recipe.label: {"cost": recipe.cost, "changes": {**(recipe.experts or {}), **recipe.by_group}}
            for recipe in table.rows
        },
        "environment": environment,
        "cpu_minutes": cpu_minutes and round(cpu_minutes, 1),
    }


def _sampling_time(ours: Sequence[Outcome]) -> float | None:
    shares = [outcome.measured.time_share for outcome in ours]
    known = [share for share in shares if share is not None]
    return statistics.mean(known) if len(known) == len(shares) else None


def _row(label: str, ours: Sequence[Outcome], baseline: Sequence[Outcome], in_time: bool) -> dict[str, Any]:
    losses = [outcome.measured.heldout.mean for outcome in ours]
    relative = [
        compare(a.measured.heldout, b.measured.heldout)[0].relative for a, b in zip(ours, baseline, strict=True)
    ]
    distances = [statistics.mean(outcome.measured.distances) for outcome in ours]
    theirs = [statistics.mean(outcome.measured.distances) for outcome in baseline]
    quarters = zip(*(outcome.measured.heldout.per_group for outcome in ours), strict=True)
    return {
        "label": label,
        "training_cost": statistics.mean(
            a.training_macs / b.training_macs for a, b in zip(ours, baseline, strict=True)
        ),
        "sampling_cost": statistics.mean(
            a.measured.macs_per_image / b.measured.macs_per_image for a, b in zip(ours, baseline, strict=True)
        ),
        **({"sampling_time": _sampling_time(ours)} if in_time else {}),
        "sampling_macs_per_image": [outcome.measured.macs_per_image for outcome in ours],
        "heldout_loss": losses,
        "heldout_loss_by_quarter": [statistics.mean(quarter) for quarter in quarters],
        "heldout_against_baseline": relative,
        "frechet_distance": distances,
        "frechet_draws": [list(outcome.measured.distances) for outcome in ours],
        "better_on_loss": sum(value < 0 for value in relative),
        "better_on_frechet": sum(a < b for a, b in zip(distances, theirs, strict=True)),
        "search_score": [statistics.mean(outcome.best_scores) for outcome in ours if outcome.best_scores],
        "phases_macs": [outcome.phases for outcome in ours],
        "boundaries": [list(outcome.boundaries) for outcome in ours],
    }


def _score_against_loss(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Rank correlation of the best score with the held-out loss after fine-tuning, for each seed.

    It is taken over the rows with a search; empty if there are fewer than three.
    """
    searched = [row for row in rows if row["search_score"]]
    if len(searched) < 3:
        return []
    seeds = range(len(searched[0]["heldout_loss"]))
    pairs = [
        (
            _ranks([row["search_score"][seed] for row in searched]),
            _ranks([row["heldout_loss"][seed] for row in searched]),
        )
        for seed in seeds
    ]
    return [statistics.correlation(*pair) if all(len(set(ranks)) > 1 for ranks in pair) else 0.0 for pair in pairs]


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share their mean rank."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def write_table(result: dict[str, Any], folder: Path) -> str:
    """Write TABLE-STUDY.json and TABLE-STUDY.md into a folder; returns the text of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    name, text = f"{result['table']}-{result['study']}", as_markdown(result)
    write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def as_markdown(result: dict[str, Any]) -> str:
    """The table as Markdown, with mean ± standard deviation over seeds and how it was measured."""
    seeds = len(result["seeds"])
    searched = any(row["search_score"] for row in result["rows"])
    in_time = "sampling_time" in result["rows"][0]
    lines = [
        f"# {result['table']}: {result['study']}",
        "",
        result["question"],
        "",
        f"| model | training cost | sampling MACs |{' sampling time |' if in_time else ''} held-out loss | against the "
        "first row | by quarter, high to low SNR | Fréchet distance | better on loss / distance |"
        + (" best score found |" if searched else ""),
        "|---|---|---|---|---|---|---|---|" + "---|" * (searched + in_time),
    ]
    for row in result["rows"]:
        quarters = " ".join(f"{value:.4f}".lstrip("0") for value in row["heldout_loss_by_quarter"])
        relative = [100 * value for value in row["heldout_against_baseline"]]
        lines.append(
            f"| {row['label']} | {row['training_cost']:.2f} C | {row['sampling_cost']:.2f} "
            f"{_time_cell(row['sampling_time']) if in_time else ''}"
            f"| {spread(row['heldout_loss'], 5)} | {spread(relative, 2)} % | {quarters} "
            f"| {spread(row['frechet_distance'], 3)} "
            f"| {row['better_on_loss']} / {row['better_on_frechet']} of {seeds} |"
            + (f" {spread(row['search_score'], 5) if row['search_score'] else ''} |" if searched else "")
        )
    frechet = result["frechet"]
    floors = "; ".join(f"{floor['kind']} {floor['mean']:.3g}" for floor in frechet["floors"])
    lines += [
        "",
        f"{_about_seeds(result['seeds'])} C is "
        f"{result['C']['steps']} uniform steps, {result['C']['macs']:.3g} MACs; costs are counted MACs, pruning and "
        f"calibration included. {_ABOUT_TIME if in_time else ''}"
        f"Fréchet distance: {frechet['samples']} samples, {frechet['draws']} draw(s), {frechet['sampler']}, in "
        f"{frechet['feature_space']}; real against real: {floors}.",
        *(["", _about_scores(result["score_against_loss"])] if searched else []),
        "",
        f"{result['environment']['machine']}; torch {result['environment']['torch']}, "
        f"tdc_fast {result['environment']['tdc_fast']}; {result['date']}; `{result['command']}`"
        f"{_took(result['cpu_minutes'])}.",
        "",
    ]
    return "\n".join(lines)


_ABOUT_TIME = "Sampling time: estimated, as a share of the base's. "


def _time_cell(share: float | None) -> str:
    return "| — " if share is None else f"| {share:.2f} "


def _about_seeds(seeds: Sequence[int]) -> str:
    named = ", ".join(map(str, seeds))
    return f"Seeds {named}; mean ± standard deviation over them." if len(seeds) > 1 else f"Seed {named}."


def _took(cpu_minutes: float | None) -> str:
    return "" if cpu_minutes is None else f", {cpu_minutes:.0f} CPU minutes"


def _about_scores(correlations: Sequence[float]) -> str:
    text = "Best score: loss of the pruned groups' experts before fine-tuning."
    if correlations:
        text += (
            " Its rank correlation with the held-out loss after fine-tuning, over the rows with a search: "
            f"{', '.join(f'{value:.2f}' for value in correlations)} (one per seed)."
        )
    return text


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, or the value itself if there is only one."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
