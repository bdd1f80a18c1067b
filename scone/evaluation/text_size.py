"""How much text tokens stand for: bytes and words, counted from the tokenizer's vocabulary, without decoding."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a byte-level vocabulary writes tab, line feed, vertical tab, form feed, carriage return and space
WHITESPACE = frozenset(chr(256 + byte) for byte in (9, 10, 11, 12, 13, 32))


@dataclass(frozen=True)
class TextSize:
    """Size of a text: UTF-8 bytes, and words, which are runs without ASCII whitespace."""

    num_bytes: int
    num_words: int


def text_size(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> TextSize | None:
    """Bytes and words of the text that ``tokens`` [n] encode. Special tokens have no bytes, and end a word.

    None where the tokenizer is not byte-level: then decoding does not give the text back exactly.

    Reference implementation: ``len(text.encode())`` and ``len(text.split())`` of the decoded text between special
    tokens (for a text whose only whitespace is ASCII).
    """
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return None
    # A byte-level token's characters stand for one byte each, so the text need not be put together.
    special = set(tokenizer.all_special_ids)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    size = max(vocabulary) + 1
    num_bytes, inner_words = np.zeros(size, np.int64), np.zeros(size, np.int64)
    begins_word, ends_word = np.zeros(size, bool), np.zeros(size, bool)
    for index, token in vocabulary.items():
        if index in special or not token:
            continue
        blank = [character in WHITESPACE for character in token]
        num_bytes[index] = len(token)
        begins_word[index], ends_word[index] = not blank[0], not blank[-1]
        inner_words[index] = sum(before and not here for before, here in pairwise(blank))
    ids = np.asarray(tokens)
    starts = begins_word[ids]
    starts[1:] &= ~ends_word[ids[:-1]]
    return TextSize(int(num_bytes[ids].sum()), int(inner_words[ids].sum() + starts.sum()))


def sizes_of(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> dict[str, Any]:
    """``num_bytes`` and ``num_words`` as `perplexity` takes them; None where `text_size` is."""
    size = text_size(tokenizer, tokens)
    return {"num_bytes": size.num_bytes if size else None, "num_words": size.num_words if size else None}
