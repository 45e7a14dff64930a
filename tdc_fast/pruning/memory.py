"""The memory of a search: append-only JSON lines that survive a kill and can be replayed.

The first line says which search it is of. After it every line is one event:

    proposed     a round's proposals, written before anything is scored: round, group, agent, seed, the proposed widths
                 with their reasons, and notes (failures of the agent, and who stood in for it)
    scored       one candidate: round, group, candidate, agent, seed, proposal, projected widths, MACs, score, reason
    sensitivity  the measured loss rise of a group's units

Every line is on the disk before the search continues. A killed process can leave an incomplete last line: it is
dropped, with a note, and the search writes it again. A resumed search uses what the memory holds instead of asking the
agent again, so it replays without the agent, even if that was a language model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tdc_fast.atomic import sync_directory, writing_to
from tdc_fast.errors import brief, invalid
from tdc_fast.pruning.task import LossRise, Proposal, Trial
from tdc_fast.text_files import parse_json

VERSION = 1
MEMORY_FILE = "memory.jsonl"
"""The memory of a run's latest search, in its directory; those of earlier ones are memory.N.jsonl."""
_TRIAL = tuple(entry.name for entry in fields(Trial) if entry.name != "latency")
"""What every trial has. The estimated time is there where the budget is one."""


class OtherSearch(ValueError):
    """A memory file holds another search than the one to resume."""


@dataclass(frozen=True)
class Round:
    """The agent's answer in one round of one group.

    Attributes:
        group: index of the group.
        round: the round, from 0.
        agent: name of the agent that answered.
        seed: seed of the round's draws.
        proposals: the proposed widths.
        notes: failures of the agent, and who stood in for it.
        calls: calls to a service that the answer took.
    """

    group: int
    round: int
    agent: str
    seed: int
    proposals: tuple[Proposal, ...]
    notes: tuple[str, ...] = ()
    calls: int = 0


