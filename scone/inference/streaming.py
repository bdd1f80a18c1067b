"""Sequences while they are being continued (new tokens become text, limits are kept, any can be called off), and what
that took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from scone.utils.text import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length", "cancelled"]
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
        wants_text: keep the new text in ``text``, also without ``stop`` and ``on_text``.

    After it was run: ``token_ids`` are the new tokens (with the end-of-text token), ``finish_reason`` says why it
    ended; ``first_token_at`` is a `time.perf_counter` time.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    on_text: Callable[[str], None] | None = None
    wants_text: bool = False
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    is_cancelled: bool = False
    _pieces: TextPieces | None = None
    _held_back: str = ""

    def cancel(self) -> None:
        """End it at the next token; may be called from any thread."""
        self.is_cancelled = True

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
            self.finish("stop")
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish("length")
        elif self.is_cancelled:
            self.finish("cancelled")

    def finish(self, reason: FinishReason) -> None:
        """End it, for whatever reason; one that has ended stays as it is."""
        if self.finish_reason is None and self._pieces is not None:
            self._write(self._pieces.rest(), last=True)
        if self.finish_reason is None:
            self.finish_reason = reason

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
            self.finish_reason = "stop"


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


@dataclass(frozen=True)
class GenerationStats:
    """What a call of `generate` took. ``first_token_seconds``: until every sequence had one (None with beams);
    ``reads``: positions looked up (padding not counted) and rows read for them, None without a table;
    ``accelerator_bytes``: the peak, None without an accelerator.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    first_token_seconds: float | None
    seconds: float
    model_bytes: int
    table_bytes: int
    reads: tuple[int, int] | None = None
    process_bytes: int | None = None
    accelerator_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return self.num_new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """A small report, several lines."""
        first = self.first_token_seconds
        lines = [
            f"{self.num_prompt_tokens} prompt tokens, {self.num_new_tokens} new tokens in {self.seconds:.2f} s"
            + ("" if first is None else f", the first after {1000 * first:.0f} ms")
            + f": {self.tokens_per_second:.1f} tokens/s"
        ]
        if self.reads is not None:
            positions, rows = self.reads
            matched = f"an f-gram ended at {rows / max(positions, 1):.1%}"
            lines.append(f"table reads: {rows:,} rows for {positions:,} positions: {matched}")
        memory = {"model": self.model_bytes, "table": self.table_bytes, "process": self.process_bytes}
        memory["accelerator peak"] = self.accelerator_bytes
        held = [f"{name} {human_bytes(size)}" for name, size in memory.items() if size is not None]
        return "\n".join([*lines, "memory: " + ", ".join(held)])


def table_reads(model: PreTrainedModel) -> Tensor:
    """What ``model`` looked up in its table so far, if it has one: positions, padding too, and rows, int64 ``[2]``."""
    layer: Any = getattr(model, "table_embedding", None)
    counts = torch.zeros(2, dtype=torch.int64)
    return counts if layer is None else sum((part.cpu() for part in layer.reads()), counts)
