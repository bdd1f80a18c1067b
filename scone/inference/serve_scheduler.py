"""The scheduler of the small server: requests that wait together run as one batch, one batch at a time."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.serve_protocol import RequestError
from scone.inference.streaming import GeneratedSequence, counted_reads

COUNTED = ("batches", "batch_sequences", "generated_tokens", "table_positions", "table_rows", "disconnects")
"""What is counted, for `/metrics`."""


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
    """Runs jobs in batches, in the order in which the oldest of each batch came. Its methods belong to the event loop;
    who holds ``model_lock`` has the model between two batches.
    """

    def __init__(self, engine: SconeInferenceEngine, max_batch: int, max_waiting: int) -> None:
        """``max_batch``: sequences of a batch; ``max_waiting``: jobs that may wait."""
        self._engine, self._max_batch, self._max_waiting = engine, max_batch, max_waiting
        self.waiting: list[GenerationJob] = []
        self.running: list[GenerationJob] = []
        self.model_lock = threading.Lock()
        self.counts: Counter[str] = Counter({f"{name}_total": 0 for name in COUNTED})
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
        now = time.perf_counter()
        sequences = [sequence for job in jobs for sequence in job.sequences if not sequence.has_ended(now)]
        seed = jobs[0].seed if jobs[0].seed is not None else secrets.randbits(31)
        with self.model_lock, counted_reads(self._engine.model) as reads:
            for first in range(0, len(sequences), self._max_batch):  # one request may have more than a batch holds
                batch = sequences[first : first + self._max_batch]
                self._engine.run(batch, replace(jobs[0].options, seed=seed), reads)
                self.counts.update(batches_total=1, batch_sequences_total=len(batch))
        self.counts["generated_tokens_total"] += sum(len(sequence.token_ids) for sequence in sequences)
        if reads is not None:
            self.counts.update(table_positions_total=max(0, reads.num_positions), table_rows_total=reads.num_rows)


def _resolve(jobs: list[GenerationJob], error: Exception | None = None) -> None:
    for job in jobs:
        if error is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(error)
            job.done.exception()  # it counts as seen, also when the client has gone
