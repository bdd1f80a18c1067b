"""Servers over the same model, and clients that stream from them: for `bench_vllm.py` and `soak_vllm.py`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time
from typing import Any

import httpx
import psutil
from common import stop


@dataclass
class Server:
    """``address`` of a process that speaks OpenAI's protocol, and the ``model`` that it serves."""

    address: str
    model: str
    process: subprocess.Popen[str]

    def resident_bytes(self) -> int:
        """Memory of the process and of those that it started, pages that they share counted once for each."""
        total, root = 0, psutil.Process(self.process.pid)
        for member in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        return total

    def call(self, method: str) -> Any:
        """What a method of `StepTimes` says in the worker."""
        answer = httpx.post(f"{self.address}/collective_rpc", json={"method": method}, timeout=60)
        answer.raise_for_status()
        return answer.json()["results"][0] if answer.content else None


@contextmanager
def vllm_server(folder: Path, *options: str, timed: bool = False) -> Iterator[Server]:
    """`vllm serve` over a folder, once it answers; stopped at the end. ``timed``: its worker times its steps. Raises
    RuntimeError where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--port", str(port), "--dtype", "float32"]
    command += ["--no-enable-log-requests", "--disable-uvicorn-access-log", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if timed:
        command += ["--worker-extension-cls", "vllm_servers.StepTimes"]
        settings |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", str(folder), process)
            while not _answers(server.address):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"vllm serve {folder.name} ended: {log.read()[-3000:]}")
                time.sleep(1)
            if timed:
                server.call("watch_steps")
            try:
                yield server
            except httpx.HTTPError as error:  # it went away: what it said last says why
                log.seek(0)
                raise RuntimeError(f"vllm serve {folder.name} does not answer: {log.read()[-6000:]}") from error
        finally:
            stop(process)


@contextmanager
def scone_server(folder: Path, *options: str) -> Iterator[Server]:
    """`scone serve` over a folder."""
    command = [sys.executable, "-m", "scone.scripts.serve", "--model_path", str(folder), "--port", "0", *options]
    table = ["--embedding_cache_path", str(folder / "embeddings.cache"), "--model_name", "ours"]
    process = subprocess.Popen(command + table, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = process.stdout.readline()
        if " at http://" not in line:
            raise RuntimeError(f"scone serve does not start: {line}")
        yield Server(line.split(" at ")[1].split()[0], "ours", process)
    finally:
        stop(process)


@dataclass
class Answer:
    """What one request got: token ids (of vLLM alone), and when the first and the last text came, in seconds."""

    tokens: list[int] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0


async def ask(
    client: httpx.AsyncClient, server: Server, prompt: Sequence[int], new: int, leave_after: int | None = None
) -> Answer:
    """Stream a greedy answer to a prompt of token ids. ``leave_after``: close the connection after so many pieces."""
    body = {"model": server.model, "prompt": list(prompt), "max_tokens": new, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    if server.model != "ours":
        body |= {"ignore_eos": True, "return_token_ids": True}
    answer, started, pieces = Answer(), time.perf_counter(), 0
    async with client.stream("POST", f"{server.address}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]
            if not chunk["choices"]:
                continue
            choice, now = chunk["choices"][0], time.perf_counter() - started
            if answer.first is None and (choice.get("text") or choice.get("token_ids")):  # not a piece without text
                answer.first = now
            answer.last = now
            answer.tokens += choice.get("token_ids") or []
            pieces += 1
            if leave_after is not None and pieces >= leave_after:
                break
    return answer


async def gather(
    server: Server, prompts: Sequence[Sequence[int]], new: int, clients: int
) -> tuple[list[Answer], float]:
    """Answers to all prompts from so many clients at a time, and the seconds that it took."""
    waiting = asyncio.Semaphore(clients)
    # a connection each: one that is kept may be closed by the server at the moment of the next request
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(prompt: Sequence[int]) -> Answer:
            async with waiting:
                return await ask(client, server, prompt, new)

        started = time.perf_counter()
        answers = await asyncio.gather(*map(one, prompts))
        return list(answers), time.perf_counter() - started


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


class StepTimes:
    """What `vllm serve --worker-extension-cls` adds to a worker; called over HTTP (``/collective_rpc``)."""

    _steps: list[tuple[int, float, float]]

    def watch_steps(self) -> None:
        """From now on, time the model's forward pass and its trunk's within it, in seconds of this thread's own: it is
        not their fault if others use the core.
        """
        model: Any = self.get_model()  # type: ignore[attr-defined]
        whole, trunk, of_trunk = model.forward, model.trunk.forward, [0.0]
        self._steps = []

        def timed_trunk(*inputs: Any, **named: Any) -> Any:
            started = thread_time()
            output = trunk(*inputs, **named)
            of_trunk[0] = thread_time() - started
            return output

        def timed_whole(*inputs: Any, **named: Any) -> Any:
            started = thread_time()
            output = whole(*inputs, **named)
            seconds = thread_time() - started
            self._steps.append((len(output), seconds - of_trunk[0], seconds))
            return output

        model.forward, model.trunk.forward = timed_whole, timed_trunk

    def step_times(self) -> list[tuple[int, float, float]]:
        """Tokens, seconds of all but the trunk, and seconds of both, of each step since the last call."""
        steps, self._steps = self._steps, []
        return steps
