"""Agents of the pruning search, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdc_fast.errors import invalid
from tdc_fast.pruning.agents.evolution import Evolution
from tdc_fast.pruning.agents.greedy import Greedy
from tdc_fast.pruning.agents.llm import Llm
from tdc_fast.pruning.agents.llm_client import ChatEndpoint
from tdc_fast.pruning.agents.one_shot import MostImportant
from tdc_fast.pruning.agents.protocol import Agent, AgentFailed
from tdc_fast.pruning.agents.random_widths import RandomWidths
from tdc_fast.pruning.agents.tpe import Tpe

__all__ = [
    "AGENTS",
    "Agent",
    "AgentFailed",
    "RandomWidths",
    "ChatEndpoint",
    "Evolution",
    "Greedy",
    "Llm",
    "MostImportant",
    "Tpe",
    "make_agent",
    "resolved_agent",
]


def _llm(model: str = "", url: str = "", timeout: float = 60.0, retries: int = 3, max_calls: int = 100) -> Llm:
    return Llm(ChatEndpoint(model, url, timeout), retries=retries, max_calls=max_calls)


AGENTS: dict[str, Callable[..., Agent]] = {
    "taylor": lambda: MostImportant("taylor"),
    "magnitude": lambda: MostImportant("magnitude"),
    "random": RandomWidths,
    "greedy": Greedy,
    "evolution": Evolution,
    "tpe": Tpe,
    "llm": _llm,
}


def make_agent(name: str, **settings: Any) -> Agent:
    """The agent of that name.

    Args:
        name: a key of `AGENTS`.
        **settings: for "llm" model, url, timeout, retries and max_calls; none for the others.

    Raises:
        ValueError: the name is unknown.
        ImportError: the agent's library is not installed; names the extra.
    """
    if name not in AGENTS:
        raise invalid("agent", name, f"one of {', '.join(AGENTS)}")
    return AGENTS[name](**settings)


def resolved_agent(agent: str | Agent, rounds: int, importance: object = "taylor") -> Agent:
    """The agent of a name, or the agent that is given.

    "auto" is the one-shot answer by the importance for one round, and "tpe" for more.

    Args:
        agent: a name of `AGENTS`, "auto", or an agent.
        rounds: rounds of the search.
        importance: the search's importance.

    Raises:
        ValueError: it is neither a known name nor an agent.
    """
    if not isinstance(agent, str):
        if isinstance(agent, type) or not (hasattr(agent, "name") and callable(getattr(agent, "propose", None))):
            raise invalid("agent", agent, f"one of {', '.join(AGENTS)}, or an object with a name and a method propose")
        return agent
    if agent == "auto":
        agent = "tpe" if rounds > 1 else "magnitude" if importance == "magnitude" else "taylor"
    return make_agent(agent)
