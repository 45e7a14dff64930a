"""Which processes train which experts, by what the experts cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Team:
    """Processes that train the same experts, each on its share of their samples.

    Attributes:
        groups: the groups whose experts they train, ascending.
        ranks: the processes, ascending; the first of them is the one whose weights are stored.
    """

    groups: tuple[int, ...]
    ranks: tuple[int, ...]


def place_experts(costs: Sequence[float], sets: Sequence[int], size: int) -> tuple[Team, ...]:
    """Divide experts among processes so that the most loaded process has little more than the others.

    Experts go to the process with the least load so far, the most expensive first (Graham's rule of the longest
    processing time, at most 4/3 of the best division). With more processes than there is to divide, each further one
    joins the team that costs each of its processes the most.

    Args:
        costs: what a step of each group's expert costs, MACs per step (N,).
        sets: for each group the number of its set, from 0: experts of one set share weights and stay together.
        size: number of processes.

    Returns:
        One team per process, or per set where there are fewer sets; equal for equal arguments.
    """
    members = [[group for group, own in enumerate(sets) if own == number] for number in range(max(sets) + 1)]
    cost = [sum(costs[group] for group in groups) for groups in members]
    order = sorted(range(len(members)), key=lambda number: (-cost[number], number))
    if size <= len(members):
        found: list[list[int]] = [[] for _ in range(size)]
        load = [0.0] * size
        for number in order:
            rank = load.index(min(load)) if all(found) else next(r for r in range(size) if not found[r])
            found[rank] += members[number]
            load[rank] += cost[number]
        return tuple(Team(tuple(sorted(groups)), (rank,)) for rank, groups in enumerate(found))
    count = [1] * len(members)
    for _ in range(size - len(members)):
        most = max(range(len(members)), key=lambda number: (cost[number] / count[number], -number))
        count[most] += 1
    teams, start = [], 0
    for number, groups in enumerate(members):
        teams.append(Team(tuple(groups), tuple(range(start, start + count[number]))))
        start += count[number]
    return tuple(teams)
