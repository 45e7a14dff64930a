"""One question to an OpenAI-compatible chat endpoint, with a deadline, and errors that never show the key."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from tdc_fast.errors import invalid, require

KEY_VARIABLE = "OPENAI_API_KEY"
SECRET_LENGTH = 8
"""A shorter key is a placeholder for a server that needs none, such as "none"; removing it would garble answers."""
_WITHOUT_SCHEMA = (400, 404, 415, 422)  # status of servers that do not support response_format


class EndpointError(Exception):
    """A call without an answer.

    Attributes:
        final: asking again cannot help (a refused key, an unknown model).
    """

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class ChatEndpoint:
    """A chat model behind a URL. The key is read from the environment at each call and never stored.

    Args:
        model: name of the model.
        url: base URL of the service; empty takes OPENAI_BASE_URL, else OpenAI's own.
        timeout: seconds after which a call counts as failed, even while its answer is arriving.

    Raises:
        ValueError: an argument is impossible, or the URL contains a secret.
        ImportError: the client library is not installed; names the extra `llm`.
    """

    def __init__(self, model: str, url: str = "", timeout: float = 60.0) -> None:
        if not model:
            raise invalid("llm_model", model, "the name of a model that the endpoint serves")
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise invalid("llm_url", url, "an http or https URL, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise invalid("llm_url", "(not shown)", f"a URL without a secret; the key belongs in {KEY_VARIABLE}")
        if timeout <= 0:
            raise invalid("llm_timeout", timeout, "seconds above 0")
        self.model, self.url, self.timeout = model, url, timeout
        self._openai: Any = require("openai", extra="llm")
        self._with_schema = True

    def ask(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> str:
        """The text of the answer, with the key removed if it appears there.

        Args:
            messages: the conversation, {"role": ..., "content": ...} each.
            schema: JSON schema of the answer, for services that support one.

        Raises:
            EndpointError: anything outside this process failed.
        """
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise EndpointError(f"no key: set {KEY_VARIABLE} (any text for a server that needs none)", final=True)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client = self._openai.OpenAI(
            api_key=key, base_url=self.url or None, timeout=self.timeout, max_retries=0
        )  # retries are ours, since calls are counted

        def call() -> None:
            try:
                answers.put(self._complete(client, messages, schema))
            except Exception as error:
                answers.put(error)

        # The client's own time-outs count from one received byte to the next; the deadline is for the whole call.
        threading.Thread(target=call, daemon=True).start()
        try:
            answer = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise EndpointError(f"no answer within {self.timeout:g} s") from None
        finally:
            client.close()
        if isinstance(answer, Exception):
            raise self._explained(answer, key) from None  # the cause may hold the request and with it the key
        return _without_key(str(answer), key)

    def _complete(self, client: Any, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> str:
        asked: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        if self._with_schema:
            asked["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "candidates", "schema": dict(schema)},
            }
        try:
            completion = client.chat.completions.create(**asked)
        except self._openai.APIStatusError as error:
            if not self._with_schema or error.status_code not in _WITHOUT_SCHEMA:
                raise
            self._with_schema = False
            asked.pop("response_format")
            completion = client.chat.completions.create(**asked)
        text = completion.choices[0].message.content
        if not isinstance(text, str):
            raise ValueError("the answer holds no text")
        return text

    def _explained(self, error: Exception, key: str) -> EndpointError:
        status = getattr(error, "status_code", None)
        text = printable(_without_key(str(error), key))[:200]
        final = status in (401, 403, 404)
        return EndpointError(f"{type(error).__name__}{f' {status}' if status else ''}: {text}", final=final)


def printable(text: str) -> str:
    """Untrusted text on one line, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _without_key(text: str, key: str) -> str:
    return text.replace(key, "***") if len(key) >= SECRET_LENGTH else text
