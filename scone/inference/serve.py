"""A small HTTP server for CPUs and for trying out: OpenAI-compatible completions and chat, health, metrics, a page.

Many clients or a GPU are vLLM's (``vllm serve MODEL``). FastAPI and uvicorn (extra ``serve``) do the HTTP.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.serve_protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Question,
    RequestError,
    error_body,
    finish_reason,
    parse,
    usage,
)
from scone.inference.streaming import GeneratedSequence
from scone.tokenization.matcher import inspect_tokens
from scone.utils.errors import SconeError

MAX_TEXT_TOKENS, MAX_BODY_BYTES = 2048, 4 << 20
FILES = ("/", "/page.css", "/page.js")
_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DISCONNECT_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 5  # what runs may finish for so long; then it is ended, and
FAREWELL_SECONDS = 5  # so long it may take to tell the clients
LISTEN_BACKLOG = 2048


@dataclass(eq=False)
class GenerationJob:
    """The sequences of one request; ``done`` is resolved once all have ended, or fails with what went wrong."""

    sequences: list[GeneratedSequence]
    options: GenerationOptions
    seed: int | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def cancel(self) -> None:
        """Nobody wants the answer any more: waiting, it is dropped; running, it ends at its next token."""
        for sequence in self.sequences:
            sequence.cancel()

    def shares_batch_with(self, other: GenerationJob) -> bool:
        """Equal options share a batch, except where a seed alone has to decide what is drawn."""
        return self.options == other.options and not (self.options.do_sample and {self.seed, other.seed} != {None})


class Scheduler:
    """Requests that wait together run as one batch, one batch at a time, in the order in which the oldest of each came.
    Its methods belong to the event loop.
    """

    def __init__(self, engine: SconeInferenceEngine, max_batch: int, max_waiting: int) -> None:
        """``max_batch``: sequences of a batch; ``max_waiting``: jobs that may wait."""
        self._engine, self._max_batch, self._max_waiting = engine, max_batch, max_waiting
        self.waiting: list[GenerationJob] = []
        self.running: list[GenerationJob] = []
        counted = ("batches", "batch_sequences", "generated_tokens", "disconnects")
        self.counts: Counter[str] = Counter({f"{name}_total": 0 for name in counted})
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._closing = RequestError("the server is shutting down; try again later", 503, "shutting_down")

    def submit(self, job: GenerationJob) -> None:
        """Put a job into the queue. Raises RequestError where that is full, or the server is shutting down."""
        if self._closed:
            raise self._closing
        if len(self.waiting) >= self._max_waiting:
            raise RequestError("found the queue full; try again later", 429, "queue_full")
        self.waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    def close(self) -> None:
        """Refuse what waits, and end what runs at its next token."""
        self._closed = True
        _resolve(self.waiting, self._closing)
        self.waiting = []
        for job in self.running:
            job.cancel()

    async def _work(self) -> None:
        while self.waiting:
            self.running = self._next_batch()
            try:
                await asyncio.to_thread(self._generate, self.running)
            except Exception as error:  # it belongs to those who asked; the next batch runs
                _resolve(self.running, error)
            else:
                _resolve(self.running)
            self.running = []

    def _next_batch(self) -> list[GenerationJob]:
        batch: list[GenerationJob] = []
        for job in list(self.waiting):
            size = sum(len(other.sequences) for other in [*batch, job])
            if not batch or (job.shares_batch_with(batch[0]) and size <= self._max_batch):
                self.waiting.remove(job)
                batch.append(job)
        return batch

    def _generate(self, jobs: list[GenerationJob]) -> None:
        sequences = [sequence for job in jobs for sequence in job.sequences if not sequence.is_cancelled]
        seed = jobs[0].seed if jobs[0].seed is not None else secrets.randbits(31)
        for first in range(0, len(sequences), self._max_batch):  # one request may have more than a batch holds
            batch = sequences[first : first + self._max_batch]
            self._engine.run(batch, replace(jobs[0].options, seed=seed))
            self.counts.update(batches_total=1, batch_sequences_total=len(batch))
        self.counts["generated_tokens_total"] += sum(len(sequence.token_ids) for sequence in sequences)


def _resolve(jobs: list[GenerationJob], error: Exception | None = None) -> None:
    for job in jobs:
        if error is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)
            job.done.exception()  # it counts as seen, also when the client has gone


async def page_file(request: Request) -> FileResponse:
    """One of `FILES`."""
    return FileResponse(
        Path(__file__).parent / "page" / (request.url.path.strip("/") or "index.html"), headers=_HEADERS
    )


class Service:
    """The routes, and what they share: the engine, its scheduler, the longest answer, the key."""

    def __init__(
        self,
        engine: SconeInferenceEngine,
        model_name: str,
        max_new_tokens: int,
        max_batch: int,
        max_waiting: int,
        api_key: str | None,
    ) -> None:
        self.engine, self.max_new_tokens, self.api_key = engine, max_new_tokens, api_key
        self.scheduler = Scheduler(engine, max_batch, max_waiting)
        self.counts = self.scheduler.counts
        vocabulary, table = getattr(engine.model, "vocabulary", None), engine.loaded.table
        self.model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "scone"} | {
            "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,  # this and what follows is for the page
            "max_n": 1 if vocabulary is None else vocabulary.max_n,
            "table": None if table is None else table.describe(),
        }

    def app(self, hosts: list[str] | None, origins: Sequence[str], announce: Callable[[], None]) -> FastAPI:
        """The application. ``hosts``: names by which it may be called (None: any); ``origins``: web pages elsewhere
        whose scripts may call it; ``announce`` is called once it is up.
        """

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            announce()
            yield
            self.scheduler.close()

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        for kind in (SconeError, HTTPException, ClientDisconnect, Exception):
            app.add_exception_handler(kind, self._refusal)
        if hosts is not None:  # a page from elsewhere that calls a name of its own for this machine gets no answer
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
        if origins:  # outermost: refusals are for those pages to read, too
            methods = ["GET", "POST"]
            app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=["*"])
        app.api_route("/health", methods=["GET", "HEAD"])(lambda: {"status": "ok"})
        keyed: dict[str, Any] = {"dependencies": [Depends(self._authorize)]}
        app.get("/metrics", **keyed)(self.metrics_text)
        app.get("/v1/models", **keyed)(lambda: {"object": "list", "data": [self.model]})
        app.get("/v1/models/{name:path}", **keyed)(self.model_of)
        app.post("/v1/completions", **keyed)(self.completions)
        app.post("/v1/chat/completions", **keyed)(self.chat_completions)
        app.post("/page/inspect", **keyed)(self.page_inspect)
        for path in FILES:
            app.get(path)(page_file)
        return app

    async def metrics_text(self) -> Response:
        """What was counted, in Prometheus' text format."""
        sequences = sum(len(job.sequences) for job in self.scheduler.running)
        now = {"waiting_requests": len(self.scheduler.waiting), "running_sequences": sequences}
        lines = [f"scone_{name} {value}\n" for name, value in ({**self.counts, **now}).items()]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")

    async def model_of(self, name: str) -> dict[str, Any]:
        """The model that is served, by its name."""
        if name != self.model["id"]:
            found = f"found model {name!r}; this server has {self.model['id']!r}; ask for that"
            raise RequestError(found, 404, "model_not_found")
        return self.model

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, parse(CompletionRequest, await self._body(request)))

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, parse(ChatRequest, await self._body(request)))

    async def page_inspect(self, request: Request) -> Response:
        """The page's text, token by token, each with the f-gram that ends there."""
        text = parse(Question, await self._body(request)).text
        return JSONResponse({"tokens": await asyncio.to_thread(self._inspected, text)})

    def _inspected(self, text: str) -> list[dict[str, Any]]:
        matcher, decode = getattr(self.engine.model, "matcher", None), self.engine.tokenizer.decode
        ids = list(self.engine.tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) > MAX_TEXT_TOKENS:
            raise RequestError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
        if matcher is None:
            return [{"text": decode([token]), "match_length": 1} for token in ids]
        records = inspect_tokens(np.array(ids, np.int64), matcher)
        texts = [{"text": decode([one.token]), "f_gram_text": decode(list(one.f_gram))} for one in records]
        return [asdict(record) | shown for record, shown in zip(records, texts, strict=True)]

    async def _answer(self, request: Request, asked: GenerationRequest) -> Response:
        await self.model_of(asked.model)
        sequences = await asyncio.to_thread(asked.sequences, self.engine, self.max_new_tokens)
        job = GenerationJob(sequences, asked.generation_options(), asked.seed)
        answer = Answer(asked.model, isinstance(asked, ChatRequest))
        if asked.stream:
            stream = _Stream(job, answer, asked.stream_options.include_usage, self.counts)
            self.scheduler.submit(job)
            self.counts['requests_total{status="200"}'] += 1
            return stream
        self.scheduler.submit(job)
        try:
            while not (await asyncio.wait([job.done], timeout=DISCONNECT_POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            job.cancel()
        job.done.result()
        self.counts['requests_total{status="200"}'] += 1
        return JSONResponse(answer.whole(sequences))

    async def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestError("found no valid API key; send Authorization: Bearer KEY", 401, "invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("found another content type; expected application/json", 415)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise RequestError(f"found a body of more than {MAX_BODY_BYTES:,} bytes; send less at once", 413)
        return bytes(body)

    async def _refusal(self, request: Request, error: Exception) -> Response:
        """One line for whatever went wrong, with its status."""
        if isinstance(error, ClientDisconnect):
            self.counts["disconnects_total"] += 1
            error = RequestError("the client went away", 499)
        elif isinstance(error, HTTPException):
            message = f"found no {request.method} {request.url.path} here; see /v1/models, /v1/completions, /health"
            error = RequestError(message, error.status_code)
        elif not isinstance(error, SconeError):
            error = RequestError(f"unexpected {type(error).__name__}; see the server's log", 500)
        status = getattr(error, "status", 400)
        self.counts[f'requests_total{{status="{status}"}}'] += 1
        headers = {"Retry-After": "1"} if status in (429, 503) else {}
        return JSONResponse(error_body(error), status_code=status, headers=headers)


class _Stream(StreamingResponse):
    """Server-sent events of a job that is submitted afterwards. It ends with them: when all is sent, or the client went
    away.
    """

    def __init__(self, job: GenerationJob, answer: Answer, with_usage: bool, counts: Counter[str]) -> None:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str] | None]()
        self._job, self._counts, self._pieces = job, counts, pieces

        def tell(index: int, text: str) -> None:  # on the thread that generates
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, text))

        for index, sequence in enumerate(job.sequences):
            sequence.on_text = partial(tell, index)
        job.done.add_done_callback(lambda _: pieces.put_nowait(None))
        events = self._events(answer, with_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's one method."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.done.done():
                self._counts["disconnects_total"] += 1
            self._job.cancel()

    async def _events(self, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
        for index in range(len(self._job.sequences)):
            yield _event(answer.chunk(index, "", first=True))
        while (piece := await self._pieces.get()) is not None:
            yield _event(answer.chunk(*piece))
        error = self._job.done.exception()
        if error is not None:  # the status line has gone out already
            known = isinstance(error, SconeError)
            yield _event(
                error_body(error if known else RequestError(f"generating failed: {type(error).__name__}", 500))
            )
            return
        for index, sequence in enumerate(self._job.sequences):
            yield _event(answer.chunk(index, "", finish_reason(sequence)))
        if with_usage:
            yield _event(answer.end(usage=usage(self._job.sequences)))
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Server(uvicorn.Server):
    """Told to stop, it ends what still runs after a while, so that streams end as streams and not as broken lines."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once it is told to stop."""
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self._scheduler.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises SconeError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # who comes before uvicorn is ready waits instead of being turned away
        return socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SconeError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error


def serve(service: Service, host: str, port: int, announce: Callable[[str], None], origins: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or SIGINT. ``announce`` gets the address once it answers; ``origins`` as for `Service.app`.

    Raises SconeError as `listen` does.
    """
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    hosts = ["localhost", "127.0.0.1", "[::1]", "::1"] if host in LOOPBACK else None
    config = uvicorn.Config(
        service.app(hosts, origins, lambda: announce(address)),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + FAREWELL_SECONDS,
        server_header=False,
    )
    # uvicorn hands the signal on once it has shut down; a server that was told to stop has not failed
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with listener:
        _Server(config, service.scheduler).run(sockets=[listener])
