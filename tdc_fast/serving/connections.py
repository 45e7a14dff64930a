"""Connections of uvicorn that wait for headers for a limited time, and note what they refuse themselves."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol

REFUSED = "tdc_fast.refused"
"""Key of a request's scope: the status with which the connection itself has answered it."""


class PromptConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection with a limit on the time from its first byte, or its opening, to the end of the headers.

    uvicorn would wait for ever.

    Attributes:
        header_seconds: the limit.
    """

    header_seconds = 10.0
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The time begins."""
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        """The time ends with the headers, and begins again with the first byte after an answer."""
        if self._is_idle() and self._limit is None:
            self._start()
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # uvicorn refuses what cannot be read also where the answer was given already
            self.transport.abort()
        if not self._is_idle():
            self._stop()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and note it: of a request whose body it was, the application sees only the end."""
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.scope[REFUSED] = 400

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._stop()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _start(self) -> None:
        self._limit = self.loop.call_later(self.header_seconds, self._close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _close(self) -> None:
        self._limit = None
        if self._is_idle():
            self.transport.close()
