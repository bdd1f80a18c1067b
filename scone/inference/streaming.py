"""Sequences while they are being continued (new tokens become text, limits are kept, any can be called off), and what
that took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from scone.utils.text import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length", "cancelled", "time"]
_CONTEXT_TOKENS = 8  # tokens of the prompt that decide how the first new one is written (a space before it, or none)
_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are not a whole character yet


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, special ones left out, spaces as they come: cleaned up, earlier text would change."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextPieces:
    """Tokens to text, piece by piece: the pieces together are what decoding all tokens at once adds to the prompt.

    A character whose bytes lie in several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that ``token`` completes, maybe none."""
        self._ids.append(token)
        piece = self._unread()
        return "" if not piece or piece.endswith(_INCOMPLETE) else self._take(piece)

    def rest(self) -> str:
        """What is left at the end: bytes that never became a character."""
        return self._take(self._unread())

    def _unread(self) -> str:
        known = decode(self._tokenizer, self._ids[self._start : self._read])
        return decode(self._tokenizer, self._ids[self._start :])[len(known) :]

    def _take(self, piece: str) -> str:
        self._start, self._read = self._read, len(self._ids)
        return piece


@dataclass
class GeneratedSequence:
    """One prompt being continued.

    Args:
        prompt_ids: its tokens.
        max_new_tokens: at most so many more.
        stop: strings that end the text before them.
        on_text: called with each new piece of text, on the thread that generates; it must not block.
        deadline: `time.perf_counter` time after which it ends with what there is.

        wants_text: keep the new text in ``text``, also without ``stop`` and ``on_text``.

    After it was run: ``token_ids`` are the new tokens (with the end-of-text token), ``finish_reason`` says why it
    ended; ``first_token_at`` and ``finished_at`` are `time.perf_counter` times.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    on_text: Callable[[str], None] | None = None
    wants_text: bool = False
    deadline: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    _cancelled: bool = False
    _pieces: TextPieces | None = None
    _held_back: str = ""

    def cancel(self) -> None:
        """End it at the next token; may be called from any thread."""
        self._cancelled = True

    def has_ended(self, now: float) -> bool:
        """Whether it is over, by itself, by its deadline or because somebody called it off."""
        if self._cancelled:
            self.finish("cancelled", now)
        elif self.deadline is not None and now > self.deadline:
            self.finish("time", now)
        return self.finish_reason is not None

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Get ready to receive tokens."""
        if self.wants_text or self.stop or self.on_text is not None:
            self._pieces = TextPieces(tokenizer, self.prompt_ids)

    def add(self, token: int, ends: set[int], now: float) -> None:
        """Receive the next token; ``ends`` are the end-of-text tokens. What comes after the end is ignored."""
        if self.finish_reason is not None:
            return
        self.token_ids.append(token)
        if self.first_token_at is None:
            self.first_token_at = now
        if self._pieces is not None and token not in ends:
            self._write(self._pieces.add(token))  # may end it at a stop string; then the rest changes nothing
        if token in ends:
            self.finish("stop", now)
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish("length", now)
        else:
            self.has_ended(now)

    def finish(self, reason: FinishReason, now: float) -> None:
        """End it, for whatever reason; one that has ended stays as it is."""
        if self.finish_reason is None and self._pieces is not None:
            self._write(self._pieces.rest(), last=True)
        if self.finish_reason is None:
            self.finish_reason, self.finished_at = reason, now

    def _write(self, piece: str, last: bool = False) -> None:
        """Pass text on, up to a stop string; hold back what may be the beginning of one."""
        fresh = self._held_back + piece
        found = [place for place in (fresh.find(stop) for stop in self.stop) if place >= 0]
        if found:
            fresh, self._held_back = fresh[: min(found)], ""
        else:
            kept = 0 if last else _start_of_stop(fresh, self.stop)
            fresh, self._held_back = fresh[: len(fresh) - kept], fresh[len(fresh) - kept :]
        self.text += fresh
        if fresh and self.on_text is not None:
            self.on_text(fresh)
        if found:
            self.finish_reason, self.finished_at = "stop", time.perf_counter()


def _start_of_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins one of ``stops``, which ``text`` does not contain."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


class SequenceStoppingCriteria(StoppingCriteria):
    """Hands each sequence its new tokens after every step, and tells ``generate`` which sequences are done.

    Not for beam search, whose sequences change places.
    """

    def __init__(self, sequences: Sequence[GeneratedSequence], ends: set[int], width: int) -> None:
        """``width``: columns of the padded prompts."""
        self._sequences = sequences
        self._ends = ends
        self._seen = width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool [B]: the sequences that are done."""
        fresh = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        now = time.perf_counter()
        for sequence, tokens in zip(self._sequences, fresh, strict=True):
            for token in tokens:
                sequence.add(token, self._ends, now)
        done = [sequence.finish_reason is not None for sequence in self._sequences]
        return torch.tensor(done, device=input_ids.device)


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
