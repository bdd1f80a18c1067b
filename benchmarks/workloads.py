"""Token ids that training benchmarks read: Wikipedia in GPT-2's tokens, or synthetic ones where it is absent."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import zstandard
from common import shared_data

from scone.tokenization.tokenizers import document_separator_id, load_tokenizer

VOCAB_SIZE = 50_257
SEPARATOR = 50_256
CHARACTERS_AT_ONCE = 4_000_000


def gpt2_tokens(parts: int | None = None, file: str | None = None) -> tuple[np.ndarray, str]:
    """uint16 tokens of the first ``parts`` (None: all) files of Wikipedia, each document ended by a separator, and
    where they come from. ``file``: a .npy file that holds such tokens.
    """
    if file:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        return tokens, Path(file).name
    texts, tokenizer = shared_data("wikipedia"), shared_data("tokenizers", "gpt2")
    if texts is None or tokenizer is None:
        return zipf_tokens(20_000_000), "synthetic: Zipf tokens in repeated phrases"
    paths = sorted(texts.glob("*.jsonl.zst"))[:parts]
    return np.concatenate([_encode(path, tokenizer) for path in paths]), f"Wikipedia, {len(paths)} files"


def zipf_tokens(length: int, seed: int = 0) -> np.ndarray:
    """Tokens by Zipf's law, two thirds of them in phrases of two to six that themselves follow it; uint16 [length]."""
    rng = np.random.default_rng(seed)
    phrases = [rng.zipf(1.15, int(size)) % SEPARATOR for size in rng.integers(2, 7, 400_000)]
    chosen = np.minimum(rng.zipf(1.05, length // 6) - 1, len(phrases) - 1)
    pieces: list[np.ndarray] = []
    for phrase in chosen:
        pieces.append(phrases[phrase])
        pieces.append(rng.zipf(1.15, 2) % SEPARATOR)
    return np.concatenate(pieces)[:length].astype(np.uint16)


def _encode(path: Path, tokenizer_folder: Path) -> np.ndarray:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    separator = document_separator_id(tokenizer)
    assert separator == SEPARATOR, separator
    encoded: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            encoded.append(np.array([*encoding.ids, separator], dtype=np.uint16))
        batch.clear()

    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            batch.append(json.loads(line)["text"])
            if sum(map(len, batch)) > CHARACTERS_AT_ONCE:
                flush()
    flush()
    return np.concatenate(encoded)
