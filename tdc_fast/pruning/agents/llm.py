"""A language model as the agent, as in the paper: any chat endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tdc_fast.errors import invalid
from tdc_fast.pruning.agents.llm_client import ChatEndpoint, EndpointError, printable
from tdc_fast.pruning.agents.llm_prompt import SCHEMA, SYSTEM, user_message
from tdc_fast.pruning.agents.protocol import AgentFailed
from tdc_fast.pruning.projection import check_proposal
from tdc_fast.pruning.task import Answer, Proposal, Task
from tdc_fast.text_files import parse_json

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0


class Llm:
    """Asks a language model for widths; `llm_prompt` defines the question and the format of the answer.

    A round without a usable answer raises AgentFailed, so that another agent can stand in. Impossible candidates are
    left out with a note; if none is left, the model is told why and asked again.

    Args:
        endpoint: the model.
        retries: how often a failed call or a wrong answer is repeated in one round. Waits double, from one second.
        max_calls: calls allowed in the whole search, those before a kill included.
        wait: sleeps for a number of seconds.

    Raises:
        ValueError: a number is out of range.
    """

    name = "llm"

    def __init__(
        self,
        endpoint: ChatEndpoint,
        *,
        retries: int = 3,
        max_calls: int = 100,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        if retries < 0:
            raise invalid("llm_retries", retries, "0 or a number above it")
        if max_calls < 1:
            raise invalid("llm_calls", max_calls, "at least 1")
        self.endpoint, self.retries, self.max_calls, self._wait = endpoint, retries, max_calls, wait

    def propose(self, task: Task, count: int) -> Answer:
        """Ask until there is a usable answer.

        Args:
            task: the group's task.
            count: number of candidates wanted.

        Raises:
            AgentFailed: retries or calls are used up, or the endpoint refuses for good.
        """
        messages = [
            {"role": "system", "content": SYSTEM[task.costs.measure]},
            {"role": "user", "content": user_message(task, count)},
        ]
        notes: list[str] = []
        calls = 0
        for attempt in range(self.retries + 1):
            if task.calls + calls >= self.max_calls:
                notes.append(f"all {self.max_calls} calls allowed are used")
                break
            calls += 1
            try:
                text = self.endpoint.ask(messages, SCHEMA)
            except EndpointError as error:
                notes.append(f"call {attempt + 1}: {error}")
                if error.final:
                    break
                if attempt < self.retries:
                    self._wait(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
                continue
            try:
                proposals, refused = read_answer(task, text, count)
            except ValueError as error:
                notes.append(f"call {attempt + 1}: {error}")
                complaint = f"That answer cannot be used: {error}. Answer with the JSON object alone."
                answered = [{"role": "assistant", "content": text}, {"role": "user", "content": complaint}]
                messages = [*messages[:2], *answered]
                continue
            return Answer(tuple(proposals), (*notes, *refused), calls)
        raise AgentFailed(notes[-1], notes, calls)


def read_answer(task: Task, text: str, count: int) -> tuple[list[Proposal], list[str]]:
    """The usable candidates of an answer, and notes about the others.

    Args:
        task: the group's task.
        text: the answer.
        count: candidates at most; further ones are ignored.

    Raises:
        ValueError: the answer does not follow `SCHEMA` or has no usable candidate; worded for the model to read.
    """
    try:
        answer = parse_json(_without_fence(text))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(answer, dict) or set(answer) != {"candidates"} or not isinstance(answer["candidates"], list):
        raise ValueError('it is not an object with the one key "candidates" and a list under it')
    proposals, notes = [], []
    for number, candidate in enumerate(answer["candidates"][:count]):
        try:
            proposals.append(_candidate(task, candidate))
        except ValueError as error:
            notes.append(f"candidate {number} left out: {error}")
    if not proposals:
        raise ValueError(notes[0] if notes else "its list of candidates is empty")
    return proposals, notes


def _candidate(task: Task, candidate: Any) -> Proposal:
    if not isinstance(candidate, dict) or set(candidate) != {"widths", "reason"}:
        raise ValueError('a candidate is not an object with the keys "widths" and "reason"')
    widths, reason = candidate["widths"], candidate["reason"]
    if not isinstance(widths, dict) or not isinstance(reason, str):
        raise ValueError('"widths" is not an object, or "reason" is not text')
    check_proposal(task.units, widths)
    return Proposal(widths, printable(reason)[:500])


def _without_fence(text: str) -> str:
    """The text inside a Markdown code fence, which models like to add."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") + 1 : -3]
    return text
