"""The rounds of a search within one group: propose, project onto the budget, score, store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tdc_fast.errors import invalid
from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.agents.protocol import Agent, AgentFailed
from tdc_fast.pruning.memory import Memory, Round
from tdc_fast.pruning.progress import Progress
from tdc_fast.pruning.projection import check_proposal
from tdc_fast.pruning.scoring import Scorer
from tdc_fast.pruning.solver import Solution
from tdc_fast.pruning.task import Answer, LossRise, Proposal, Task, Trial, Widths, as_key, best_of

PROBED = (0.0, 0.5)
"""Shares of a unit's channels at which its loss rise is measured; other widths are interpolated."""


def search_widths(
    task: Task,
    agent: Agent,
    scorer: Scorer | None = None,
    *,
    rounds: int = 1,
    candidates: int = 8,
    memory: Memory | None = None,
    use_memory: bool = True,
    stand_in: Agent | None = None,
    progress: Progress | None = None,
) -> Trial:
    """The trial of lowest score over all rounds, the first of equals.

    Without a scorer there is one round, and its first trial is the answer.

    Args:
        task: the group's task; its memory is replaced in every round.
        agent: proposes the candidates.
        scorer: scores them.
        rounds: rounds of proposing and scoring; an agent with `one_shot` has one.
        candidates: how many proposals a round may have. They are scored together; widths that were scored before are
            not scored again.
        memory: receives every round and trial; what it holds already is not searched again.
        use_memory: False hides the trials of this group and of earlier ones from the agent.
        stand_in: agent for the rounds in which `agent` fails; without one a failure ends the search.
        progress: receives the events of the search.

    Raises:
        ValueError: an argument is out of range, or a proposal is unusable.
    """
    if candidates < 1:
        raise invalid("candidates", candidates, "at least 1")
    one_shot = getattr(agent, "one_shot", False)
    if rounds < 1 or (rounds > 1 and scorer is None and not one_shot):
        raise invalid("rounds", rounds, "at least 1, and a scorer for more than 1")
    memory = Memory() if memory is None else memory
    progress = Progress() if progress is None else progress
    if one_shot:
        rounds = candidates = 1
    if getattr(agent, "measures", False) and scorer:
        task = dataclasses.replace(task, measured=_measured(task, scorer, memory))
    for number in range(rounds):
        view = _view(task, number, memory, use_memory)
        answer = memory.rounds.get((task.group, number)) or _ask(view, agent, stand_in, candidates, memory, progress)
        if len(memory.of_round(task.group, number)) == len(answer.proposals):
            continue
        known = memory.before_round(task.group, number)
        solutions = [task.project(proposal.widths) for proposal in answer.proposals]
        with progress.round(task.group, number, rounds, len(solutions), best_of(known)) as advance:
            scores, spent = _score(task, scorer, solutions, known, advance)
        for trial in _trials(task, answer, solutions, scores, spent):
            memory.add_trial(trial)
        progress.finished_round(task, memory.of_group(task.group))
    trials = [trial for trial in memory.of_group(task.group) if trial.round < rounds]
    return best_of(trials) or trials[0]


def _view(task: Task, number: int, memory: Memory, use_memory: bool) -> Task:
    """The task as the agent sees it in a round."""
    return dataclasses.replace(
        task,
        memory=memory.before_round(task.group, number) if use_memory else (),
        earlier=tuple(trial for trial in memory.trials if trial.group < task.group) if use_memory else (),
        round=number,
        calls=memory.calls,
    )


def _trials(
    task: Task, answer: Round, solutions: Sequence[Solution], scores: Sequence[float | None], spent: Sequence[int]
) -> Iterator[Trial]:
    """The trials of a round's proposals, in their order."""
    for place, (proposal, solution) in enumerate(zip(answer.proposals, solutions, strict=True)):
        yield Trial(
            widths=solution.widths,
            macs=task.macs_of(solution.widths),
            score=scores[place],
            proposal=dict(proposal.widths),
            group=answer.group,
            round=answer.round,
            candidate=place,
            agent=answer.agent,
            seed=answer.seed,
            reason=proposal.reason,
            spent=spent[place],
            latency=solution.cost if task.costs.measure == "ns" else None,
        )


