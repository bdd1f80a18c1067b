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
    """One prompt's share. Both times are seconds since the call began, waiting for other prompts included."""

    num_prompt_tokens: int
    num_new_tokens: int
    first_token_seconds: float | None
    seconds: float


@dataclass
class TableReads:
    """Positions that were looked up (padding not counted) and rows that were read for them.

    Attributes: ``num_padding``, positions looked up that are padding.
    """

    num_padding: int = 0
    _counts: list[torch.Tensor] = field(default_factory=list, repr=False)

    def add(self, counts: list[torch.Tensor]) -> None:
        """Count positions and rows, int64 ``[2]``, in parts that are to be added up."""
        self._counts += counts

    # an accelerator that counted is waited for when it is asked, and not in each step

    @property
    def num_positions(self) -> int:
        """Positions that were looked up."""
        return sum(int(part[0]) for part in self._counts) - self.num_padding

    @property
    def num_rows(self) -> int:
        """Rows that were read."""
        return sum(int(part[1]) for part in self._counts)

    @property
    def hit_rate(self) -> float:
        """Share of positions at which an f-gram ended."""
        return self.num_rows / self.num_positions if self.num_positions else 0.0


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
        firsts = [one.first_token_seconds for one in self.requests if one.first_token_seconds is not None]
        if firsts:
            lines[0] += f", first token after {1000 * min(firsts):.0f} ms"
        if len(self.requests) > 1:
            lines += [_request_line(*item) for item in enumerate(self.requests[:SHOWN_REQUESTS], 1)]
        if len(self.requests) > SHOWN_REQUESTS:
            lines.append(f"  … and {len(self.requests) - SHOWN_REQUESTS} more")
        if self.reads is not None:
            lines.append(
                f"table reads: {self.reads.num_rows:,} rows for {self.reads.num_positions:,} positions: "
                f"an f-gram ended at {self.reads.hit_rate:.1%}"
            )
        memory = [f"model {human_bytes(self.model_bytes)}", f"table {human_bytes(self.table_bytes)}"]
        if self.process_bytes is not None:
            memory.append(f"process {human_bytes(self.process_bytes)}")
        if self.accelerator_bytes is not None:
            memory.append(f"accelerator peak {human_bytes(self.accelerator_bytes)}")
        return "\n".join([*lines, "memory: " + ", ".join(memory)])


def _request_line(number: int, request: RequestStats) -> str:
    first = "" if request.first_token_seconds is None else f"first after {1000 * request.first_token_seconds:.0f} ms, "
    return (
        f"  [{number}] {request.num_prompt_tokens} prompt tokens, {request.num_new_tokens} new: "
        f"{first}all after {request.seconds:.2f} s"
    )


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
        reads.add([after - earlier for after, earlier in zip(layer.reads(), before, strict=True)])
