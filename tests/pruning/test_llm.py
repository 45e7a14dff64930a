"""The language model as an agent, against a real server on this machine that misbehaves in every way it can."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tdc_fast.pruning.agents import AgentFailed, ChatEndpoint, Llm, RandomWidths
from tdc_fast.pruning.agents.llm import read_answer
from tdc_fast.pruning.agents.llm_prompt import SCHEMA, user_message
from tdc_fast.pruning.memory import Memory
from tdc_fast.pruning.rounds import search_widths
from tdc_fast.pruning.task import Task
from tests.pruning.test_rounds import BUDGET, Narrowest, widths
from tests.pruning.tiny import tiny_task

KEY = "sk-very-secret-0123456789"
Reply = Callable[["Handler", dict[str, Any]], None]


def good(first: int = 3, second: int = 3, reason: str = "a try") -> str:
    return json.dumps({"candidates": [{"widths": widths(first, second), "reason": reason}]})


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request as the server's list of replies says, the last one for ever."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
        reply = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            reply(self, body)

    def log_message(self, *arguments: object) -> None:
        pass

    def send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    replies: list[Reply]
    requests: list[dict[str, Any]]


def says(text: object, status: int = 200) -> Reply:
    """A well-formed completion with this text in it."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        handler.send(json.dumps(completion).encode(), status)

    return reply


def raw(content: bytes, status: int = 200) -> Reply:
    return lambda handler, body: handler.send(content, status)


def error(status: int) -> Reply:
    return raw(json.dumps({"error": {"message": f"wrong: {KEY}"}}).encode(), status)


def hangs_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.close()