def _ask(
    task: Task, agent: Agent, stand_in: Agent | None, candidates: int, memory: Memory, progress: Progress
) -> Round:
    """The answer of the agent, or of its stand-in, checked and stored in the memory."""
    name, notes, calls = agent.name, tuple[str, ...](), 0
    try:
        answer = agent.propose(task, candidates)
    except AgentFailed as failure:
        if stand_in is None:
            raise
        notes = (*failure.notes, f"{agent.name} had no proposal ({failure.reason}); {stand_in.name} stands in")
        name, calls = stand_in.name, failure.calls
        answer = stand_in.propose(task, candidates)
    if not isinstance(answer, Answer):
        answer = Answer(_listed(name, answer))
    if not 1 <= len(answer.proposals) <= candidates:
        raise invalid(f"proposals of {name}", len(answer.proposals), f"1 to {candidates} of them")
    proposals = tuple(_plain(proposal) for proposal in answer.proposals)
    for proposal in proposals:  # before they are stored, since stored rounds are never asked again
        check_proposal(task.units, proposal.widths)
    asked = Round(task.group, task.round, name, task.seed, proposals, (*notes, *answer.notes), calls + answer.calls)
    for note in asked.notes:
        progress.say(f"group {task.group}, round {task.round + 1}: {note}")
    memory.add_round(asked)
    return asked


def _listed(name: str, answer: object) -> tuple[Proposal, ...]:
    proposals = tuple(answer) if isinstance(answer, Iterable) else ()
    if not isinstance(answer, Iterable) or not all(isinstance(proposal, Proposal) for proposal in proposals):
        raise invalid(f"proposals of {name}", answer, "a list of Proposal, or an Answer")
    return proposals


def _plain(proposal: Proposal) -> Proposal:
    """The proposal without numpy's integers, which JSON cannot hold."""
    return Proposal({name: int(width) for name, width in proposal.widths.items()}, str(proposal.reason))


def _score(
    task: Task,
    scorer: Scorer | None,
    solutions: Sequence[Solution],
    known: Sequence[Trial],
    advance: Callable[[int], None],
) -> tuple[list[float | None], list[int]]:
    """Scores of a round's candidates, and the MACs that scoring each of them took.

    All new candidates are scored together, also those that the memory holds already: the last bits of a score may
    depend on the other candidates in the batch, and a resumed search must repeat its numbers.
    """
    if scorer is None:
        return [None] * len(solutions), [0] * len(solutions)
    found: dict[tuple[int, ...], float] = {
        as_key(task.units, trial.widths): trial.score for trial in known if trial.score is not None
    }
    fresh: dict[tuple[int, ...], Solution] = {}
    for solution in solutions:
        key = as_key(task.units, solution.widths)
        if key not in found:
            fresh.setdefault(key, solution)
    if fresh:
        scores = scorer.score(task, [solution.widths for solution in fresh.values()], advance)
        losses = (math.inf if math.isnan(score) else float(score) for score in scores)  # NaN compares with nothing
        found.update(zip(fresh, losses, strict=True))
    keys = [as_key(task.units, solution.widths) for solution in solutions]
    first = [key in fresh and key not in keys[:place] for place, key in enumerate(keys)]
    spent = [
        scorer.samples * task.macs_of(solution.widths) if new else 0
        for solution, new in zip(solutions, first, strict=True)
    ]
    return [found[key] for key in keys], spent


def _measured(task: Task, scorer: Scorer, memory: Memory) -> LossRise:
    """The measured loss rise: each unit alone narrower, all others whole, scored together."""
    if task.group not in memory.sensitivity:
        whole = {unit.name: unit.channels for unit in task.units}
        probes: list[Widths] = [whole]
        places: list[tuple[PruningUnit, int]] = []
        for unit in task.units:
            for width in sorted({int(share * unit.channels / unit.step) * unit.step for share in PROBED}):
                probes.append({**whole, unit.name: width})
                places.append((unit, width))
        loss, *losses = scorer.score(task, probes)
        rise: dict[str, dict[int, float]] = {}
        for unit in task.units:
            points = sorted((w, max(v - loss, 0.0)) for (u, w), v in zip(places, losses, strict=True) if u is unit)
            rise[unit.name] = _interpolated(unit, [*points, (unit.channels, 0.0)])
        spent = scorer.samples * sum(task.macs_of(probe) for probe in probes)
        memory.add_sensitivity(task.group, rise, spent)
    return memory.sensitivity[task.group]


def _interpolated(unit: PruningUnit, points: Sequence[tuple[int, float]]) -> dict[int, float]:
    known, values = zip(*points, strict=True)
    return {width: float(np.interp(width, known, values)) for width in unit.widths()}
