"""Requests that came while the model was busy run together: one thread owns the model, batches form in the queue."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.statistics import TableReads, counted_reads
from scone.inference.streaming import Continuation
from scone.utils.errors import SconeError


class QueueFullError(Exception):
    """As many requests are waiting as may wait."""


@dataclass(eq=False)
class Job:
    """The rows of one request. ``seed`` None: any will do, so the request may share its batch with others.

    ``done`` is resolved when all rows have ended, or fails with what went wrong.
    """

    rows: list[Continuation]
    options: GenerationOptions
    seed: int | None = None
    done: Future[None] = field(default_factory=Future)

    def cancel(self) -> None:
        """Nobody wants the answer any more: waiting, it is dropped; running, its rows end at their next token."""
        for row in self.rows:
            row.cancel()

    @property
    def batch_key(self) -> GenerationOptions | None:
        """Jobs of equal keys may share a batch; None: with nobody, for a sample must depend on its seed alone."""
        return None if self.options.do_sample and self.seed is not None else self.options


@dataclass(eq=False)
class _Call:
    """Other work that needs the model."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True)
class BatchReport:
    """What one batch was: for metrics."""

    rows: Sequence[Continuation]
    started: float
    seconds: float
    reads: TableReads | None


class Batcher:
    """Runs jobs one batch at a time, in the order in which the oldest of each batch came."""

    def __init__(
        self,
        engine: SconeInferenceEngine,
        max_batch: int,
        max_waiting: int,
        report: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """``max_batch``: rows of a batch; ``max_waiting``: jobs and calls that may wait."""
        self._engine, self._max_batch, self._max_waiting, self._report = engine, max_batch, max_waiting, report
        self._queue: deque[Job | _Call] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scone-batches", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises QueueFullError; SconeError once closed."""
        self._put(job)

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` between batches, on the thread that owns the model. Raises as `submit` does."""
        call = _Call(work)
        self._put(call)
        return call.done

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Rows that are being continued."""
        return sum(len(job.rows) for job in tuple(self._running))

    def close(self) -> None:
        """End what runs at its next token, drop what waits, stop the thread."""
        with self._changed:
            self._closed = True
            waiting = list(self._queue)
            self._queue.clear()
            for job in self._running:
                job.cancel()
            self._changed.notify()
        for item in waiting:
            item.done.set_exception(SconeError("the server is shutting down; try again later"))
        self._thread.join()

    def _put(self, item: Job | _Call) -> None:
        with self._changed:
            if self._closed:
                raise SconeError("the server is shutting down; try again later")
            if len(self._queue) >= self._max_waiting:
                raise QueueFullError
            self._queue.append(item)
            self._changed.notify()

    def _work(self) -> None:
        while (items := self._next()) is not None:
            if isinstance(items, _Call):
                _resolve([items.done], items.work)
            elif items:
                _resolve([job.done for job in items], lambda jobs=items: self._run(jobs))  # type: ignore[misc]
            self._running = []

    def _next(self) -> list[Job] | _Call | None:
        """The oldest item, with the jobs that can join it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            first = self._queue.popleft()
            if isinstance(first, _Call):
                return first
            jobs, rows = [first], len(first.rows)
            for other in [item for item in self._queue if isinstance(item, Job)] if first.batch_key else []:
                if other.batch_key == first.batch_key and rows + len(other.rows) <= self._max_batch:
                    self._queue.remove(other)
                    jobs.append(other)
                    rows += len(other.rows)
            self._running = jobs
            return jobs

    def _run(self, jobs: list[Job]) -> None:
        started = time.perf_counter()
        rows = [row for job in jobs for row in job.rows]
        for row in rows:
            if row.is_cancelled:
                row.finish("cancelled", started)
            elif row.deadline is not None and started > row.deadline:
                row.finish("time", started)
        rows = [row for row in rows if row.finish_reason is None]
        seed = jobs[0].seed if jobs[0].seed is not None else secrets.randbits(31)
        with counted_reads(self._engine.model) as reads:
            for first in range(0, len(rows), self._max_batch):  # one request may have more rows than a batch
                self._engine.run(rows[first : first + self._max_batch], replace(jobs[0].options, seed=seed), reads)
        if rows:
            self._report(BatchReport(rows, started, time.perf_counter() - started, reads))


def _resolve(futures: list[Future[Any]], work: Callable[[], Any]) -> None:
    """Give every future what ``work`` returns, or raises: the thread goes on in any case, the requests are told."""
    try:
        result = work()
    except Exception as error:
        for future in futures:
            future.set_exception(error)
    else:
        for future in futures:
            future.set_result(result)
