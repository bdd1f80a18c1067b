"""A small HTTP server for CPUs and for trying out: OpenAI-compatible completions and chat, health, metrics, a page.

Many clients or a GPU are vLLM's (``vllm serve MODEL``). FastAPI and uvicorn (extra ``serve``) do the HTTP.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from scone.inference.engine import SconeInferenceEngine
from scone.inference.loading import device_of
from scone.inference.serve_protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    ServeLimits,
    error_body,
    finish_reason,
    parse,
    usage,
)
from scone.inference.serve_scheduler import GenerationJob, Scheduler
from scone.tokenization.inspection import inspect_tokens
from scone.utils.errors import SconeError

MAX_TEXT_TOKENS, NEXT_TOKENS = 2048, 12
FILES = ("/", "/page.css", "/page.js")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Question(BaseModel):
    """What the page asks about."""

    text: str


async def page_file(request: Request) -> FileResponse:
    """One of `FILES`."""
    name = request.url.path.strip("/") or "index.html"
    return FileResponse(Path(__file__).parent / "page" / name, headers=_HEADERS)


def page_facts(engine: SconeInferenceEngine) -> dict[str, Any]:
    """What the page says of the model."""
    vocabulary, table = getattr(engine.model, "vocabulary", None), engine.loaded.table
    return {
        "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,
        "max_n": 1 if vocabulary is None else vocabulary.max_n,
        "table": None if table is None else table.describe(),
    }


def inspected(engine: SconeInferenceEngine, text: str) -> dict[str, Any]:
    """The tokens of ``text``, each with the f-gram that ends there. Raises SconeError for too long a text."""
    ids, matcher, decode = _ids(engine, text), getattr(engine.model, "matcher", None), engine.tokenizer.decode
    if matcher is None:
        return {"tokens": [{"text": decode([token]), "match_length": 1} for token in ids]}
    records = inspect_tokens(np.array(ids, np.int64), matcher)
    texts = [{"text": decode([one.token]), "f_gram_text": decode(list(one.f_gram))} for one in records]
    return {"tokens": [asdict(record) | shown for record, shown in zip(records, texts, strict=True)]}


@torch.inference_mode()
def next_tokens(engine: SconeInferenceEngine, text: str, model_lock: threading.Lock) -> list[dict[str, Any]]:
    """The likeliest tokens after ``text`` with their probabilities. Raises SconeError for none or too long a text."""
    if not (ids := _ids(engine, text)):
        raise RequestError("found an empty text; expected some text to continue; write some")
    tokens = torch.tensor([ids], device=device_of(engine.model))
    with model_lock:
        logits = engine.model(input_ids=tokens, use_cache=False).logits[0, -1]
    best = logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
    return [
        {"text": engine.tokenizer.decode([token]), "probability": probability}
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _ids(engine: SconeInferenceEngine, text: str) -> list[int]:
    ids = list(engine.tokenizer(text, add_special_tokens=False).input_ids)
    if len(ids) > MAX_TEXT_TOKENS:
        raise RequestError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
    return engine.prompt_ids(ids) if ids else []


LOOPBACK = ("127.0.0.1", "localhost", "::1")
DISCONNECT_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 5  # what runs may finish for so long; then it is ended, and
FAREWELL_SECONDS = 5  # so long it may take to tell the clients
LISTEN_BACKLOG = 2048


class Service:
    """The routes, and what they share: the engine, its scheduler, limits, metrics, the key."""

    def __init__(
        self,
        engine: SconeInferenceEngine,
        model_name: str,
        limits: ServeLimits | None = None,
        api_key: str | None = None,
        baseline: SconeInferenceEngine | None = None,
    ) -> None:
        self.engine, self.limits, self.api_key = engine, limits or ServeLimits(), api_key
        self.scheduler = Scheduler(engine, self.limits.max_batch, self.limits.max_waiting)
        self.counts = self.scheduler.counts
        self.engines = {"scone": engine} | ({"baseline": baseline} if baseline is not None else {})
        self.model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "scone"}
        self.model |= page_facts(engine)

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
        app.post("/page/next", **keyed)(self.page_next)
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
        """The page's text, token by token."""
        text = parse(Question, await self._body(request)).text
        return JSONResponse(await asyncio.to_thread(inspected, self.engine, text))

    async def page_next(self, request: Request) -> Response:
        """What each model expects after the page's text."""
        text, lock = parse(Question, await self._body(request)).text, self.scheduler.model_lock
        found = {name: await asyncio.to_thread(next_tokens, each, text, lock) for name, each in self.engines.items()}
        return JSONResponse(found)

    async def _answer(self, request: Request, asked: GenerationRequest) -> Response:
        await self.model_of(asked.model)
        deadline = time.perf_counter() + self.limits.max_seconds
        sequences = await asyncio.to_thread(asked.sequences, self.engine, self.limits, deadline)
        job = GenerationJob(sequences, asked.generation_options(), asked.seed)
        answer = Answer(asked.model, isinstance(asked, ChatRequest))
        echo = isinstance(asked, CompletionRequest) and asked.echo
        echoed = [self.engine.text_of(sequence.prompt_ids) if echo else "" for sequence in sequences]
        if asked.stream:
            stream = _Stream(job, answer, echoed, asked.stream_options.include_usage, self.counts)
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
        if all(sequence.finish_reason == "time" and not sequence.token_ids for sequence in sequences):
            raise RequestError("found no time to begin before the time limit; try again later", 503)
        self.counts['requests_total{status="200"}'] += 1
        return JSONResponse(answer.whole(sequences, echoed))

    async def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestError("found no valid API key; send Authorization: Bearer KEY", 401, "invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("found another content type; expected application/json", 415)
        body, limit = bytearray(), self.limits.max_body_bytes
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise RequestError(f"found a body of more than {limit:,} bytes; send less at once", 413)
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

    def __init__(self, job: GenerationJob, answer: Answer, echoed: list[str], with_usage: bool, counts: Counter[str]):
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str] | None]()
        self._job, self._counts, self._pieces = job, counts, pieces

        def tell(index: int, text: str) -> None:  # on the thread that generates
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (index, text))

        for index, sequence in enumerate(job.sequences):
            sequence.on_text = partial(tell, index)
        job.done.add_done_callback(lambda _: pieces.put_nowait(None))
        events = self._events(answer, echoed, with_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's one method."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.done.done():
                self._counts["disconnects_total"] += 1
            self._job.cancel()

    async def _events(self, answer: Answer, echoed: list[str], with_usage: bool) -> AsyncIterator[str]:
        for index, text in enumerate(echoed):
            yield _event(answer.chunk(index, text, first=True))
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


def serve(service: Service, host: str, port: int, announce: Callable[[str], None], origins: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or SIGINT; port 0 takes a free one. ``announce`` gets the address once it answers;
    ``origins`` as for `Service.app`.

    Raises SconeError when the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # who comes before uvicorn is ready waits instead of being turned away
        listener = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SconeError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
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
