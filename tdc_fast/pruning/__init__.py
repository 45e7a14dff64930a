"""Pruning a trained base into experts: importance, budgets, and the widths that meet them."""

from __future__ import annotations

from tdc_fast.pruning.agents import DenoisingLoss, MostImportant, Proposer, Scorer, Task, Trial
from tdc_fast.pruning.budget import budget_law, difficulty_order, group_fractions, keep_fractions
from tdc_fast.pruning.importance import magnitude_importance, taylor_importance
from tdc_fast.pruning.macs import UnitCosts, measure_macs, unit_costs
from tdc_fast.pruning.search import Pruning, plan_pruning, project, prune, search_widths
from tdc_fast.pruning.solver import Solution, UnitTable, solve

__all__ = [
    "DenoisingLoss",
    "MostImportant",
    "Proposer",
    "Pruning",
    "Scorer",
    "Solution",
    "Task",
    "Trial",
    "UnitCosts",
    "UnitTable",
    "budget_law",
    "difficulty_order",
    "group_fractions",
    "keep_fractions",
    "magnitude_importance",
    "measure_macs",
    "plan_pruning",
    "project",
    "prune",
    "search_widths",
    "solve",
    "taylor_importance",
    "unit_costs",
]