def hangs_up_halfway(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id"')
    handler.wfile.flush()
    hangs_up(handler, body)


def is_slow(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(1.5)
    says(good())(handler, body)


def trickles(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then, so that no single wait is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def without_schemas(handler: Handler, body: dict[str, Any]) -> None:
    """An older server, that does not know response_format."""
    reply = error(400) if "response_format" in body else says(good())
    reply(handler, body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    instance = Server(("127.0.0.1", 0), Handler)
    instance.replies, instance.requests = [], []
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()
    thread.join()


def agent_of(server: Server, waits: list[float] | None = None, timeout: float = 0.5, **settings: Any) -> Llm:
    endpoint = ChatEndpoint("some-model", f"http://127.0.0.1:{server.server_port}/v1", timeout)
    return Llm(endpoint, wait=(waits if waits is not None else []).append, **settings)


def the_task(**changes: Any) -> Task:
    import dataclasses

    return dataclasses.replace(tiny_task(BUDGET), **changes)


def test_a_good_answer_is_taken_and_the_request_is_what_it_should_be(server: Server) -> None:
    server.replies = [says(good(2, 4, "thin first"))]
    answer = agent_of(server, timeout=10).propose(the_task(), 3)
    assert answer.calls == 1 and answer.notes == ()
    assert [(p.widths, p.reason) for p in answer.proposals] == [(widths(2, 4), "thin first")]
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions" and request["model"] == "some-model"
    assert request["key"] == f"Bearer {KEY}"
    assert request["response_format"]["json_schema"]["schema"] == SCHEMA
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert json.loads(request["messages"][1]["content"])["candidates_wanted"] == 3


MISBEHAVIOUR: dict[str, tuple[Reply, str]] = {
    "500": (error(500), "InternalServerError 500"),
    "503": (error(503), "503"),
    "429": (error(429), "RateLimitError 429"),
    "slow": (is_slow, "no answer within 0.5 s|APITimeoutError"),
    "trickling": (trickles, "no answer within 0.5 s"),
    "hangs up": (hangs_up, "APIConnectionError"),
    "hangs up halfway": (hangs_up_halfway, "Error"),
    "no JSON": (raw(b"<html>busy</html>"), "Error"),
    "no choices": (raw(b'{"choices": []}'), "IndexError"),
    "no text": (says(None), "holds no text"),
    "text that is no JSON": (says("Sure! Here are some widths."), "not JSON"),
    "lists without end": (says("[" * 100_000), "not JSON"),
    "wrong schema": (says('{"answers": []}'), "one key"),
    "no candidates": (says('{"candidates": []}'), "empty"),
    "a candidate too few keys": (says('{"candidates": [{"widths": {}}]}'), "keys"),
    "impossible widths": (says(good(99, 1)), "an integer from 0 to 4"),
    "negative widths": (says(good(1, -1)), "an integer from 0 to 6"),
    "fractions": (says(json.dumps({"candidates": [{"widths": widths(1.5, 1), "reason": ""}]})), "integer"),
    "unknown units": (says('{"candidates": [{"widths": {"conv": 1}, "reason": ""}]}'), "one width for each unit"),
}


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_whatever_goes_wrong_once_is_asked_again(kind: str, server: Server) -> None:
    reply, words = MISBEHAVIOUR[kind]
    server.replies = [reply, says(good())]
    agent = agent_of(server, timeout=0.5 if kind in ("slow", "trickling") else 10)
    answer = agent.propose(the_task(), 2)
    assert answer.proposals[0].widths == widths(3, 3) and answer.calls == 2
    (note,) = answer.notes
    assert any(word in note for word in words.split("|")), note
    assert KEY not in note


@pytest.mark.parametrize("kind", ["500", "hangs up", "text that is no JSON", "impossible widths"])
def test_what_goes_wrong_for_ever_ends_with_another_agent_and_the_search_goes_on(
    kind: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    server.replies = [MISBEHAVIOUR[kind][0]]
    waits: list[float] = []
    with Memory(tmp_path / "m.jsonl") as memory:
        best = search_widths(
            the_task(), agent_of(server, waits, timeout=10, retries=2), Narrowest(), rounds=2, candidates=3,
            memory=memory, stand_in=RandomWidths(),
        )  # fmt: skip
    assert best.agent == "random" and best.score is not None
    assert len(server.requests) == 6 == memory.calls
    assert waits == ([1.0, 2.0] * 2 if kind in ("500", "hangs up") else [])
    said = capsys.readouterr().err
    assert said.count("llm had no proposal") == 2 and "random stands in" in said
    assert "stands in" in (tmp_path / "m.jsonl").read_text()
    assert KEY not in said + (tmp_path / "m.jsonl").read_text()


def test_a_wrong_answer_is_sent_back_with_what_is_wrong(server: Server) -> None:
    server.replies = [says(good(99, 1)), says(good())]
    agent_of(server, timeout=10).propose(the_task(), 2)
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert "from 0 to 4" in server.requests[1]["messages"][3]["content"]


def test_a_refused_key_is_not_tried_again(server: Server) -> None:
    server.replies = [error(401)]
    with pytest.raises(AgentFailed, match="AuthenticationError 401") as failed:
        agent_of(server, timeout=10).propose(the_task(), 2)
    assert len(server.requests) == 1 and KEY not in str(failed.value)


def test_a_key_that_an_answer_repeats_is_kept_nowhere(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    unknown = {"widths": {**widths(1, 5), KEY: 1}, "reason": "odd"}
    told = {"widths": widths(1, 5), "reason": f"your key is {KEY}"}
    server.replies = [says(json.dumps({"candidates": [unknown]})), says(json.dumps({"candidates": [unknown, told]}))]
    with Memory(tmp_path / "m.jsonl") as memory:
        search_widths(the_task(), agent_of(server, timeout=10), Narrowest(), memory=memory)
    kept = (tmp_path / "m.jsonl").read_text()
    assert "your key is ***" in kept and KEY not in kept + capsys.readouterr().err
    assert KEY not in json.dumps([request["messages"] for request in server.requests])


def test_a_word_in_place_of_a_key_leaves_answers_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "layers")
    server.replies = [says(good(1, 5))]
    assert agent_of(server, timeout=10).propose(the_task(), 2).proposals[0].widths == widths(1, 5)


def test_a_reason_is_one_line_that_any_terminal_and_file_can_show(server: Server) -> None:
    server.replies = [says(good(reason="\x1b[2Jthin\r\nfirst \ud800 für t"))]
    (proposal,) = agent_of(server, timeout=10).propose(the_task(), 2).proposals
    assert proposal.reason == "[2Jthin first für t"


def test_without_a_key_nothing_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(AgentFailed, match="set OPENAI_API_KEY"):
        agent_of(server).propose(the_task(), 2)
    assert server.requests == []


def test_a_server_without_schemas_is_asked_in_plain_words(server: Server) -> None:
    server.replies = [without_schemas]
    agent = agent_of(server, timeout=10)
    assert agent.propose(the_task(), 2).proposals
    agent.propose(the_task(), 2)
    assert ["response_format" in request for request in server.requests] == [True, False, False]


def test_calls_are_limited_over_the_whole_search_also_after_it_was_cut_off(server: Server, tmp_path: Path) -> None:
    server.replies = [says(good(1, 5)), says(good(2, 4)), says(good(3, 3))]
    for rounds in (1, 2, 4):
        with Memory(tmp_path / "m.jsonl") as memory:
            agent = agent_of(server, timeout=10, max_calls=2)
            search_widths(the_task(), agent, Narrowest(), rounds=rounds, memory=memory, stand_in=RandomWidths())
    assert len(server.requests) == 2 == memory.calls
    assert [memory.rounds[0, r].agent for r in range(4)] == ["llm", "llm", "random", "random"]
    assert "all 2 calls allowed are used" in memory.rounds[0, 2].notes[0]


def test_a_memory_replays_with_the_server_gone(server: Server, tmp_path: Path) -> None:
    server.replies = [says(good(1, 5)), says(good(2, 4))]
    for _ in range(2):
        with Memory(tmp_path / "m.jsonl") as memory:
            best = search_widths(the_task(), agent_of(server, timeout=10), Narrowest(), rounds=2, memory=memory)
        assert best.widths == widths(1, 5)
    assert len(server.requests) == 2


def test_usable_candidates_are_kept_and_the_others_named() -> None:
    three = [{"widths": w, "reason": "r"} for w in (widths(9, 1), widths(1, 5), widths(2, 4))]
    proposals, notes = read_answer(the_task(), "```json\n" + json.dumps({"candidates": three}) + "\n```", 3)
    assert [proposal.widths for proposal in proposals] == [widths(1, 5), widths(2, 4)]
    assert len(notes) == 1 and notes[0].startswith("candidate 0 left out")
    assert len(read_answer(the_task(), json.dumps({"candidates": three[1:] * 9}), 3)[0]) == 3


def test_the_question_shows_architecture_budget_memory_and_earlier_groups() -> None:
    memory = Memory()
    for group in range(2):
        search_widths(the_task(group=group), RandomWidths(), Narrowest(), rounds=2, candidates=2, memory=memory)
    task = the_task(group=1, round=2, memory=memory.of_group(1), earlier=memory.of_group(0))
    asked = json.loads(user_message(task, 4))
    assert asked["group"]["budget_macs"] == BUDGET and asked["group"]["timesteps"] == [0, 10]
    assert [(unit["name"], unit["channels"], unit["macs_per_channel"]) for unit in asked["units"]] == [
        ("layers.0", 4, 6.0),
        ("layers.1", 6, 6.0),
    ]
    rise = asked["units"][0]["loss_rise_keeping"]
    assert rise["0/4"] >= rise["1/4"] >= rise["2/4"] >= rise["3/4"] >= 0
    best = min(trial.score for trial in memory.of_group(1))
    assert asked["history"][0]["score"] == best and len(asked["history"]) == len({t.place for t in task.memory})
    assert [entry["group"] for entry in asked["earlier_groups"]] == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "llm_model"),
        ({"model": "m", "url": "ftp://x"}, "llm_url"),
        ({"model": "m", "url": "https://me:secret@x/v1"}, "llm_url"),
        ({"model": "m", "timeout": 0}, "llm_timeout"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_without_showing_a_secret(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        ChatEndpoint(**settings)
    assert "secret@" not in str(refused.value)
