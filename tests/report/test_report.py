"""The report says what the numbers say, in whichever direction, and needs nothing but itself."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from tdc_fast.data.pixels import grid_image
from tdc_fast.evaluation.frechet import DistanceSpread, Floor
from tdc_fast.evaluation.heldout import HeldoutLosses
from tdc_fast.report import Comparison, ModelResult, html, plots, render_report, write_report
from tdc_fast.report.findings import frechet_verdict, headline, heldout_verdict, versus
from tdc_fast.report.numbers import Curve, ExpertWidths
from tdc_fast.report.plots import colour, smooth, snr_curve

SECTIONS = ["numbers", "samples", "heldout", "distance", "groups", "widths", "curves", "compute", "limits", "settings"]


def _model(key: str, loss: float, distances: tuple[float, ...], training: float = 1.0, family="uniform") -> ModelResult:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    other = torch.rand(2, 50, generator=torch.Generator().manual_seed(len(key)), dtype=torch.float64)
    return ModelResult(
        key=key,
        label=f"model <{key}>",
        family=family,
        description=f"how {key} was trained",
        phases={"stage 1": 5e9, "rest": training * 1e10 - 5e9},
        steps={"stage 1": 10, "rest": 7},
        parameters=1234,
        sampling_macs=training * 2e7,
        heldout=HeldoutLosses((noise + 1) * loss + 1e-3 * other, (0.5, 0.5), ((1, 2), (6, 7)), 3),
        frechet=DistanceSpread(5000, distances),
        curve=Curve((1e9, 5e9, training * 1e10), ((0.9, 0.5, 0.4), (0.8, None, 0.3))),
        samples=torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
    )


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        title="A <title>",
        subtitle="A subtitle.",
        models=(
            _model("base", 0.2, (2.0, 2.1, 2.05)),
            _model("pruned", 0.19, (1.5, 1.6, 1.55), training=0.8, family="experts"),
        ),
        boundaries=(0, 5, 10),
        snr_db=tuple(20.0 - 4 * i for i in range(10)),
        widths=ExpertWidths(("block.a", "block.b"), (16, 8), ((16, 8), (8, 0)), (1.0, 0.6), (1.0, 0.595), (0, 5, 10)),
        floors=(Floor("bootstrap", 5000, (0.1, 0.2)), Floor("halves", 898, (0.5, 0.6))),
        feature_space="64 features of something",
        reference="all real images",
        sampler="DDIM, 25 steps",
        real_images=torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
        settings={"model": {"lr": 0.002}},
        environment={"torch": "2.x"},
        seed_note="Seeds matter.",
        missing=("A missing control.",),
        seconds={"all": 12.0},
    )


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_every_section_and_refers_to_nothing_outside_itself(comparison):
    page = render_report(comparison, "pruned", ("base",))
    for section in SECTIONS:
        assert f'<section id="{section}">' in page
    parser = _Links()
    parser.feed(page)
    assert parser.open == []  # every tag is closed
    assert len(parser.references) >= 8
    assert all(reference.startswith("data:image/") for reference in parser.references)
    assert not re.search(r"@import|url\(|<script|<link", page)


def _many(comparison: Comparison) -> Comparison:
    """Twelve models with long names; the last two are merged from the experts before them."""
    first, pruned = comparison.models
    name = "experts pruned to their budgets, with the level of highest resolution shared"
    experts = [
        replace(pruned, label=f"{name}, {i}", curve=replace(pruned.curve, macs=(1e9, 5e9, 6e9 + i))) for i in range(9)
    ]
    merged = [replace(expert, label=f"{expert.label}, averaged") for expert in experts[-2:]]
    return replace(comparison, models=(first, *experts, *merged))


def test_every_model_has_a_colour_of_its_own(comparison):
    many = _many(comparison)
    assert len({colour(many, model) for model in many.models}) == 12


def test_legends_name_every_line_within_the_figure(comparison, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or "")
    plots.loss_curves(_many(comparison))
    plots.heldout_differences(_many(comparison))
    for figure, count in zip(figures, (10, 11), strict=True):  # merged experts have no curve; the first is the zero
        (legend,) = figure.legends
        figure.draw_without_rendering()
        assert len(legend.get_texts()) == count
        box, panel = legend.get_window_extent(), figure.axes[0].get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and panel.y1 < box.y0 and box.y1 <= figure.bbox.y1
        assert panel.height > 100


def test_the_note_on_curves_says_where_those_of_merged_experts_are(comparison, monkeypatch):
    monkeypatch.setattr(plots, "loss_curves", lambda _: "")
    said = "merged experts have the line of their experts"
    assert said in html._curves(_many(comparison)) and said not in html._curves(comparison)


def test_text_from_outside_is_escaped(comparison):
    page = render_report(comparison, "pruned", ("base",))
    assert "A &lt;title&gt;" in page
    assert "model <" not in page


def test_the_page_never_claims_the_name_of_the_published_score(comparison):
    assert not re.search(r"\bFID\b", render_report(comparison, "pruned", ("base",)))


def test_numbers_settings_limits_and_versions_are_on_the_page(comparison):
    page = render_report(comparison, "pruned", ("base",))
    for text in ("0.800 C", "0.002", "A missing control.", "One training seed", "n = 898", "how pruned was"):
        assert text in page


def test_the_same_numbers_give_the_same_page(comparison):
    assert render_report(comparison, "pruned", ("base",)) == render_report(comparison, "pruned", ("base",))


def test_both_files_are_written_and_the_json_holds_the_numbers(comparison, tmp_path):
    page = write_report(comparison, tmp_path / "new", "pruned", ("base",))
    numbers = json.loads((page.parent / "report.json").read_text())
    assert page.name == "report.html"
    assert numbers["models"]["pruned"]["training_cost"] == pytest.approx(0.8)
    assert numbers["models"]["pruned"]["frechet_distance"]["n"] == 5000
    assert numbers["models"]["base"]["heldout_against_baseline"]["mean"]["relative"] == 0
    assert numbers["frechet_floors"][1]["n"] == 898
    assert numbers["widths"]["units"][1] == {"name": "block.b", "channels": 8, "widths": [8, 0]}


@pytest.mark.parametrize(
    ("loss", "distances", "expected"),
    [
        (0.19, (1.5, 1.6, 1.55), "beat the uniform baseline on both"),
        (0.21, (2.5, 2.6, 2.55), "not confirmed.*worse on both"),
        (0.21, (1.5, 1.6, 1.55), "better on one measure and worse on the other"),
        (0.2, (2.0, 2.1, 2.05), "level with the uniform baseline on both"),
        (0.19, (1.0, 2.1, 3.05), "on one measure and are level on the other"),
        (0.21, (1.0, 2.1, 3.05), "not confirmed.*worse on one measure, level"),
    ],
)
def test_the_headline_follows_the_numbers(comparison, loss, distances, expected):
    pruned = _model("pruned", loss, distances, training=0.8)
    changed = replace(comparison, models=(comparison.models[0], pruned))
    assert re.search(expected, headline(changed, "pruned", "base"))


def test_a_difference_within_the_spread_is_called_level(comparison):
    base = comparison.models[0]
    noisy = replace(base, frechet=DistanceSpread(5000, (1.0, 2.9)))
    assert frechet_verdict(noisy, base).outcome == "level"
    single = replace(base, frechet=DistanceSpread(5000, (0.1,)))
    assert frechet_verdict(single, base).outcome == "level"  # one draw has no known spread
    assert heldout_verdict(base, base).outcome == "level"


def test_a_sentence_states_cost_and_both_measures(comparison):
    sentence = versus(comparison, "pruned", "base")
    assert "0.80 times its training compute" in sentence
    assert "0.80 times the compute per image" in sentence
    assert "held-out loss (lower by" in sentence
    assert "Fréchet distance (1.55 against 2.05)" in sentence


def test_the_grid_places_images_in_rows():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2) * 10
    picture = grid_image(images, columns=2, scale=1, gap=1)
    assert picture.size == (7, 7)
    assert [picture.getpixel(place) for place in ((1, 1), (4, 1), (1, 4), (4, 4), (0, 0))] == [0, 10, 20, 255, 255]


def test_running_means_leave_missing_values_out():
    assert smooth([1.0, None, 3.0, 5.0], 2).tolist() == [1.0, 1.0, 3.0, 4.0]


def texts_of(picture: str) -> list[str]:
    """The texts of a drawn SVG, which matplotlib also writes as comments; those of several lines line by line."""
    svg = base64.b64decode(picture.partition(",")[2]).decode()
    return [line for text in re.findall("<!-- (.*?) -->", svg, re.DOTALL) for line in text.split("\n")]


def test_experts_with_budgets_in_time_show_the_shares_of_macs_and_of_time(comparison):
    in_time = replace(comparison.widths, budgets=(), times=(1.0, 0.712), time_budgets=(1.0, 0.72), base_ms=4.2)
    only_told = replace(in_time, budgets=(1.0, 0.6), time_budgets=())
    for plan, drawn in ((in_time, {"0.595", "time 0.712 of 0.720"}), (only_told, {"0.595 of 0.600", "time 0.712"})):
        assert drawn <= set(texts_of(snr_curve(replace(comparison, widths=plan))))
    told = in_time.to_json()
    assert (told["budgets"], told["times"], told["time_budgets"], told["base_ms"]) == ([], [1, 0.712], [1, 0.72], 4.2)
    assert not {"times", "time_budgets", "base_ms"} & comparison.widths.to_json().keys()
    heads = {
        "<th>MACs / base</th><th>time / base</th><th>budget in time</th></tr>": in_time,
        "<th>MACs / base</th><th>budget in MACs</th><th>time / base</th></tr>": only_told,
        "<th>MACs / base</th><th>budget in MACs</th></tr>": comparison.widths,
    }
    for head, plan in heads.items():
        page = html._groups(replace(comparison, widths=plan))
        assert head in page and ("whole base, 4.2 ms" in page) == bool(plan.times)
    assert "<td>1</td><td>5 to 9</td><td>0.5950</td><td>0.7120</td><td>0.7200</td>" in html._groups(
        replace(comparison, widths=in_time)
    )


def test_models_show_their_time_per_image_beside_their_macs_where_it_is_estimated(comparison):
    base, pruned = comparison.models
    models = (replace(base, sampling_time=1.0), replace(pruned, sampling_time=0.856))
    timed = replace(comparison, models=models, widths=replace(comparison.widths, times=(1.0, 0.7), base_ms=4.2))
    page = html._numbers(timed)
    assert "<th>cost per image</th><th>time per image</th>" in page and "<td>0.800</td><td>0.856</td>" in page
    assert timed.to_json()["models"]["pruned"]["sampling_time"] == 0.856
    assert "<td>—</td>" in html._numbers(replace(timed, models=(models[0], pruned)))  # whose plan tells none
    assert "time per image" not in html._numbers(comparison)
    assert "sampling_time" not in comparison.to_json()["models"]["pruned"]
