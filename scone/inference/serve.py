"""An HTTP server over the engine: OpenAI-compatible completions, models, health, metrics, and a page to look inside.

FastAPI and uvicorn (extra ``serve``) do the HTTP; `Batcher` owns the model; `serve_protocol` knows the JSON.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scone.inference.engine import SconeInferenceEngine
from scone.inference.serve_batching import Batcher, Job, QueueFullError
from scone.inference.serve_metrics import Metrics
from scone.inference.serve_page import Page
from scone.inference.serve_protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    finish_reason,
    parse,
    rows_of,
)
from scone.inference.streaming import Continuation
from scone.utils.errors import SconeError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DISCONNECT_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 5  # what runs may finish for so long; then it is ended, and
FAREWELL_SECONDS = 5  # so long it may take to tell the clients
MAX_PROMPTS = 64
LISTEN_BACKLOG = 2048
_ANY_PATH = "/{path:path}"
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models")


@dataclass(frozen=True)
class ServeLimits:
    """What one client may ask for, and how much may be under way."""

    max_prompt_tokens: int | None = None
    max_new_tokens: int = 1024
    max_batch: int = 16
    max_waiting: int = 128
    max_seconds: float = 120.0
    max_body_bytes: int = 4 << 20


class Service:
    """What the routes share: the engine, its batcher, limits, metrics, the key."""

    def __init__(
        self,
        engine: SconeInferenceEngine,
        model_name: str,
        limits: ServeLimits | None = None,
        api_key: str | None = None,
        baseline: SconeInferenceEngine | None = None,
    ) -> None:
        self.engine, self.model_name, self.api_key = engine, model_name, api_key
        self.limits = limits or ServeLimits()
        self.created = int(time.time())
        self.metrics = Metrics()
        self.batcher = Batcher(engine, self.limits.max_batch, self.limits.max_waiting, self.metrics.note_batch)
        self.metrics.watch(self.batcher)
        self.page = Page(engine, self.batcher, baseline)

    def app(
        self,
        hosts: list[str] | None = None,
        announce: Callable[[], None] = lambda: None,
        origins: Sequence[str] = (),
    ) -> FastAPI:
        """The application. ``hosts``: names by which it may be called (None: any); ``announce`` is called once up;
        ``origins``: web pages elsewhere whose scripts may call it.
        """

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            announce()
            yield
            await asyncio.to_thread(self.batcher.close)

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        if hosts is not None:  # a page from elsewhere that calls a name of its own for this machine gets no answer
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        app.add_exception_handler(RequestError, _refused)
        app.add_exception_handler(HTTPException, self._unknown)
        app.add_exception_handler(Exception, _failed)
        app.add_middleware(_Measured, metrics=self.metrics)
        if origins:  # outermost: refusals are for those pages to read, too
            methods = ["GET", "POST"]
            app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"])
        app.api_route("/health", methods=["GET", "HEAD"])(self.health)
        app.get("/metrics")(self.metrics_text)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/chat/completions")(self.chat_completions)
        app.post("/page/{question}")(self.page_answer)
        app.get(_ANY_PATH)(self.page_file)
        return app

    async def _unknown(self, request: Request, error: Exception) -> Response:
        """A path that is not here, or a method that the path has not: every path is the page's to look for a file."""
        assert isinstance(error, HTTPException)
        paths = (route for route in request.app.routes if getattr(route, "path", None) != _ANY_PATH)
        known = any(route.matches(request.scope)[0] != Match.NONE for route in paths)
        is_file = self.page.file(request.url.path.removeprefix("/")) is not None
        status = error.status_code
        if status in (404, 405):
            status = 405 if known or is_file else 404
        message = f"found no {request.method} {request.url.path} here; see /v1/models, /v1/completions, /health"
        return JSONResponse(RequestError(status, message).body(), status_code=status)

    # ------------------------------------------------------------------ routes

    async def health(self) -> dict[str, str]:
        """Whether the server is up."""
        return {"status": "ok"}

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' text format."""
        self._authorize(request)
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def models(self, request: Request) -> dict[str, Any]:
        """The one model that is served."""
        self._authorize(request)
        return {"object": "list", "data": [self._model()]}

    async def model(self, request: Request, name: str) -> dict[str, Any]:
        """The model, by its name."""
        self._authorize(request)
        self._check_model(name)
        return self._model()

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        self._authorize(request)
        asked = parse(CompletionRequest, await self._body(request))
        prompts = asked.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(400, f"found {len(prompts)} prompts; expected at most {MAX_PROMPTS}; send fewer at once")
        return await self._answer(request, asked, list(prompts), is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        self._authorize(request)
        asked = parse(ChatRequest, await self._body(request))
        prompt = await asyncio.to_thread(asked.prompt_ids, self.engine)
        return await self._answer(request, asked, [prompt], is_chat=True)

    async def page_file(self, path: str) -> Response:
        """The page and what belongs to it."""
        found = self.page.file(path)
        if found is None:
            raise HTTPException(404)
        return Response(found.content, media_type=found.media_type, headers=found.headers)

    async def page_answer(self, request: Request, question: str) -> Response:
        """What the page asks: about, inspect, neighbours, next."""
        self._authorize(request)
        try:
            asked = json.loads(await self._body(request))
            answer = await asyncio.to_thread(self.page.answer, question, asked)
        except SconeError as error:
            raise RequestError(400, str(error)) from error
        except QueueFullError as error:
            raise _full() from error
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "the body is not JSON") from error
        return JSONResponse(answer)

    # ------------------------------------------------------------------ answering

    async def _answer(
        self, request: Request, asked: GenerationRequest, prompts: list[str | list[int]], is_chat: bool
    ) -> Response:
        self._check_model(asked.model)
        limits = self.limits
        deadline = time.perf_counter() + limits.max_seconds
        rows = await asyncio.to_thread(
            rows_of, self.engine, asked, prompts, limits.max_prompt_tokens, limits.max_new_tokens, deadline
        )
        job = Job(rows, asked.generation_options(), asked.seed)
        answer = Answer(self.model_name, is_chat)
        echoed = [self.engine.text_of(row.prompt_ids) if getattr(asked, "echo", False) else "" for row in rows]
        if asked.stream:
            with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = self._events(job, answer, echoed)
            self._submit(job)
            stream = _server_sent(events, answer, rows, with_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._submit(job)
        await self._finished(request, job)
        return JSONResponse(answer.whole(rows, echoed))

    def _submit(self, job: Job) -> None:
        try:
            self.batcher.submit(job)
        except QueueFullError as error:
            raise _full() from error
        except SconeError as error:
            raise RequestError(503, str(error), "shutting_down", "server_error") from error

    async def _finished(self, request: Request, job: Job) -> None:
        """Wait for the job, and end it when the client goes away."""
        waiting = asyncio.wrap_future(job.done)
        try:
            while not (await asyncio.wait([waiting], timeout=DISCONNECT_POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    break
            else:
                await _outcome(waiting)
                _check_time(job.rows)
                return
        finally:
            job.cancel()
        raise self._left()

    def _events(self, job: Job, answer: Answer, echoed: list[str]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a job that is submitted afterwards; closing the iterator ends the job."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

        def tell(piece: tuple[int, str] | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        for index, row in enumerate(job.rows):
            row.on_text = lambda text, index=index: tell((index, text))  # type: ignore[misc]
        job.done.add_done_callback(lambda _: tell(None))

        async def events() -> AsyncIterator[dict[str, Any]]:
            try:
                for index, text in enumerate(echoed):
                    yield answer.chunk(index, text, first=True)
                while (piece := await pieces.get()) is not None:
                    yield answer.chunk(*piece)
                await _outcome(asyncio.wrap_future(job.done))
                for index, row in enumerate(job.rows):
                    yield answer.chunk(index, "", finish_reason(row))
            finally:
                if not job.done.done():
                    self.metrics.disconnects.inc()
                job.cancel()

        return events()

    # ------------------------------------------------------------------ checks

    def _authorize(self, request: Request) -> None:
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestError(401, "found no valid API key; send Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "found another content type; expected application/json")
        body, limit = bytearray(), self.limits.max_body_bytes
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise RequestError(413, f"found a body of more than {limit:,} bytes; send less at once")
        except ClientDisconnect as error:
            raise self._left() from error
        return bytes(body)

    def _left(self) -> RequestError:
        self.metrics.disconnects.inc()
        return RequestError(499, "the client went away")

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            raise RequestError(
                404, f"found model {name!r}; this server has {self.model_name!r}; ask for that", "model_not_found"
            )

    def _model(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "scone"}


class _Measured:
    """Counts answers, and says that nothing is to be taken for another type than it says."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's one method."""
        path, started = scope.get("path", ""), time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
                if path.startswith("/v1/"):
                    endpoint = path if path in ENDPOINTS else "other"
                    self._metrics.note_request(endpoint, message["status"], time.perf_counter() - started)
            await send(message)

        await self._app(scope, receive, noted)


async def _outcome(done: asyncio.Future[None]) -> None:
    """Raise what became of a job as an answer. Raises RequestError."""
    try:
        await done
    except SconeError as error:
        raise RequestError(503, str(error), None, "server_error") from error
    except Exception as error:
        raise RequestError(500, f"generating failed: {type(error).__name__}", None, "server_error") from error


def _check_time(rows: list[Continuation]) -> None:
    """Refuse an answer that waited until its time was over."""
    if all(row.finish_reason == "time" and not row.token_ids for row in rows):
        raise RequestError(503, "found no time to begin before the time limit; try again later", None, "server_error")


async def _server_sent(
    events: AsyncIterator[dict[str, Any]], answer: Answer, rows: list[Continuation], with_usage: bool
) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield _event(event)
        if with_usage:
            yield _event(answer.usage_chunk(rows))
        yield "data: [DONE]\n\n"
    except RequestError as error:  # the status line has gone out already
        yield _event(error.body())
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _full() -> RequestError:
    return RequestError(429, "found the queue full; try again later", "queue_full", "server_error")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _failed(_: Request, error: Exception) -> Response:
    failure = RequestError(500, f"unexpected {type(error).__name__}; see the server's log", None, "server_error")
    return JSONResponse(failure.body(), status_code=500)


class _Server(uvicorn.Server):
    """Told to stop, it ends what still runs after a while, so that streams end as streams and not as broken lines."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self._batcher = batcher

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called once for each signal."""
        super().handle_exit(sig, frame)
        timer = threading.Timer(SHUTDOWN_SECONDS, self._batcher.close)
        timer.daemon = True
        timer.start()


def serve(
    service: Service,
    host: str,
    port: int,
    announce: Callable[[str], None] = print,
    origins: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or SIGINT; port 0 takes a free one. ``announce`` gets the address once it answers;
    ``origins`` as for `Service.app`.

    Raises SconeError when the address cannot be had.
    """
    listener = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    hosts = ["localhost", "127.0.0.1", "[::1]", "::1"] if host in LOOPBACK else None
    config = uvicorn.Config(
        service.app(hosts, lambda: announce(address), origins),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + FAREWELL_SECONDS,
        server_header=False,
    )
    # uvicorn hands the signal on once it has shut down; a server that was told to stop has not failed
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, service.batcher).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(LISTEN_BACKLOG)  # who comes before uvicorn is ready waits instead of being turned away
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SconeError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener
