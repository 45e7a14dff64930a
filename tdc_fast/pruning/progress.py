"""What a search prints while it runs: a progress bar per round and a table of the best candidates so far."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tdc_fast.pruning.task import Task, Trial

SHOWN = 5
"""Rows of the table."""


class Progress:
    """Receives the events of a search. It prints only notes, on stderr; `BarAndTable` shows everything."""

    def say(self, text: str) -> None:
        """Print a note about something unusual."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def round(
        self, group: int, number: int, rounds: int, candidates: int, best: Trial | None
    ) -> Iterator[Callable[[int], None]]:
        """Surround the scoring of a round.

        Args:
            group: index of the group.
            number: the round, from 0.
            rounds: rounds in total.
            candidates: candidates of this round.
            best: the best trial of earlier rounds.

        Yields:
            A function to call with the number of candidates scored since its last call.
        """
        yield lambda count: None

    def finished_round(self, task: Task, trials: Sequence[Trial]) -> None:
        """Report a finished round.

        Args:
            task: the group's task.
            trials: all trials of the group.
        """


class BarAndTable(Progress):
    """A progress bar on stderr for each round, and the table on stdout after it.

    Args:
        always: show bars also where stderr is no terminal.
        bars: False shows no bars.
    """

    def __init__(self, always: bool = False, bars: bool = True) -> None:
        from tqdm import tqdm

        self.tqdm = tqdm
        self.disable = (False if always else None) if bars else True  # None: only on a terminal

    def say(self, text: str) -> None:
        """Print a note without tearing the bar."""
        self.tqdm.write(text, file=sys.stderr)

    @contextmanager
    def round(
        self, group: int, number: int, rounds: int, candidates: int, best: Trial | None
    ) -> Iterator[Callable[[int], None]]:
        """Show the bar of a round."""
        about = f"group {group}, round {number + 1}/{rounds}"
        with self.tqdm(total=candidates, desc=about, unit="candidate", disable=self.disable, leave=False) as bar:
            if best is not None:
                bar.set_postfix_str(f"best {best.score:.5g}")
            yield lambda count: bar.update(count) and None

    def finished_round(self, task: Task, trials: Sequence[Trial]) -> None:
        """Print the table."""
        if any(trial.score is not None for trial in trials):
            self.tqdm.write(best_table(task, trials), file=sys.stdout)
            sys.stdout.flush()


def best_table(task: Task, trials: Sequence[Trial]) -> str:
    """The best trials of a group as a table: rank, score, share of the budget, round, agent and reason.

    Args:
        task: the group's task.
        trials: all trials of the group.
    """
    scored = sorted((trial for trial in trials if trial.score is not None), key=lambda trial: trial.score or 0.0)
    distinct = list({tuple(trial.widths.items()): trial for trial in reversed(scored)}.values())[::-1]
    last = max((trial.round for trial in trials), default=0)
    start, stop = task.interval
    head = f"group {task.group} (t {start} to {stop - 1}), after round {last + 1}: {len(distinct)} candidates scored"
    rows = [("", "score", "of budget", "round", "agent", "why")]
    for rank, trial in enumerate(distinct[:SHOWN], start=1):
        share = f"{trial.cost / task.budget:.2%}"
        rows.append((str(rank), f"{trial.score:.6g}", share, str(trial.round + 1), trial.agent, trial.reason[:60]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([head, *("  " + line for line in lines)])