@dataclass
class Memory:
    """Rounds and trials of one search in the order they happened, also written to a file if there is a path.

    Attributes:
        path: the file, or None.
        identity: JSON values that identify the search (base, groups, budgets, seed, ...).
        say: receives notes for the user.
        rounds: the agent's answers, by (group, round).
        trials: all trials.
        sensitivity: the measured loss rises, by group.
        probing: MACs that measuring them took, by group.

    Raises:
        OtherSearch: a ValueError; the file holds another search. Names what differs.
        ValueError: the file is no memory, or is damaged other than by an incomplete last line.
    """

    path: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    rounds: dict[tuple[int, int], Round] = field(default_factory=dict, init=False)
    trials: list[Trial] = field(default_factory=list, init=False)
    sensitivity: dict[int, LossRise] = field(default_factory=dict, init=False)
    probing: dict[int, int] = field(default_factory=dict, init=False)
    _file: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        self.path = Path(self.path)
        header = {"event": "search", "version": VERSION, **json.loads(json.dumps(dict(self.identity)))}
        whole = self._read_whole_lines() if self.path.is_file() else []
        if whole:
            _refuse_other_search(self.path, whole[0], header)
        for number, event in enumerate(whole[1:], start=2):
            self._take(event, number)
        with writing_to(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not whole:
            self._write(header)
            sync_directory(self.path.parent)

    @property
    def spent(self) -> int:
        """MACs that all scoring and measuring took."""
        return sum(trial.spent for trial in self.trials) + sum(self.probing.values())

    @property
    def calls(self) -> int:
        """Calls to services so far, over the whole search."""
        return sum(answer.calls for answer in self.rounds.values())

    def of_group(self, group: int) -> tuple[Trial, ...]:
        """The group's trials."""
        return tuple(trial for trial in self.trials if trial.group == group)

    def of_round(self, group: int, number: int) -> tuple[Trial, ...]:
        """The group's trials of one round."""
        return tuple(trial for trial in self.trials if (trial.group, trial.round) == (group, number))

    def before_round(self, group: int, number: int) -> tuple[Trial, ...]:
        """The group's trials of earlier rounds."""
        return tuple(trial for trial in self.trials if trial.group == group and trial.round < number)

    def add_round(self, answer: Round) -> None:
        """Store an agent's answer, before its candidates are scored."""
        self.rounds[answer.group, answer.round] = answer
        proposals = [{"widths": p.widths, "reason": p.reason} for p in answer.proposals]
        facts = {name: getattr(answer, name) for name in ("round", "group", "agent", "seed", "calls")}
        self._write({"event": "proposed", **facts, "proposals": proposals, "notes": list(answer.notes)})

    def add_trial(self, trial: Trial) -> None:
        """Store a candidate's result, unless it is stored already."""
        if any(known.place == trial.place for known in self.trials):
            return
        self.trials.append(trial)
        self._write({"event": "scored", **_in_order(trial)})

    def add_sensitivity(self, group: int, rise: LossRise, spent: int) -> None:
        """Store a group's measured loss rises, and the MACs that measuring them took."""
        self.sensitivity[group] = rise
        self.probing[group] = spent
        entries = {unit: [[width, value] for width, value in table.items()] for unit, table in rise.items()}
        self._write({"event": "sensitivity", "group": group, "spent": spent, "loss_rise": entries})

    def close(self) -> None:
        """Close the file; nothing is written afterwards."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def _write(self, event: Mapping[str, Any]) -> None:
        """Append one line and wait until it is on the disk."""
        if self._file is None or self.path is None:
            return
        line = (json.dumps(event) + "\n").encode()
        with writing_to(self.path):
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)

    def _read_whole_lines(self) -> list[dict[str, Any]]:
        """The events of the file; an incomplete last line is removed from it."""
        assert self.path is not None
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        events = []
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                events.append(parse_json(line.decode("utf-8")))
                if not isinstance(events[-1], dict):
                    raise ValueError("not an object")
            except ValueError as error:
                where = f"{self.path}, line {number}"
                raise invalid(where, line[:80], "one JSON object; the file is damaged") from error
        if end < len(content):
            self.say(f"note: {self.path}: its last line was cut off by a kill and will be written again")
            with open(self.path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        return events

    def _take(self, event: Mapping[str, Any], number: int) -> None:
        try:
            if event["event"] == "proposed":
                proposals = tuple(Proposal(entry["widths"], entry["reason"]) for entry in event["proposals"])
                facts = {name: event[name] for name in ("group", "round", "agent", "seed", "calls")}
                answer = Round(**facts, proposals=proposals, notes=tuple(event["notes"]))
                self.rounds[answer.group, answer.round] = answer
            elif event["event"] == "scored":
                self.trials.append(_trial(event))
            elif event["event"] == "sensitivity":
                rise = event["loss_rise"]
                self.sensitivity[event["group"]] = {unit: dict(rise[unit]) for unit in rise}
                self.probing[event["group"]] = event["spent"]
            else:
                raise KeyError(event["event"])
        except (KeyError, TypeError, ValueError) as error:
            raise invalid(f"{self.path}, line {number}", dict(event), "an event of a search's memory") from error


def read_trials(path: str | Path) -> list[Trial]:
    """The trials in a memory file of any search. The file is not changed.

    Raises:
        ValueError: naming the line that is no event.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[1:-1]  # whole lines but the first
    trials = []
    for number, line in enumerate(lines, start=2):
        try:
            event = parse_json(line.decode("utf-8"))
            if event["event"] == "scored":
                trials.append(_trial(event))
        except (ValueError, KeyError, TypeError) as error:
            raise invalid(f"{path}, line {number}", line[:80], "an event of a search's memory") from error
    return trials


def set_aside(directory: Path) -> Path:
    """Rename the memory in a run directory to the first free memory.N.jsonl, so that another search can begin."""
    number = 1
    while (kept := directory / f"memory.{number}.jsonl").exists():
        number += 1
    (directory / MEMORY_FILE).rename(kept)
    return kept


def searches_of(directory: Path) -> dict[str, list[Trial]]:
    """The trials of every search that a run directory holds and that scored anything, oldest first: {label: trials}.

    The label is the agent's name, with ", in time" where budgets were, and a number where several had the same.
    """
    files = sorted(directory.glob("memory.*.jsonl"), key=lambda path: int(path.suffixes[0][1:]))
    found: dict[str, list[Trial]] = {}
    for path in [*files, directory / MEMORY_FILE]:
        trials = read_trials(path) if path.is_file() else []
        if not any(trial.score is not None for trial in trials):
            continue
        name = trials[0].agent if trials[0].latency is None else f"{trials[0].agent}, in time"
        repeated = sum(label == name or label.startswith(name + " ") for label in found)
        found[name if not repeated else f"{name} {repeated + 1}"] = trials
    return found


def _trial(event: Mapping[str, Any]) -> Trial:
    """The trial of an event; raises KeyError or TypeError where it is none."""
    trial = Trial(**{name: event[name] for name in _TRIAL}, latency=event.get("latency"))
    if not all(isinstance(number, int) for number in (*trial.place, trial.macs, trial.spent, trial.cost)):
        raise TypeError("group, round, candidate, macs, spent and latency are integers")
    if trial.score is not None and not isinstance(trial.score, (int, float)):
        raise TypeError("a score is a number or null")
    if not all(isinstance(widths, dict) for widths in (trial.widths, trial.proposal)):
        raise TypeError("widths are an object")
    return trial


def _in_order(trial: Trial) -> dict[str, Any]:
    first = ("round", "group", "candidate", "agent", "seed", "proposal", "widths", "macs", "score", "reason")
    time = {} if trial.latency is None else {"latency": trial.latency}
    rest = (name for name in _TRIAL if name not in first)
    return {name: getattr(trial, name) for name in (*first, *rest)} | time


def _refuse_other_search(path: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    for name in [*header, *found]:
        if found.get(name) != header.get(name):
            mine = brief(header.get(name))
            remedy = f"{mine} as in this search; the file is of another one: move it away to search again"
            raise OtherSearch(str(invalid(f"{path}: {name}", found.get(name), remedy)))
