"""Documents to token ids on all cores, in order, with bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from scone.data.token_file import token_type
from scone.tokenization.tokenizers import one_thread_per_call, vocabulary_size
from scone.utils.errors import library_refusal
from scone.utils.threads import map_in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# One call encodes at most this much at once: the tokenizers library keeps some 100 bytes a token until it returns.
LONGEST_TEXT_CHARACTERS = 1 << 20
_BOUNDARY = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class CorpusEncoder:
    """Encodes documents without special tokens, truncation or padding, whatever the tokenizer is set to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        self.dtype = token_type(vocabulary_size(tokenizer))
        self._slow = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None
        if backend is not None:
            self._fast = Tokenizer.from_str(backend.to_str())  # a copy, so that the caller's settings stay
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint16 or uint32; texts above 1 Mi characters go through ``short_pieces``.

        Raises SconeError where the tokenizer refuses a text: one without a token for what it does not know.
        """
        with library_refusal("the tokenizer refuses a text of the corpus", "give it an unk_token, or give another one"):
            if sum(map(len, texts)) <= LONGEST_TEXT_CHARACTERS:
                return self._encode(texts)
            return [np.concatenate([self._encode([piece])[0] for piece in short_pieces(text)]) for text in texts]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return [
            np.array(self._slow.encode(text, add_special_tokens=False, truncation=False, verbose=False), self.dtype)
            for text in texts
        ]

    def encode_batches(
        self, batches: Iterable[tuple[list[str], T]], num_threads: int
    ) -> Iterator[tuple[list[np.ndarray], T]]:
        """``encode`` of each batch's texts, with what came with the batch, in order; a few batches are under way."""
        with one_thread_per_call():
            yield from map_in_order(lambda batch: (self.encode(batch[0]), batch[1]), batches, num_threads)


def short_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of about 1 Mi characters, cut before single spaces or after single line ends where it can.

    There the usual pre-tokenizers cut too, so that the pieces' tokens are the whole text's.
    """
    start = 0
    while len(text) - start > LONGEST_TEXT_CHARACTERS:
        middle = start + LONGEST_TEXT_CHARACTERS // 2
        match = _BOUNDARY.search(text, middle, start + LONGEST_TEXT_CHARACTERS)
        end = match.start() if match else start + LONGEST_TEXT_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
