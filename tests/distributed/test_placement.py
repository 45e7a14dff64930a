"""Experts are divided by cost: nobody is idle, sets stay together, and no process has much more than its share."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.distributed import place_experts


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.integers(1, 100), min_size=1, max_size=9),
    size=st.integers(1, 12),
    joined=st.integers(1, 3),
)
def test_every_expert_and_every_process_has_its_place(costs, size, joined):
    sets = [group // joined for group in range(len(costs))]
    teams = place_experts(costs, sets, size)
    assert sorted(g for team in teams for g in team.groups) == list(range(len(costs)))
    assert sorted(r for team in teams for r in team.ranks) == list(range(size))
    assert len(teams) == min(size, max(sets) + 1)
    team_of = {group: number for number, team in enumerate(teams) for group in team.groups}
    assert all(team_of[a] == team_of[b] for a, b in itertools.pairwise(range(len(costs))) if sets[a] == sets[b])
    assert teams == place_experts(costs, sets, size)


@settings(deadline=None, max_examples=40)
@given(costs=st.lists(st.integers(1, 100), min_size=2, max_size=7), size=st.integers(2, 3))
def test_the_most_loaded_process_has_at_most_a_third_more_than_in_the_best_division(costs, size):
    def load(places):
        return max(
            sum(cost for cost, place in zip(costs, places, strict=True) if place == rank) for rank in range(size)
        )

    best = min(load(places) for places in itertools.product(range(size), repeat=len(costs)))
    teams = place_experts(costs, range(len(costs)), size)
    found = max(sum(costs[group] for group in team.groups) / len(team.ranks) for team in teams)
    assert found <= best * 4 / 3


@pytest.mark.parametrize(
    ("costs", "size", "expected"),
    [
        ([8, 1, 1], 5, [((0,), (0, 1, 2)), ((1,), (3,)), ((2,), (4,))]),  # the expensive expert has three processes
        ([5, 4, 3, 2], 2, [((0, 3), (0,)), ((1, 2), (1,))]),
    ],
)
def test_costs_decide_who_trains_what(costs, size, expected):
    teams = place_experts(costs, range(len(costs)), size)
    assert [(team.groups, team.ranks) for team in teams] == expected
