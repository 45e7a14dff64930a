"""The width plan of a run, which is committed together with its cost.

A search writes the plan as widths.next.json, then its hash with the cost into macs.json, and then renames the plan to
widths.json. macs.json is the commit point: a plan that it names is the run's plan, whenever the process stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tdc_fast.atomic import sync_directory
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.runs.directory import RunDirectory

PLAN, NEXT_PLAN = "widths.json", "widths.next.json"


def plan_hash(widths: WidthPlan | None) -> str | None:
    """The sha256 of a width plan, by which checkpoints of experts name it; None for whole experts."""
    return hashlib.sha256(json.dumps(widths.to_json(), sort_keys=True).encode()).hexdigest() if widths else None


def find_plan(run: RunDirectory) -> Path | None:
    """The file with the run's width plan; None when there is none.

    Raises:
        ValueError: the file of a search that was interrupted as it was committed is damaged.
    """
    following = run.path / NEXT_PLAN
    if following.is_file():
        pruning = (run.read("macs.json") or {}).get("phases", {}).get("pruning", {})
        if pruning.get("widths_hash") == plan_hash(WidthPlan.load(following)):
            return following
    plan = run.path / PLAN
    return plan if plan.is_file() else None


def finish_commit(run: RunDirectory) -> None:
    """Complete what a process that was killed began: give the committed plan its name, delete one that is not."""
    plan, following = find_plan(run), run.path / NEXT_PLAN
    if plan == following:
        os.replace(following, run.path / PLAN)
        sync_directory(run.path)
    else:
        following.unlink(missing_ok=True)
