"""A request that an engine has taken: waiting for it, from threads and from asyncio, its previews, giving it up."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress

from tdc_fast.serving.failures import RequestFailed
from tdc_fast.serving.request import Preview, Request, Result

_MAX_KEPT = 16
Listener = Callable[[Preview | None], object]


def _nothing() -> None:
    """Cancels what has ended."""


class Generation:
    """The images of one request while they are computed. Every method may be called from any thread.

    Args:
        request: what was asked for.
        cancel: tells the engine to give it up.

    Attributes:
        request: what was asked for.
    """

    def __init__(self, request: Request, cancel: Callable[[], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._future: Future[Result] = Future()
        self._future.set_running_or_notify_cancel()  # only the engine decides how it ends
        self._lock = threading.Lock()
        self._last: Preview | None = None
        self._listeners: list[Listener] = []

    def done(self) -> bool:
        """Whether the images are there, or will never be."""
        return self._future.done()

    def cancel(self) -> None:
        """Cancel the request; the current step continues, and the next one does not include it."""
        if not self.done():
            self._cancel()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the images.

        Args:
            timeout: seconds to wait; the request goes on afterwards.

        Raises:
            RequestFailed: there will be none; the exception's class says why.
            TimeoutError: they are not there yet.
        """
        return self._future.result(timeout)

    async def wait(self) -> Result:
        """Wait for the images in an event loop; cancelling the caller cancels the request.

        Raises:
            RequestFailed: as `result`.
        """
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def previews(self) -> Iterator[Preview]:
        """The last preview there is and all later ones; ends when the request does.

        A caller that is slow misses previews: at most 16 are kept.
        """
        received: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()

        def keep(preview: Preview | None) -> None:
            if received.qsize() >= _MAX_KEPT:
                with suppress(queue.Empty):  # it was read meanwhile
                    received.get_nowait()
            received.put(preview)

        self._listen(keep)
        return iter(received.get, None)

    async def stream(self) -> AsyncIterator[Preview | Result]:
        """The last preview there is, all later ones and then the result, in an event loop.

        If the caller stops listening, the request is cancelled. A slow caller misses previews: at most 16 are kept.

        Raises:
            RequestFailed: as `result`.
        """
        received: asyncio.Queue[Preview | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def keep(preview: Preview | None) -> None:
            if received.qsize() >= _MAX_KEPT:
                received.get_nowait()
            received.put_nowait(preview)

        def pass_on(preview: Preview | None) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody listens
                loop.call_soon_threadsafe(keep, preview)

        self._listen(pass_on)
        try:
            while (preview := await received.get()) is not None:
                yield preview
            yield self._future.result()
        finally:
            self.cancel()

    def _listen(self, listener: Listener) -> None:
        with self._lock:
            if self._last is not None:
                listener(self._last)
            if self.done():
                listener(None)
            else:
                self._listeners.append(listener)

    def show(self, preview: Preview) -> None:
        """For the engine: pass a preview on."""
        with self._lock:
            self._last = preview
            for listener in self._listeners:
                listener(preview)

    def finish(self, outcome: Result | RequestFailed) -> None:
        """For the engine: end it, once."""
        with self._lock:
            if isinstance(outcome, Result):
                self._future.set_result(outcome)
            else:
                self._future.set_exception(outcome)
            for listener in self._listeners:
                listener(None)
            self._listeners.clear()
            self._cancel = _nothing  # so that whoever keeps this does not keep what the engine had of the request
