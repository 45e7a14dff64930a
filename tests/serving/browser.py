"""A headless Chromium, driven through the pipe of its own debugging protocol: no driver, no further package."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), "")
PATIENCE = 60.0


class Page:
    """A page in the browser.

    Attributes:
        errors: exceptions that the page's scripts raised, and failed loads.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._held = write, read, b""
        self._numbers, self._session = itertools.count(1), ""
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Wait until an expression in the page is truthy, and return it."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.evaluate(condition)):
            assert time.monotonic() < deadline, f"{condition} did not come: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        box = self.evaluate(f"JSON.stringify(document.querySelector({selector!r}).getBoundingClientRect())")
        x, y, width, height = (json.loads(box)[key] for key in ("x", "y", "width", "height"))
        assert width and height, f"{selector} is not visible"
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": x + width / 2, "y": y + height / 2, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def _next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._held:
            assert select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0], "no answer"
            chunk = os.read(self._read, 2**16)
            assert chunk, "the browser ended"
            self._held += chunk
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a new browser; `profile` is an empty folder for its files."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()

    def as_three_and_four() -> None:
        os.dup2(to_browser, 13)  # neither may be overwritten by the other
        os.dup2(from_browser, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [BROWSER, *flags], close_fds=False, preexec_fn=as_three_and_four,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(write, read)
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)
