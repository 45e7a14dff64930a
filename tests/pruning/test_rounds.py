"""The rounds of a search: what an agent sees, what is remembered, and that a search repeats and goes on."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tdc_fast.pruning.agents import AGENTS, AgentFailed, MostImportant, make_agent
from tdc_fast.pruning.memory import Memory, read_trials
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.task import Proposal, Task, Widths
from tests.pruning.tiny import tiny_net, tiny_task

# The tiny net has units so coarse that most budgets are missed.
BUDGET = 9 + 6 * 6
SEARCHING = sorted(set(AGENTS) - {"taylor", "magnitude", "llm"})


class Script:
    """Proposes from a list, and keeps the tasks it was given."""

    name = "script"

    def __init__(self, *rounds: Sequence[Widths]) -> None:
        self.rounds = rounds
        self.tasks: list[Task] = []

    def propose(self, task: Task, count: int) -> list[Proposal]:
        self.tasks.append(task)
        return [Proposal(dict(widths), f"idea {place}") for place, widths in enumerate(self.rounds[task.round])]


class Narrowest:
    """Prefers a narrow first layer, and notes what it was asked to score."""

    samples = 10

    def __init__(self) -> None:
        self.asked: list[list[Widths]] = []

    def score(
        self, task: Task, candidates: Sequence[Widths], advance: Callable[[int], None] = lambda count: None
    ) -> list[float]:
        self.asked.append(list(candidates))
        return [float(widths["layers.0"]) - 2 + task.group for widths in candidates]


def widths(first: int, second: int) -> dict[str, int]:
    return {"layers.0": first, "layers.1": second}


def test_the_best_scored_trial_of_all_rounds_wins_and_the_memory_holds_them_all() -> None:
    script = Script([widths(3, 3), widths(1, 5)], [widths(4, 2), widths(3, 3)])
    scorer, memory = Narrowest(), Memory()
    best = search_widths(tiny_task(BUDGET), script, scorer, rounds=2, memory=memory)
    assert best.widths == widths(1, 5) and best.score == -1.0
    assert [trial.widths["layers.0"] for trial in memory.trials] == [3, 1, 4, 3]
    assert [trial.place for trial in memory.trials] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [len(task.memory) for task in script.tasks] == [0, 2]


def test_a_round_is_scored_together_and_what_was_scored_before_is_not_scored_again() -> None:
    script = Script([widths(3, 3), widths(1, 5), widths(3, 3)], [widths(1, 5), widths(4, 2)])
    scorer, memory = Narrowest(), Memory()
    search_widths(tiny_task(BUDGET), script, scorer, rounds=2, memory=memory)
    assert scorer.asked == [[widths(3, 3), widths(1, 5)], [widths(4, 2)]]
    assert [trial.spent for trial in memory.trials] == [450, 450, 0, 0, 450]
    assert memory.spent == 10 * 3 * BUDGET


def test_the_agent_is_told_score_macs_and_what_the_projection_moved() -> None:
    script = Script([widths(4, 6), widths(2, 4)], [widths(1, 5)])
    search_widths(tiny_task(BUDGET), script, Narrowest(), rounds=2)
    moved, kept = script.tasks[1].memory
    assert moved.macs == kept.macs == BUDGET
    assert moved.proposal == widths(4, 6) and moved.moved and kept.moved == {}
    assert all(moved.moved.get(unit, (width, width)) == (moved.proposal[unit], width) for unit, width in
               moved.widths.items())  # fmt: skip
    assert kept.score == 0.0 and kept.reason == "idea 1"


def test_without_memory_the_agent_sees_nothing_of_what_was_tried() -> None:
    memory = Memory()
    for group in range(2):
        task = dataclasses.replace(tiny_task(BUDGET), group=group)
        script = Script([widths(3, 3)], [widths(1, 5)])
        search_widths(task, script, Narrowest(), rounds=2, memory=memory, use_memory=False)
        assert [(seen.memory, seen.earlier) for seen in script.tasks] == [((), ())] * 2
    assert len(memory.trials) == 4


def test_a_later_group_sees_what_earlier_groups_found() -> None:
    memory = Memory()
    seen: list[list[tuple[int, int, int]]] = []
    for group in range(2):
        script = Script([widths(3, 3)], [widths(1, 5)])
        task = dataclasses.replace(tiny_task(BUDGET), group=group)
        search_widths(task, script, Narrowest(), rounds=2, memory=memory)
        seen += [[trial.place for trial in task.earlier] for task in script.tasks]
    assert seen == [[], [], [(0, 0, 0), (0, 1, 0)], [(0, 0, 0), (0, 1, 0)]]


def test_without_a_scorer_the_first_proposal_is_the_answer() -> None:
    best = search_widths(tiny_task(BUDGET), MostImportant())
    assert best.widths == tiny_task(BUDGET).most_important().widths and best.score is None
    with pytest.raises(ValueError, match="rounds: got 2"):
        search_widths(tiny_task(BUDGET), Script([widths(1, 5)]), rounds=2)


@pytest.mark.parametrize("answer", [[], [widths(1, 5)] * 3])
def test_an_agent_with_no_or_too_many_proposals_is_refused(answer: list[Widths]) -> None:
    with pytest.raises(ValueError, match="proposals of script"):
        search_widths(tiny_task(BUDGET), Script(answer), Narrowest(), candidates=2)


@pytest.mark.parametrize("answer", [None, widths(1, 5), Proposal(widths(1, 5)), [widths(1, 5)]])
def test_an_answer_that_holds_no_proposals_is_refused(answer: object) -> None:
    script = Script()
    script.propose = lambda task, count: answer  # type: ignore[assignment, return-value]
    with pytest.raises(ValueError, match="proposals of script: got .*; expected a list of Proposal"):
        search_widths(tiny_task(BUDGET), script, Narrowest())


def test_a_wrong_proposal_is_not_kept_so_that_its_agent_can_be_mended(tmp_path: Path) -> None:
    for bad in (widths(9, 1), {"layers.0": 1}):
        with Memory(tmp_path / "m.jsonl") as memory, pytest.raises(ValueError, match="proposal"):
            search_widths(tiny_task(BUDGET), Script([bad]), Narrowest(), memory=memory)
    with Memory(tmp_path / "m.jsonl") as memory:
        assert memory.rounds == {}
        assert search_widths(tiny_task(BUDGET), Script([widths(1, 5)]), Narrowest(), memory=memory).score == -1.0


def test_a_score_that_is_no_number_never_wins() -> None:
    class Diverges(Narrowest):
        def score(self, task: Task, candidates: Sequence[Widths], advance: object = None) -> list[float]:
            return [math.nan, *super().score(task, candidates)[1:]]

    memory = Memory()
    script = Script([widths(3, 3), widths(1, 5)], [widths(4, 2), widths(2, 4)])
    best = search_widths(tiny_task(BUDGET), script, Diverges(), rounds=2, memory=memory)
    assert best.widths == widths(1, 5)
    assert [trial.score for trial in memory.trials] == [math.inf, -1.0, math.inf, 0.0]


class Fails:
    name = "oracle"

    def propose(self, task: Task, count: int) -> list[Proposal]:
        raise AgentFailed("no line", notes=("call 1: refused",), calls=2)


def test_another_agent_stands_in_for_one_that_fails_and_the_memory_says_so(capsys: pytest.CaptureFixture) -> None:
    memory = Memory()
    script = Script([widths(3, 3)], [widths(1, 5)])
    best = search_widths(tiny_task(BUDGET), Fails(), Narrowest(), rounds=2, memory=memory, stand_in=script)
    assert best.agent == "script" and memory.calls == 4
    assert memory.rounds[0, 0].notes[0] == "call 1: refused"
    assert "oracle had no proposal (no line); script stands in" in capsys.readouterr().err
    with pytest.raises(AgentFailed, match="no line"):
        search_widths(tiny_task(BUDGET), Fails(), Narrowest(), rounds=2)


@pytest.mark.parametrize("agent", SEARCHING)
def test_every_agent_beats_or_meets_its_own_first_round_within_the_budget(agent: str) -> None:
    memory = Memory()
    task = tiny_task(BUDGET)
    best = search_widths(task, make_agent(agent), Narrowest(), rounds=3, candidates=3, memory=memory)
    firsts = [trial.score for trial in memory.trials if trial.round == 0]
    assert best.score <= min(firsts)
    assert all(trial.macs <= BUDGET and trial.agent == agent and trial.reason for trial in memory.trials)
    assert best.macs == task.costs.total(best.widths)


@pytest.mark.parametrize("agent", SEARCHING)
def test_the_seed_decides_the_search(agent: str) -> None:
    runs = []
    for seed in (0, 0, 1):
        memory = Memory()
        task = dataclasses.replace(tiny_task(BUDGET), seed=seed)
        search_widths(task, make_agent(agent), Narrowest(), rounds=3, candidates=2, memory=memory)
        runs.append([trial.proposal for trial in memory.trials])
    assert runs[0] == runs[1] != runs[2]


def search_in_file(path: Path, agent: object, rounds: int = 3, scorer: object = None) -> None:
    with Memory(path, {"seed": 0}) as memory:
        for group in range(2):
            task = dataclasses.replace(tiny_task(BUDGET), group=group)
            search_widths(task, agent, scorer or Narrowest(), rounds=rounds, candidates=3, memory=memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("agent", SEARCHING)
@pytest.mark.parametrize("kept", [0, 1, 2, 4, 9, 16])
def test_a_search_that_was_cut_off_anywhere_goes_on_to_the_same_memory(agent: str, kept: int, tmp_path: Path) -> None:
    search_in_file(tmp_path / "whole.jsonl", make_agent(agent))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    search_in_file(tmp_path / "cut.jsonl", make_agent(agent))
    assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines)


class Never:
    """An agent or a scorer that must not be asked."""

    name, samples = "never", 10

    def propose(self, task: Task, count: int) -> list[Proposal]:
        raise AssertionError("asked")

    score = propose


def test_a_finished_memory_replays_without_agent_and_scorer(tmp_path: Path) -> None:
    search_in_file(tmp_path / "m.jsonl", make_agent("evolution"))
    before = (tmp_path / "m.jsonl").read_bytes()
    search_in_file(tmp_path / "m.jsonl", Never(), scorer=Never())
    assert (tmp_path / "m.jsonl").read_bytes() == before


def test_proposals_without_scores_are_scored_without_asking_the_agent_again(tmp_path: Path) -> None:
    search_in_file(tmp_path / "m.jsonl", make_agent("evolution"))
    whole = (tmp_path / "m.jsonl").read_bytes()
    scored = [trial.score for trial in read_trials(tmp_path / "m.jsonl")]
    proposals_only = [line for line in whole.splitlines(keepends=True) if b'"scored"' not in line]
    (tmp_path / "m.jsonl").write_bytes(b"".join(proposals_only))
    search_in_file(tmp_path / "m.jsonl", Never())
    assert [trial.score for trial in read_trials(tmp_path / "m.jsonl")] == scored


def test_more_rounds_go_on_from_a_finished_memory(tmp_path: Path) -> None:
    search_in_file(tmp_path / "m.jsonl", make_agent("random"), rounds=2)
    short = (tmp_path / "m.jsonl").read_bytes()
    search_in_file(tmp_path / "m.jsonl", make_agent("random"), rounds=3)
    longer = (tmp_path / "m.jsonl").read_bytes()
    assert longer.startswith(short) and len(longer) > len(short)


def _search_and_die(path: Path, deaths_at: int) -> None:
    """A child that kills itself with SIGKILL in the middle of its n-th line."""
    write, count = os.write, [0]

    def dying_write(file: int, data: bytes) -> int:
        count[0] += 1
        if count[0] == deaths_at:
            write(file, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data)

    os.write = dying_write  # type: ignore[assignment]
    search_in_file(path, make_agent("evolution"))


def test_a_killed_search_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    search_in_file(tmp_path / "whole.jsonl", make_agent("evolution"))
    context = multiprocessing.get_context("fork")
    for deaths_at in (4, 5, 6):  # each child adds some lines and dies in one
        child = context.Process(target=_search_and_die, args=(tmp_path / "killed.jsonl", deaths_at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "killed.jsonl").read_bytes().endswith(b"\n")
    search_in_file(tmp_path / "killed.jsonl", make_agent("evolution"))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "its last line was cut off by a kill" in capsys.readouterr().err


def test_units_are_probed_one_at_a_time_for_an_agent_that_asks_for_it() -> None:
    class Wants(Script):
        measures = True

    class Rises(Narrowest):
        def score(self, task: Task, candidates: Sequence[Widths], advance: object = None) -> list[float]:
            self.asked.append(list(candidates))
            return [5.0 - widths["layers.0"] - 0.5 * widths["layers.1"] for widths in candidates]

    agent, scorer, memory = Wants([widths(3, 3)]), Rises(), Memory()
    search_widths(tiny_task(BUDGET), agent, scorer, memory=memory)
    assert scorer.asked[0] == [widths(4, 6), widths(0, 6), widths(2, 6), widths(4, 0), widths(4, 3)]
    rise = agent.tasks[0].loss_rise()
    assert rise["layers.0"] == {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0}
    assert rise["layers.1"] == {width: 3.0 - 0.5 * width for width in range(7)}
    costs = tiny_task(BUDGET).costs
    assert memory.spent == 10 * (sum(costs.total(probe) for probe in scorer.asked[0]) + BUDGET)
    unmeasured = tiny_task(BUDGET).loss_rise()
    importance = tiny_task(BUDGET).importance["layers.0"]
    assert unmeasured["layers.0"][0] == pytest.approx(importance.sum()) and unmeasured["layers.0"][4] == 0.0
    assert tiny_net().pruning_units()[0].name in unmeasured
