"""Token arrays of several corpora as one run of positions, read in pieces without growing resident memory."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from scone.utils.errors import SconeError


class TokenStream:
    """Corpora one after another, with one empty position between neighbours, so that no n-gram crosses a corpus.

    A corpus is a 1-D integer array. A memory-mapped one (``numpy.memmap``) is read from its file instead of through the
    mapping, because pages read through a mapping count as this process's memory.
    """

    def __init__(self, corpora: Sequence[np.ndarray], vocab_size: int) -> None:
        """Raises SconeError for an array that is not 1-D or not of integers."""
        self.vocab_size = vocab_size
        self._corpora = [corpus for corpus in map(_checked, range(len(corpora)), corpora) if corpus.size]
        self._starts: list[int] = []
        self.num_positions = 0
        for corpus in self._corpora:
            self._starts.append(self.num_positions)
            self.num_positions += corpus.size + 1
        self.num_positions = max(0, self.num_positions - 1)
        self.num_tokens = sum(corpus.size for corpus in self._corpora)

    def read(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The tokens of positions ``start:stop`` as pairs (position, unsigned array); empty positions are left out."""
        which = bisect.bisect_right(self._starts, start) - 1
        while which < len(self._corpora) and self._starts[which] < stop:
            corpus, first = self._corpora[which], self._starts[which]
            low, high = max(start - first, 0), min(stop - first, corpus.size)
            if low < high:
                yield first + low, self._unsigned(_read(corpus, low, high), which, low)
            which += 1

    def refuse(self, position: int) -> None:
        """Raise the SconeError for a token that is not in the vocabulary, found at ``position``."""
        which = bisect.bisect_right(self._starts, position) - 1
        index = position - self._starts[which]
        token = int(_read(self._corpora[which], index, index + 1)[0])
        raise SconeError(
            f"found token {token} at index {index} of corpus {which}; expected tokens 0 … {self.vocab_size - 1}; "
            "count with the vocab_size of the tokenizer that made the corpus"
        )

    def _unsigned(self, tokens: np.ndarray, which: int, index: int) -> np.ndarray:
        if tokens.dtype.kind == "u" and tokens.dtype.itemsize <= 4:
            return tokens
        outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if len(outside):
            self.refuse(self._starts[which] + index + int(outside[0]))
        return tokens.astype(np.uint32)


def _checked(index: int, corpus: np.ndarray) -> np.ndarray:
    corpus = np.asanyarray(corpus)
    if corpus.ndim != 1 or (corpus.dtype.kind not in "iu" and corpus.size):
        raise SconeError(
            f"found corpus {index} with shape {corpus.shape} and type {corpus.dtype}; expected a 1-D array of "
            "integers; give token ids"
        )
    return corpus


def _read(corpus: np.ndarray, start: int, stop: int) -> np.ndarray:
    """``corpus[start:stop]``, from the file where the array maps one."""
    offset = file_offset(corpus)
    if offset is None:
        return np.asarray(corpus[start:stop])
    assert isinstance(corpus, np.memmap)
    with open(str(corpus.filename), "rb", buffering=0) as file:
        file.seek(offset + start * corpus.dtype.itemsize)
        pieces = np.empty(stop - start, corpus.dtype)
        view = memoryview(cast(Any, pieces)).cast("B")
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise SconeError(f"found {corpus.filename} shorter than when it was opened; write it again and recount")
            done += got
    return pieces


def file_offset(corpus: np.ndarray) -> int | None:
    """Where in its file the first element of a memory-mapped array lies; None for any other array."""
    if not isinstance(corpus, np.memmap) or corpus.filename is None or not corpus.flags.c_contiguous:
        return None
    whole: np.ndarray = corpus
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    assert isinstance(whole, np.memmap)
    return int(whole.offset) + corpus.ctypes.data - whole.ctypes.data
