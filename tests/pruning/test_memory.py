"""The memory file: what a line holds, what is refused, and what a kill may leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdc_fast.pruning.memory import Memory, OtherSearch, Round, read_trials
from tdc_fast.pruning.task import Proposal, Trial

TRIAL = Trial(
    widths={"a": 8, "b": 0}, macs=100, score=0.1 + 0.2, proposal={"a": 9, "b": 1}, group=1, round=2, candidate=3,
    agent="tpe", seed=7, reason="why not", spent=1000,
)  # fmt: skip
ROUND = Round(1, 2, "llm", 7, (Proposal({"a": 9, "b": 1}, "why not"),), ("slow",), calls=2)


def written(path: Path) -> bytes:
    with Memory(path, {"seed": 7, "budgets": (1, 2)}) as memory:
        memory.add_round(ROUND)
        memory.add_trial(TRIAL)
        memory.add_sensitivity(1, {"a": {0: 0.5, 8: 0.0}, "b": {0: 1e-9, 4: 0.0}}, 33)
    return path.read_bytes()


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    written(tmp_path / "m.jsonl")
    with Memory(tmp_path / "m.jsonl", {"seed": 7, "budgets": [1, 2]}) as memory:
        assert memory.trials == [TRIAL] and memory.rounds == {(1, 2): ROUND}
        assert memory.sensitivity == {1: {"a": {0: 0.5, 8: 0.0}, "b": {0: 1e-9, 4: 0.0}}}
        assert memory.spent == 1033 and memory.calls == 2
    assert read_trials(tmp_path / "m.jsonl") == [TRIAL]


def test_a_trials_line_says_what_was_proposed_what_became_of_it_and_how_it_did(tmp_path: Path) -> None:
    lines = written(tmp_path / "m.jsonl").decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["search", "proposed", "scored", "sensitivity"]
    kept = {"round": 2, "group": 1, "proposal": {"a": 9, "b": 1}, "widths": {"a": 8, "b": 0}, "macs": 100, "seed": 7,
            "score": 0.1 + 0.2, "agent": "tpe", "reason": "why not"}  # fmt: skip
    assert kept.items() <= events[2].items()


def test_half_a_last_line_is_dropped_with_a_note_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    whole = written(path)
    for cut in range(1, len(whole), 17):
        path.write_bytes(whole[:-cut])
        notes: list[str] = []
        with Memory(path, {"seed": 7, "budgets": [1, 2]}, notes.append) as memory:
            known = memory.trials
        lines = whole[:-cut].count(b"\n")
        assert known == ([TRIAL] if lines >= 3 else [])
        assert len(notes) == (0 if whole[:-cut].endswith(b"\n") or cut == len(whole) else 1)
        header = whole[: whole.index(b"\n") + 1]
        assert path.read_bytes() == (whole[: whole[:-cut].rfind(b"\n") + 1] or header)


def test_a_memory_of_another_search_is_refused_by_what_differs(tmp_path: Path) -> None:
    whole = written(tmp_path / "m.jsonl")
    for identity in ({"seed": 8, "budgets": [1, 2]}, {"budgets": [1, 2]}):
        with pytest.raises(OtherSearch, match=r"m\.jsonl: seed: got 7"):
            Memory(tmp_path / "m.jsonl", identity)
    assert (tmp_path / "m.jsonl").read_bytes() == whole


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"event": "dance"}', '{"event": "scored", "group": 1}'])
def test_a_damaged_line_is_refused_by_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line.encode() + b"\n", *lines[1:]]))
    with pytest.raises(ValueError, match="line 2"):
        Memory(path, {"seed": 7, "budgets": [1, 2]})


@pytest.mark.parametrize(("field", "value"), [("score", "low"), ("macs", None), ("round", 0.5), ("widths", [8, 0])])
def test_a_result_of_the_wrong_kind_is_refused_by_its_line(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = written(path).splitlines(keepends=True)
    lines[2] = (json.dumps({**json.loads(lines[2]), field: value}) + "\n").encode()
    path.write_bytes(b"".join(lines))
    for read in (lambda: Memory(path, {"seed": 7, "budgets": [1, 2]}), lambda: read_trials(path)):
        with pytest.raises(ValueError, match="line 3"):
            read()


def test_a_result_that_is_known_is_not_written_twice(tmp_path: Path) -> None:
    whole = written(tmp_path / "m.jsonl")
    with Memory(tmp_path / "m.jsonl", {"seed": 7, "budgets": [1, 2]}) as memory:
        memory.add_trial(TRIAL)
    assert (tmp_path / "m.jsonl").read_bytes() == whole


def test_every_line_is_on_the_disk_before_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    synced: list[int] = []
    path = tmp_path / "m.jsonl"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(path.read_bytes().count(b"\n"))))
    lines = written(path).count(b"\n")
    assert set(synced) == set(range(1, lines + 1))
