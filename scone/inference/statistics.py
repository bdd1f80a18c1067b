"""What generating took: latencies, speed, rows read from the table, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from scone.utils.text import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN_REQUESTS = 20


@dataclass(frozen=True)
class RequestStats:
    """One sequence's share. Both times are seconds since the call began, waiting for other prompts included."""

    num_prompt_tokens: int
    num_new_tokens: int
    first_token_seconds: float | None
    seconds: float


@dataclass
class TableReads:
    """Positions that were looked up, ``num_padding`` of padding not counted, and rows that were read for them."""

    num_padding: int = 0
    counts: list[torch.Tensor] = field(default_factory=list, repr=False)
    """Positions and rows, int64 ``[2]``, in parts to be added up: an accelerator is waited for when it is asked."""

    @property
    def num_positions(self) -> int:
        """Positions that were looked up."""
        return sum(int(part[0]) for part in self.counts) - self.num_padding

    @property
    def num_rows(self) -> int:
        """Rows that were read."""
        return sum(int(part[1]) for part in self.counts)


@dataclass(frozen=True)
class GenerationStats:
    """What a call of `generate` took. ``reads`` is None without a table; ``accelerator_bytes`` (the peak) without an
    accelerator.
    """

    requests: tuple[RequestStats, ...]
    num_prompt_tokens: int
    seconds: float
    model_bytes: int
    table_bytes: int
    reads: TableReads | None = None
    process_bytes: int | None = None
    accelerator_bytes: int | None = None

    @property
    def num_new_tokens(self) -> int:
        """Of all sequences."""
        return sum(one.num_new_tokens for one in self.requests)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return self.num_new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """A small report, several lines."""
        lines = [
            f"{len(self.requests)} sequence(s), {self.num_prompt_tokens} prompt tokens, "
            f"{self.num_new_tokens} new tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s"
        ]
        for number, one in enumerate(self.requests[:SHOWN_REQUESTS], 1):
            first = one.first_token_seconds
            after = "" if first is None else f"first after {1000 * first:.0f} ms, "
            tokens = f"{one.num_prompt_tokens} prompt tokens, {one.num_new_tokens} new"
            lines.append(f"  [{number}] {tokens}: {after}all after {one.seconds:.2f} s")
        if len(self.requests) > SHOWN_REQUESTS:
            lines.append(f"  … and {len(self.requests) - SHOWN_REQUESTS} more")
        if self.reads is not None:
            rows, positions = self.reads.num_rows, self.reads.num_positions
            matched = f"an f-gram ended at {rows / max(positions, 1):.1%}"
            lines.append(f"table reads: {rows:,} rows for {positions:,} positions: {matched}")
        memory = {"model": self.model_bytes, "table": self.table_bytes, "process": self.process_bytes}
        memory["accelerator peak"] = self.accelerator_bytes
        held = [f"{name} {human_bytes(size)}" for name, size in memory.items() if size is not None]
        return "\n".join([*lines, "memory: " + ", ".join(held)])


@contextmanager
def counted_reads(model: PreTrainedModel) -> Iterator[TableReads | None]:
    """Count what ``model`` looks up in its table inside the block (known at its end); None for one without a table."""
    layer = getattr(model, "table_embedding", None)
    if layer is None:
        yield None
        return
    reads, before = TableReads(), layer.reads()
    try:
        yield reads
    finally:
        reads.counts += [after - earlier for after, earlier in zip(layer.reads(), before, strict=True)]
