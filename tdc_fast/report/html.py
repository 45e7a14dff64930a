"""One HTML page from a `Comparison`, with styles, figures and images inline: it needs no other file and no network."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from tdc_fast.atomic import atomic_file, write_json
from tdc_fast.evaluation.heldout import compare
from tdc_fast.report import findings, plots
from tdc_fast.report.numbers import Comparison, ExpertWidths, ModelResult
from tdc_fast.report.style import STYLE

LEVEL_NOTE = (
    "One training seed is shown. “Level” means that the difference is within the noise of measuring (other held-out "
    "images, other samples) 19 times in 20. Training seeds add to it; see the limits below."
)


def write_report(comparison: Comparison, directory: Path, candidate: str, baselines: tuple[str, ...]) -> Path:
    """Write report.html and report.json, each atomically.

    Args:
        comparison: the numbers.
        directory: where to write; created if it does not exist.
        candidate: key of the model that the headline is about.
        baselines: keys of the models that it is compared with; the headline is about the first.

    Returns:
        The path of report.html.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "report.json", comparison.to_json())
    page = directory / "report.html"
    with atomic_file(page) as file:
        file.write(render_report(comparison, candidate, baselines).encode())
    return page


def render_report(comparison: Comparison, candidate: str, baselines: tuple[str, ...]) -> str:
    """The page as HTML text; arguments as in `write_report`."""
    body = "\n".join(
        (
            _header(comparison, candidate, baselines),
            _section("numbers", "The numbers", _numbers(comparison)),
            _section("samples", "Samples side by side", _samples(comparison)),
            _section("heldout", f"Held-out loss by {comparison.interval}", _heldout(comparison)),
            _section("distance", "Fréchet distance and its spread", _distance(comparison)),
            _section("groups", "SNR, groups and budgets", _groups(comparison)),
            _section("widths", "Widths by layer and expert", _widths(comparison)),
            _section("curves", f"Training loss by {comparison.interval}", _curves(comparison)),
            _section("compute", "Where the compute went", _compute(comparison)),
            _section("limits", "What this run cannot show", _limits(comparison)),
            _section("settings", "Settings and versions", _settings(comparison)),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(comparison.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(comparison: Comparison, candidate: str, baselines: tuple[str, ...]) -> str:
    sentences = [findings.versus(comparison, candidate, baseline) for baseline in baselines]
    others = [m.key for m in comparison.models if m.key != candidate and m.key not in baselines]
    sentences += [findings.versus(comparison, key, baselines[0]) for key in others]
    sentences.append(findings.group_sentence(comparison, candidate, baselines[0]))
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return (
        f"<header><h1>{html.escape(comparison.title)}</h1>"
        f'<p class="sub">{html.escape(comparison.subtitle)}</p>'
        f'<p class="headline">{html.escape(findings.headline(comparison, candidate, baselines[0]))}</p>'
        f"<ul>{items}</ul>"
        f'<p class="note">{html.escape(LEVEL_NOTE)}</p></header>'
    )


def _section(anchor: str, title: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{html.escape(title)}</h2>{content}</section>'


def _figure(source: str, alt: str, caption: str = "", css: str = "") -> str:
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{css}"><img src="{source}" alt="{html.escape(alt)}">{text}</figure>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    """An HTML table; cells are HTML already, so callers escape their text."""
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _swatch(comparison: Comparison, model: ModelResult) -> str:
    tint = plots.colour(comparison, model)
    return f'<span class="swatch" style="background:{tint}"></span>{html.escape(model.label)}'


def _plus_minus(value: float, spread: float, digits: str) -> str:
    spread_text = "" if math.isnan(spread) else f' <span class="pm">± {spread:{digits}}</span>'
    return f"{value:{digits}}{spread_text}"


def _numbers(comparison: Comparison) -> str:
    groups, in_time = range(len(comparison.boundaries) - 1), bool(comparison.widths.times)
    rows = []
    for model in comparison.models:
        overall, _ = compare(model.heldout, comparison.baseline.heldout)
        against = "—" if model is comparison.baseline else (
            _plus_minus(100 * overall.relative, 100 * overall.standard_error, ".2f") + " %"
        )  # fmt: skip
        rows.append(
            [
                _swatch(comparison, model),
                f"{comparison.training_cost(model):.3f} C",
                f"{comparison.sampling_cost(model):.3f}",
                *([_share(model.sampling_time)] if in_time else []),
                f"{model.heldout.mean:.5f}",
                against,
                *(f"{model.heldout.per_group[g]:.4f}" for g in groups),
                _plus_minus(model.frechet.mean, model.frechet.standard_deviation, ".3g"),
            ]
        )
    head = [
        "model", "training cost", "cost per image", *(["time per image"] if in_time else []), "held-out loss",
        "against the first",
        *(f"{comparison.interval} {g}" for g in groups), "Fréchet distance",
    ]  # fmt: skip
    first = comparison.models[0]
    floors = "; ".join(
        f"{floor.kind}, n = {floor.n}: {min(floor.values):.3g} to {max(floor.values):.3g}"
        for floor in comparison.floors
    )
    note = (
        f"Lower is better throughout; {comparison.interval} 0 has the least noise. C is the measured training compute "
        f"of the first model, {first.training_macs:.3e} MACs; cost per image counts every step of the sampler with the "
        f"expert of that step ({first.sampling_macs / 1e6:.1f} M MACs for the first model)"
        f"{'; time per image is estimated likewise, as a share of the time of the base' if in_time else ''}. "
        "Held-out loss: "
        f"{first.heldout.num_images} images, {len(first.heldout.timesteps[0])} fixed timesteps for each "
        f"{comparison.interval}, the same noise for all models; ± is the standard error of the paired difference. "
        "Fréchet distance: "
        f"{len(first.frechet.values)} draws of {first.frechet.n} samples against {comparison.reference}; ± is the "
        f"standard deviation over the draws. Real against real: {floors}."
    )
    return _table(head, rows, "numbers") + f'<p class="note">{html.escape(note)}</p>'


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _samples(comparison: Comparison) -> str:
    cards = [_figure(plots.sample_grid(comparison.real_images), "real images", "real images", "grid")]
    for model in comparison.models:
        cards.append(_figure(plots.sample_grid(model.samples), f"samples of {model.label}", model.label, "grid"))
    note = (
        f"Not selected: the first images of the first draw. {comparison.sampler}; all models start from the same noise."
    )
    return f'<div class="grids">{"".join(cards)}</div><p class="note">{html.escape(note)}</p>'


def _heldout(comparison: Comparison) -> str:
    note = (
        "Each point is a model's loss relative to that of the first model, on the same noisy images; the bars are two "
        "standard errors over images. Groups with little noise have the largest losses and dominate the overall loss."
    )
    return _figure(plots.heldout_differences(comparison), "held-out loss differences") + f'<p class="note">{note}</p>'


def _distance(comparison: Comparison) -> str:
    note = (
        f"Feature space: {comparison.feature_space}. This is not the published Inception-based score; compare it only "
        "with distances of the same feature space, reference and n. Each dot is one independent draw of "
        f"{comparison.models[0].frechet.n} samples; the bar is their mean. Ticks are sets of real images: “bootstrap” "
        "draws with replacement from the reference itself, “halves” are disjoint and much smaller."
    )
    return _figure(plots.frechet_draws(comparison), "Fréchet distances") + f'<p class="note">{html.escape(note)}</p>'


def _groups(comparison: Comparison) -> str:
    plan = comparison.widths
    note = (
        "SNR(t) = 10 log10(ᾱ / (1 − ᾱ)). The higher the SNR, the harder the noise is to predict. The hardest group "
        "keeps the whole base model. Bars: the share of the base's MACs that each pruned expert's widths take"
        f"{', and the share that it may use' if plan.budgets else ''}."
    )
    if plan.times:
        note += (
            " Time: the estimated time of one forward of a batch of the expert's samples, as a share of that of the "
            f"whole base, {plan.base_ms:.4g} ms."
        )
    figure = _figure(plots.snr_curve(comparison), "SNR curve, groups and budgets")
    return figure + _experts(plan) + f'<p class="note">{note}</p>'


def _experts(plan: ExpertWidths) -> str:
    """A table of what each expert costs, with its budget where there is one."""
    columns = {
        "MACs / base": plan.macs, "budget in MACs": plan.budgets, "time / base": plan.times,
        "budget in time": plan.time_budgets,
    }  # fmt: skip
    shown = {name: values for name, values in columns.items() if values}
    rows = [
        [f"{group}", f"{start} to {stop - 1}", *(f"{values[group]:.4f}" for values in shown.values())]
        for group, (start, stop) in enumerate(itertools.pairwise(plan.boundaries))
    ]
    return _table(("group", "timesteps", *shown), rows, "numbers")


def _widths(comparison: Comparison) -> str:
    note = (
        "Channels kept of all channels, for each expert and each unit that can be pruned (the inner width of a "
        "residual block, the heads of an attention layer). 0 leaves only the skip path."
    )
    return _figure(plots.width_heatmap(comparison), "live widths", css="narrow") + f'<p class="note">{note}</p>'


def _curves(comparison: Comparison) -> str:
    merged = len(plots.trained(comparison)) < len(comparison.models)
    note = (
        "Running means of the training loss. Models that share stage 1 share its line"
        f"{'; merged experts have the line of their experts' if merged else ''}. Training losses are noisy: "
        "compare models by the held-out loss."
    )
    return _figure(plots.loss_curves(comparison), "loss curves") + f'<p class="note">{note}</p>'


def _compute(comparison: Comparison) -> str:
    phases: list[str] = []
    for model in sorted(comparison.models, key=lambda model: -len(model.phases)):
        phases += [phase for phase in model.phases if phase not in phases]
    total = comparison.baseline.training_macs
    rows = []
    for model in comparison.models:
        shares = [f"{model.phases[phase] / total:.4f}" if phase in model.phases else "—" for phase in phases]
        steps = ", ".join(f"{name} {count}" for name, count in model.steps.items())
        rows.append(
            [
                _swatch(comparison, model), *shares, f"{comparison.training_cost(model):.4f}",
                html.escape(steps), f"{model.parameters:,}",
            ]
        )  # fmt: skip
    head = ["model", *(html.escape(phase) for phase in phases), "total (C)", "steps", "parameters"]
    note = "In units of C, counted by torch's FlopCounterMode, forward and backward, without pruned channels."
    descriptions = "".join(
        f"<li>{_swatch(comparison, model)}: {html.escape(model.description)}</li>" for model in comparison.models
    )
    return _table(head, rows, "numbers") + f'<p class="note">{note}</p><ul class="models">{descriptions}</ul>'


def _limits(comparison: Comparison) -> str:
    points = [
        "One training seed is shown. " + comparison.seed_note,
        "The data set, its images and the networks are small; the published gains are for far larger ones.",
        *comparison.missing,
    ]
    return "<ul>" + "".join(f"<li>{html.escape(point)}</li>" for point in points) + "</ul>"


def _settings(comparison: Comparison) -> str:
    parts = []
    for title, values in comparison.settings.items():
        rows = [[html.escape(str(name)), f"<code>{html.escape(str(value))}</code>"] for name, value in values.items()]
        parts.append(f"<div><h3>{html.escape(title)}</h3>{_table(('setting', 'value'), rows)}</div>")
    rows = [[html.escape(name), f"<code>{html.escape(value)}</code>"] for name, value in comparison.environment.items()]
    parts.append(f"<div><h3>versions and machine</h3>{_table(('what', 'value'), rows)}</div>")
    if comparison.seconds:
        times = [[html.escape(name), f"{value:.1f} s"] for name, value in comparison.seconds.items()]
        parts.append(f"<div><h3>time taken</h3>{_table(('phase', 'wall time'), times)}</div>")
    return f'<div class="settings">{"".join(parts)}</div>'
