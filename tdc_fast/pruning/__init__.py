"""Pruning a trained base into experts: importance, budgets, and the search for widths within them."""

from __future__ import annotations

from tdc_fast.nn.macs import measure_macs
from tdc_fast.pruning.agents import AGENTS, Agent, AgentFailed, MostImportant, make_agent
from tdc_fast.pruning.budget import budget_law, difficulty_order, group_fractions, keep_fractions
from tdc_fast.pruning.costs import UnitCosts, unit_costs
from tdc_fast.pruning.importance import magnitude_importance, taylor_importance
from tdc_fast.pruning.memory import Memory, read_trials
from tdc_fast.pruning.projection import project
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.scoring import DenoisingLoss, Scorer
from tdc_fast.pruning.search import Pruning, plan_pruning, prune
from tdc_fast.pruning.settings import PruningSettings
from tdc_fast.pruning.solver import Solution, UnitTable, solve
from tdc_fast.pruning.task import Answer, Proposal, Task, Trial

__all__ = [
    "AGENTS",
    "Agent",
    "AgentFailed",
    "Answer",
    "DenoisingLoss",
    "Memory",
    "MostImportant",
    "Proposal",
    "Pruning",
    "PruningSettings",
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
    "make_agent",
    "measure_macs",
    "plan_pruning",
    "project",
    "prune",
    "read_trials",
    "search_widths",
    "solve",
    "taylor_importance",
    "unit_costs",
]
