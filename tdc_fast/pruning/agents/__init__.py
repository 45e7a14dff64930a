"""Agents of the pruning search, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdc_fast.errors import invalid
from tdc_fast.pruning.agents.chance import Chance
from tdc_fast.pruning.agents.evolution import Evolution
from tdc_fast.pruning.agents.greedy import Greedy
from tdc_fast.pruning.agents.llm import Llm
from tdc_fast.pruning.agents.llm_client import ChatEndpoint
from tdc_fast.pruning.agents.one_shot import MostImportant
from tdc_fast.pruning.agents.protocol import Agent, AgentFailed
from tdc_fast.pruning.agents.tpe import Tpe

__all__ = [
    "AGENTS",
    "Agent",
    "AgentFailed",
    "Chance",
    "ChatEndpoint",
    "Evolution",
    "Greedy",
    "Llm",
    "MostImportant",
    "Tpe",
    "make_agent",
]


def _llm(model: str = "", url: str = "", timeout: float = 60.0, retries: int = 3, max_calls: int = 100) -> Llm:
    return Llm(ChatEndpoint(model, url, timeout), retries=retries, max_calls=max_calls)


AGENTS: dict[str, Callable[..., Agent]] = {
    "taylor": lambda: MostImportant("taylor"),
    "magnitude": lambda: MostImportant("magnitude"),
    "random": Chance,
    "greedy": Greedy,
    "evolution": Evolution,
    "tpe": Tpe,
    "llm": _llm,
}


def make_agent(name: str, **settings: Any) -> Agent:
    """The agent of that name; "llm" takes settings (model, url, timeout, retries, max_calls), the others none.

    Raises ValueError for an unknown name, ImportError naming the extra where the agent's library is not installed.
    """
    if name not in AGENTS:
        raise invalid("agent", name, f"one of {', '.join(AGENTS)}")
    return AGENTS[name](**settings)
