"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scone.inference.serve_batching import Batcher, BatchReport

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("scone_requests", "Requests answered", ["endpoint", "status"], registry=self._registry)
        self._request_seconds = Histogram(
            "scone_request_seconds",
            "Until the answer, or a stream's beginning",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "scone_first_token_seconds", "From a batch's start to its rows' first tokens", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "scone_batch_rows", "Rows of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self._prompt_tokens = Counter("scone_prompt_tokens", "Prompt tokens read", registry=self._registry)
        self._new_tokens = Counter("scone_generated_tokens", "Tokens generated", registry=self._registry)
        self._positions = Counter("scone_table_positions", "Positions looked up", registry=self._registry)
        self._rows = Counter("scone_table_rows", "Table rows read", registry=self._registry)
        self._generation_seconds = Counter("scone_generation_seconds", "Time spent on batches", registry=self._registry)
        self.disconnects = Counter(
            "scone_disconnects", "Clients that left before their answer", registry=self._registry
        )

    def watch(self, batcher: Batcher) -> None:
        """Show the batcher's queue and what runs."""
        waiting = Gauge("scone_waiting_requests", "Requests in the queue", registry=self._registry)
        waiting.set_function(lambda: batcher.num_waiting)
        running = Gauge("scone_running_rows", "Rows being continued", registry=self._registry)
        running.set_function(lambda: batcher.num_running)

    def note_request(self, endpoint: str, status: int, seconds: float) -> None:
        """An answer was given (a stream: begun)."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def note_batch(self, batch: BatchReport) -> None:
        """A batch was run."""
        self._batch_rows.observe(len(batch.rows))
        self._generation_seconds.inc(batch.seconds)
        self._prompt_tokens.inc(sum(len(row.prompt_ids) for row in batch.rows))
        self._new_tokens.inc(sum(len(row.token_ids) for row in batch.rows))
        for row in batch.rows:
            if row.first_token_at is not None:
                self._first_token.observe(max(0.0, row.first_token_at - batch.started))
        if batch.reads is not None:
            self._positions.inc(max(0, batch.reads.num_positions))
            self._rows.inc(batch.reads.num_rows)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
