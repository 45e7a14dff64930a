"""A server in a thread of the test, and what a client says to it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tdc_fast.serving import Engine


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class Client:
    """Asks a server at an address."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def draw(self, **fields: Any) -> Answer:
        return self.ask("POST", "/generate", json.dumps(fields).encode())

    def events(self, **fields: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of an answer, as they come."""
        body = json.dumps({"format": "events", **fields}).encode()
        with self.sent(body) as connection:
            file = connection.makefile("rb")
            assert b" 200 " in file.readline()
            name = ""
            for line in file:
                if line.startswith(b"event: "):
                    name = line[len(b"event: ") :].decode().strip()
                elif line.startswith(b"data: "):
                    yield name, json.loads(line[len(b"data: ") :])

    @contextmanager
    def sent(self, body: bytes, length: int | None = None) -> Iterator[socket.socket]:
        """A connection on which a request was sent; leaving the block is a client that leaves."""
        lines = ["POST /generate HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {length or len(body)}"]
        head = "\r\n".join([*lines, "", ""])
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(head.encode() + body)
            yield connection

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by name and labels."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}


@contextmanager
def served(engine: Engine, **limits: Any) -> Iterator[Client]:
    """A server for an engine, on a free port of this machine."""
    from tdc_fast.serving.body import Limits
    from tdc_fast.serving.server import Server, create_app

    listener = socket.create_server(("127.0.0.1", 0))
    engine.start()
    server = Server(create_app(engine, limits=Limits(**limits), name="a test"), engine, grace=5)
    thread = threading.Thread(target=server.serve_on, args=(listener,))
    thread.start()
    try:
        yield Client(listener.getsockname())
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
