"""The figures of a search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tdc_fast.nn.units import PruningUnit
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tdc_fast.pruning import plots
from tdc_fast.pruning.plots import agent_comparison, best_so_far, search_plot, widths_plot
from tdc_fast.pruning.task import Trial


def tried(group: int, place: int, score: float | None, width: int) -> Trial:
    return Trial({"u": width}, 90 + width, score, {"u": width}, group=group, round=place // 2, candidate=place % 2)


PLAN = WidthPlan(
    base_hash="0" * 64, boundaries=(0, 10, 30), macs=(100, 92), budgets=(100, 95),
    experts=({"u": ExpertUnit((0, 1, 2, 3), 4)}, {"u": ExpertUnit((0, 1, 2, 3), 0)}),
)  # fmt: skip


def test_pictures_of_searches_are_drawn_and_of_nothing_scored_refused() -> None:
    scored = [tried(1, place, score, width) for place, (score, width) in enumerate([(2.0, 0), (9.0, 1), (1.0, 3)])]
    for picture in (
        search_plot([[], scored], PLAN),
        widths_plot(PLAN, [PruningUnit("u", "attention", 4, 1, 1, ())]),
        agent_comparison({"tpe": scored, "random": scored[:1]}),
    ):
        assert picture.startswith(b"\x89PNG")
    unscored = [tried(1, 0, None, 4)]
    with pytest.raises(ValueError, match="trials"):
        search_plot([[], unscored], PLAN)
    with pytest.raises(ValueError, match="searches"):
        agent_comparison({"taylor": unscored})


def test_an_experts_column_tells_its_timesteps_its_macs_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "png", lambda figure: figure)  # a picture's texts cannot be read
    units = [PruningUnit("u", "attention", 4, 1, 1, ())]

    def columns(plan: WidthPlan) -> list[str]:
        return [label.get_text() for label in widths_plot(plan, units).axes[0].get_xticklabels()]

    plan = replace(PLAN, macs=(4101120, 2098176))
    assert columns(plan) == ["expert 0\nt 0 to 9\n4.101 M MACs", "expert 1\nt 10 to 29\n2.098 M MACs"]
    timed = columns(replace(plan, latency=(6743600, 4931155)))
    assert timed == [f"{text}\n{ms} ms" for text, ms in zip(columns(plan), ("6.744", "4.931"), strict=True)]
    assert columns(replace(plan, macs=(), budgets=())) == ["expert 0\nt 0 to 9", "expert 1\nt 10 to 29"]


def test_the_best_so_far_never_rises_and_counts_each_candidate_once() -> None:
    trials = [tried(1, place, *pair) for place, pair in enumerate([(2.0, 0), (3.0, 1), (2.0, 0), (1.0, 3), (4.0, 2)])]
    count, best = best_so_far(trials)
    assert count.tolist() == [1, 2, 3, 4] and best.tolist() == [2.0, 2.0, 1.0, 1.0]
