"""How much text tokens stand for: UTF-8 bytes and words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sizes_of(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> dict[str, Any]:
    """``num_bytes`` and ``num_words`` (runs without ASCII whitespace) of the text that ``tokens`` [n] encode.

    Special tokens have no bytes, and end a word. None where the tokenizer is not byte-level, whose decoding does not
    give the text back exactly.
    """
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return {"num_bytes": None, "num_words": None}
    ids = np.asarray(tokens)
    num_bytes = num_words = 0
    for part in np.split(ids, np.flatnonzero(np.isin(ids, tokenizer.all_special_ids))):
        text = backend.decode(part.tolist(), skip_special_tokens=True).encode("utf-8")
        num_bytes, num_words = num_bytes + len(text), num_words + len(text.split())
    return {"num_bytes": num_bytes, "num_words": num_words}
