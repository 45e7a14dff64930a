"""The HTTP server in front of an engine: `POST /generate`, `GET /health`, `GET /metrics`, and a page at `/`."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import math
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from tdc_fast.serving.body import GenerateBody, Limits, read_body
from tdc_fast.serving.connections import REFUSED, PromptConnection
from tdc_fast.serving.encoding import as_json, as_npz, as_png, event, preview_event
from tdc_fast.serving.engine import Engine
from tdc_fast.serving.failures import (
    Cancelled,
    EngineClosed,
    Expired,
    OutOfMemory,
    Overloaded,
    RequestFailed,
)
from tdc_fast.serving.generation import Generation
from tdc_fast.serving.metrics import CONTENT_TYPE, Metrics
from tdc_fast.serving.request import Preview, Result

CLIENT_LEFT = 499
_log = logging.getLogger("tdc_fast.serving")
_PATHS = ("/", "/generate", "/health", "/metrics")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def create_app(engine: Engine, *, limits: Limits | None = None, name: str = "") -> FastAPI:
    """The application; the engine is started and closed by the caller.

    Args:
        engine: draws the images.
        limits: what one request may ask for.
        name: of the model, for /health and the page.
    """
    limits = limits or Limits(images=min(Limits.images, engine.max_batch))
    metrics = Metrics(engine)
    app = FastAPI(title="tdc_fast", description="Images from a diffusion model", docs_url=None, redoc_url=None)
    page = importlib.resources.files("tdc_fast.serving").joinpath("page.html").read_text(encoding="utf-8")
    schema = {"requestBody": {"content": {"application/json": {"schema": GenerateBody.model_json_schema()}}}}

    @app.post("/generate", openapi_extra=schema)
    async def generate(request: Request) -> Response:
        """Draw images: a PNG, an npz, JSON, or server-sent events with previews."""
        try:
            body = await _body(request, limits)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        except asyncio.CancelledError:  # the server's time to shut down is over
            return _refusal(503, EngineClosed.reason, "the body did not arrive before the end", retry_after=1.0)
        except TimeoutError:
            return _refusal(408, "timeout", f"the body did not arrive within {limits.body_seconds:g} s")
        if body is None:
            return _refusal(413, "too_large", f"the body is larger than {limits.body} bytes, a limit of this server")
        try:
            wanted, form = read_body(body, limits, engine.diffusion.num_timesteps)
            generation = engine.submit(wanted)
        except ValueError as error:
            field = str(error).partition(":")[0]
            return _refusal(422, "invalid", str(error), field=field)
        except RequestFailed as failure:
            return _failure(failure)
        headers = {"X-Seed": str(wanted.seed), "Cache-Control": "no-store"}
        if form == "events":
            return _Events(generation, headers)
        try:
            result = await _result_or_departure(generation, request)
        except RequestFailed as failure:
            return _failure(failure)
        if form == "json":
            return JSONResponse(await asyncio.to_thread(as_json, result, wanted), headers=headers)
        if form == "npz":
            return Response(await asyncio.to_thread(as_npz, result), media_type="application/x-npz", headers=headers)
        return Response(await asyncio.to_thread(as_png, result.images), media_type="image/png", headers=headers)

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken, and what the model can do."""
        channels, height, width = engine.image_shape
        facts = {
            "status": "ok" if engine.is_running else "closed",
            "model": name,
            "image": {"channels": channels, "height": height, "width": width},
            "classes": list(engine.classes),
            "num_timesteps": engine.diffusion.num_timesteps,
            "max_images": limits.images,
            "max_steps": min(limits.steps, engine.diffusion.num_timesteps),
            "batch_places": engine.places,
            **engine.load(),
        }
        return JSONResponse(facts, status_code=200 if engine.is_running else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/")
    async def show_page() -> Response:
        """A page that asks for images and shows them as they form."""
        return HTMLResponse(page)

    app.add_middleware(_CountAnswers, metrics=metrics)
    return app


class _CountAnswers:
    """Counts every answer by path and status, also where there was nobody left to take it."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"] if scope["path"] in _PATHS else "other"
        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            if status == CLIENT_LEFT:
                status = scope.get(REFUSED, CLIENT_LEFT)
            self._metrics.responses[path, status] += 1


class _Events(StreamingResponse):
    """Previews and the result as server-sent events; a client that disconnects cancels the request."""

    def __init__(self, generation: Generation, headers: dict[str, str]) -> None:
        super().__init__(self._events(generation), media_type="text/event-stream", headers=headers)
        self._generation = generation

    @staticmethod
    async def _events(generation: Generation) -> AsyncIterator[bytes]:
        try:
            async for one in generation.stream():
                if isinstance(one, Preview):
                    yield await asyncio.to_thread(preview_event, one)
                else:
                    yield event("result", await asyncio.to_thread(as_json, one, generation.request))
        except RequestFailed as failure:
            yield event("error", {"reason": failure.reason, "message": str(failure)})

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client left before the first event
            self._generation.cancel()


async def _body(request: Request, limits: Limits) -> bytes | None:
    """The body; None if it is too large."""
    if int(request.headers.get("content-length", 0)) > limits.body:
        return None
    body = bytearray()
    async with asyncio.timeout(limits.body_seconds):
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body:
                return None
    return bytes(body)


async def _result_or_departure(generation: Generation, request: Request) -> Result:
    """The result; `Cancelled` once the client has left."""

    async def departure() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watching = asyncio.create_task(departure())
    try:
        return await generation.wait()
    finally:
        watching.cancel()


def _failure(failure: RequestFailed) -> Response:
    """The answer to a request that got no images."""
    if isinstance(failure, Overloaded):
        return _refusal(503, failure.reason, str(failure), retry_after=failure.retry_after)
    if isinstance(failure, OutOfMemory | EngineClosed):
        return _refusal(503, failure.reason, str(failure), retry_after=1.0)
    if isinstance(failure, Cancelled):
        return Response(status_code=CLIENT_LEFT)
    return _refusal(504 if isinstance(failure, Expired) else 500, failure.reason, str(failure))


def _refusal(
    status: int, reason: str, message: str, *, field: str | None = None, retry_after: float | None = None
) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    error = {"reason": reason, "message": message} | ({} if field is None else {"field": field})
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C, then finishes what is live or fails it with a reason.

    Args:
        app: the application.
        engine: its engine, which has been started.
        grace: seconds for requests to finish after the signal. If a Ctrl-C follows, they fail at once, with a reason;
            after one more everything ends where it is.
        greeting: printed once requests are taken and signals are handled; "" for nothing.
    """

    def __init__(self, app: FastAPI, engine: Engine, grace: float, greeting: str = "") -> None:
        seconds = math.ceil(grace) + 5  # for the answers to requests that were not finished in time
        config = uvicorn.Config(
            app, http=PromptConnection, log_level="error", lifespan="off", timeout_graceful_shutdown=seconds, ws="none"
        )
        super().__init__(config)
        self._engine, self._grace, self._greeting = engine, grace, greeting
        self._is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets)
        if self._greeting:
            print(self._greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down: the engine takes no more requests and finishes those that it has."""
        if not self.should_exit:
            closing = {"drain": True, "timeout": self._grace}
            threading.Thread(target=self._engine.close, kwargs=closing, daemon=True).start()
        elif sig == signal.SIGINT and not self._is_hurried:
            self._is_hurried = True
            threading.Thread(target=self._engine.close, kwargs={"drain": False}, daemon=True).start()
            return  # uvicorn would end connections that have no answer yet
        super().handle_exit(sig, frame)

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until a signal ends it; the engine is closed then."""
        try:
            self.run(sockets=[listener])
        except KeyboardInterrupt:
            pass  # uvicorn raises the signal again after it has shut down
        finally:
            self._engine.close(drain=False)
