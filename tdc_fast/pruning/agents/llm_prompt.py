"""The prompt for the language model, and the format of its answer.

The system message explains the problem once. Each round the user message is one JSON object:

    round, candidates_wanted     which round, and how many candidates the answer may hold
    group                        index, timesteps, budget and the window of cost below it
    base                         cost of the whole network, and of what is never pruned
    units                        for each: kind, channels, step of the allowed widths, cost, and the rise of the loss
                                 when it alone keeps 3/4, 1/2, 1/4 or none of them (first-order estimate)
    history                      the best and the latest trials of this group: widths, cost, score, and what was moved
                                 to meet the budget
    earlier_groups               the best trial of each group searched before

Cost is in MACs, told per channel, or for a budget of time in nanoseconds, told for every width that pays: those that no
wider one costs less than or as much as.

The answer is one JSON object that follows `SCHEMA`. A wrong one is sent back with a sentence that says what is wrong.
"""

from __future__ import annotations

import json
from typing import Any

from tdc_fast.nn.units import PruningUnit
from tdc_fast.pruning.task import Task, Trial, best_of

_PROBLEM = """You choose how to prune a diffusion denoiser into an expert for one interval of timesteps.
The network has pruning units: the inner channels of residual blocks, and the heads of attention layers. You decide \
how many channels each unit keeps; the most important ones are kept first. Width 0 removes a unit and leaves its \
skip path.
A candidate is one width for every unit. %s a candidate outside is moved to the \
nearest widths inside, and the history shows what was moved. Its score is the denoising loss on calibration images \
before fine-tuning: lower is better.
Use the history: find which units the good candidates spare and which they cut, and try something that was not tried. \
Candidates of one round are scored together, so let them differ.
Answer with one JSON object and nothing else: {"candidates": [{"widths": {unit: channels, ...}, "reason": "..."}, ...]}.
Every candidate names every unit with an integer from 0 to its channels. One short sentence is enough as a reason."""
SYSTEM = {
    "MACs": _PROBLEM
    % """Its multiply-accumulates (MACs) are those of everything that is never pruned \
plus, per unit, width times macs_per_channel. They must lie in the given window;""",
    "ns": _PROBLEM
    % """Its time is that of everything that is never pruned plus, per unit, the \
entry of ns_at_width for its width, in nanoseconds; widths that are not listed take as long as the next wider listed \
one, or longer, so do not use them. The time must lie in the given window;""",
}
"""The system message, by what the budget counts."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "candidates": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "widths": {"type": "object", "additionalProperties": {"type": "integer"}},
                    "reason": {"type": "string"},
                },
                "required": ["widths", "reason"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["candidates"],
    "additionalProperties": False,
}

SHOWN = 12
"""Trials of each kind (best, latest) that the model sees, so that the prompt of a long search stays short."""


def user_message(task: Task, count: int) -> str:
    """The round's question as JSON, in the format that this file describes.

    Args:
        task: the group's task.
        count: number of candidates wanted.
    """
    low = int(task.budget * (1 - task.tolerance)) + 1
    rise, word = task.loss_rise(), task.costs.measure.lower()
    units = []
    for unit in task.units:
        keeps = {f"{part}/4": int(unit.channels * part / 4 / unit.step) * unit.step for part in (3, 2, 1, 0)}
        units.append(
            {
                "name": unit.name,
                "kind": unit.kind,
                "channels": unit.channels,
                "step": unit.step,
                **_price(task, unit),
                "loss_rise_keeping": {part: float(f"{rise[unit.name][w]:.3g}") for part, w in keeps.items()},
            }
        )
    scored = sorted((t for t in task.memory if t.score is not None), key=lambda trial: trial.score or 0.0)
    shown = list(dict.fromkeys(map(id, [*scored[:SHOWN], *task.memory[-SHOWN:]])))
    by_id = {id(trial): trial for trial in task.memory}
    bests = (best_of([t for t in task.earlier if t.group == g]) for g in sorted({t.group for t in task.earlier}))
    return json.dumps(
        {
            "round": task.round,
            "candidates_wanted": count,
            "group": {
                "index": task.group,
                "timesteps": list(task.interval),
                f"budget_{word}": task.budget,
                f"window_{word}": [low, task.budget],
            },
            "base": {word: task.costs.full(), f"never_pruned_{word}": task.costs.fixed},
            "units": units,
            "history": [_shown(by_id[key]) for key in shown],
            "earlier_groups": [{"group": best.group, **_shown(best)} for best in bests if best is not None],
        }
    )


def _price(task: Task, unit: PruningUnit) -> dict[str, Any]:
    table = task.costs.tables[unit.name]
    if task.costs.measure == "MACs":
        return {"macs_per_channel": table[unit.channels] / unit.channels}
    return {"ns_at_width": {width: table[width] for width in task.costs.paying(unit)}}


def _shown(trial: Trial) -> dict[str, Any]:
    moved = {unit: {"proposed": before, "tried": after} for unit, (before, after) in trial.moved.items()}
    cost = {"macs": trial.macs} if trial.latency is None else {"ns": trial.latency}
    return {"widths": trial.widths, **cost, "score": trial.score, "moved_to_meet_the_budget": moved}
