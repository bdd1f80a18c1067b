"""The corpus while it is counted: token arrays read in pieces, and its blocks of n-grams in memory or in files."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from scone.tokenization.counting.plan import CountingPlan
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


_HEADER_BYTES = 128  # of a one-dimensional `.npy` file, whatever its length


def page_array(length: int, dtype: np.dtype | type) -> np.ndarray:
    """Zeros [length] on pages of their own, in large pages where the system has them.

    They go back to the system the moment they are dropped. The C allocator keeps freed pieces of up to 32 MiB for
    itself: a budget of 32 MiB was overrun by 58 % through that alone.
    """
    dtype = np.dtype(dtype)
    if not length:
        return np.empty(0, dtype)
    pages = mmap.mmap(-1, length * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without large pages; small ones do as well, only slower
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype)


@dataclass(frozen=True)
class Block:
    """The n-grams of one block of L positions: the partition of each position, and remainders ordered by partition.

    parts uint16 [L]; offsets int64 [P + 1]; remainders uint32 or uint64 [>= offsets[P]].
    """

    parts: np.ndarray
    offsets: np.ndarray
    remainders: np.ndarray


@dataclass(frozen=True)
class PartitionChunk:
    """Remainders in memory of partitions ``first … first + len(starts) - 1``: block share b of partition first + p is
    ``remainders[starts[p, b]:stops[p, b]]``. ``complete`` is False where more pieces of one partition follow.
    """

    first: int
    remainders: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    complete: bool


class MemoryBlocks:
    """Blocks in two arrays, each level over the one before in place: 6 (or 10) bytes a position.

    What counting needs of blocks: ``read`` one as it was written, make ``room`` for its next level, ``write`` what was
    put there; then ``partition_sizes`` and the remainders of some partitions over all blocks, in ``pieces``.
    """

    def __init__(self, plan: CountingPlan) -> None:
        self._plan = plan
        self._parts = page_array(plan.num_positions, np.uint16)
        self._bytes = page_array(plan.num_positions * plan.remainder_bytes, np.uint8)
        self._offsets: list[np.ndarray] = [np.zeros(1, np.int64)] * plan.num_blocks

    def read(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        """The block as it was written; valid until the same thread reads or makes room again."""
        assert len(self._offsets[block]) == num_partitions + 1
        return self._views(block, self._offsets[block], dtype)

    def room(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        """Arrays to put the block's next level into."""
        return self._views(block, np.empty(num_partitions + 1, np.int64), dtype)

    def _views(self, block: int, offsets: np.ndarray, dtype: np.dtype) -> Block:
        start, length = self._plan.span(block)
        first = start * self._plan.remainder_bytes
        remainders = self._bytes[first : first + length * dtype.itemsize].view(dtype)
        return Block(self._parts[start : start + length], offsets, remainders)

    def write(self, block: int, content: Block) -> None:
        """Keep what was put into ``room``; what the block was before is gone."""
        self._offsets[block] = content.offsets

    def partition_sizes(self, num_partitions: int) -> np.ndarray:
        """How many n-grams each partition has over all blocks, int64 [P]."""
        return np.sum([np.diff(offsets) for offsets in self._offsets], axis=0)

    def pieces(self, first: int, last: int, num_partitions: int, dtype: np.dtype) -> Iterator[PartitionChunk]:
        """The remainders of partitions ``first:last``, all at once."""
        offsets = np.stack(self._offsets, axis=1)
        stride = self._plan.block_positions * self._plan.remainder_bytes // dtype.itemsize
        bases = np.arange(self._plan.num_blocks) * stride
        flat = self._bytes[: self._bytes.size // dtype.itemsize * dtype.itemsize].view(dtype)
        yield PartitionChunk(first, flat, offsets[first:last] + bases, offsets[first + 1 : last + 1] + bases, True)


class FileBlocks:
    """As `MemoryBlocks`, each block in three `.npy` files that the next level overwrites. They do not outlive a count.

    They are read and written, not mapped: pages of a mapped file count as memory of this process.
    """

    def __init__(self, plan: CountingPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._buffers = threading.local()  # which end with the threads of a pass

    def read(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        offsets = self._load(block, "offsets", np.empty(num_partitions + 1, np.int64))
        return Block(
            self._load(block, "parts", self._buffer("old parts", self._plan.span(block)[1], np.dtype(np.uint16))),
            offsets,
            self._load(block, "remainders", self._buffer("old remainders", int(offsets[-1]), dtype)),
        )

    def room(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        length = self._plan.span(block)[1]
        return Block(
            self._buffer("new parts", length, np.dtype(np.uint16)),
            np.empty(num_partitions + 1, np.int64),
            self._buffer("new remainders", length, dtype),
        )

    def _buffer(self, name: str, length: int, dtype: np.dtype) -> np.ndarray:
        """An array of this thread that the next call under the same name takes again."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None:
            item_bytes = 2 if dtype.itemsize == 2 else self._plan.remainder_bytes
            buffer = page_array(self._plan.block_positions * item_bytes, np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer[: length * dtype.itemsize].view(dtype)

    def write(self, block: int, content: Block) -> None:
        """Raises OSError where the disk is full."""
        self._store(block, "parts", content.parts)
        self._store(block, "offsets", content.offsets)
        self._store(block, "remainders", content.remainders[: content.offsets[-1]])

    def partition_sizes(self, num_partitions: int) -> np.ndarray:
        total = np.zeros(num_partitions, np.int64)
        for block in range(self._plan.num_blocks):
            total += np.diff(self._load(block, "offsets", np.empty(num_partitions + 1, np.int64)))
        return total

    def pieces(self, first: int, last: int, num_partitions: int, dtype: np.dtype) -> Iterator[PartitionChunk]:
        """The remainders of partitions ``first:last``, in pieces of at most the plan's ``group_bytes``."""
        offsets = np.empty((self._plan.num_blocks, last - first + 1), np.int64)
        for block in range(self._plan.num_blocks):
            self._load(block, "offsets", offsets[block], first)
        sizes = (offsets[:, -1] - offsets[:, 0]) * dtype.itemsize
        block = 0
        while block < self._plan.num_blocks:
            stop, total = block, 0
            while stop < self._plan.num_blocks and (stop == block or total + sizes[stop] <= self._plan.group_bytes):
                total += sizes[stop]
                stop += 1
            complete = block == 0 and stop == self._plan.num_blocks
            yield self._piece(first, dtype, offsets[block:stop], block, complete)
            block = stop

    def _piece(
        self, first: int, dtype: np.dtype, offsets: np.ndarray, first_block: int, complete: bool
    ) -> PartitionChunk:
        lengths = offsets[:, -1] - offsets[:, 0]
        ends = np.cumsum(lengths)
        flat = page_array(int(ends[-1]), dtype)
        for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            self._load(first_block + row, "remainders", flat[end - length : end], int(offsets[row, 0]))
        shifted = (offsets - offsets[:, :1] + (ends - lengths)[:, None]).T
        return PartitionChunk(
            first, flat, np.ascontiguousarray(shifted[:-1]), np.ascontiguousarray(shifted[1:]), complete
        )

    def _path(self, block: int, name: str) -> Path:
        return self._folder / f"{block:08d}-{name}.npy"

    def _store(self, block: int, name: str, array: np.ndarray) -> None:
        """As `numpy.save`, which does not say why it could not write."""
        with self._path(block, name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            assert file.tell() == _HEADER_BYTES, file.tell()
            file.write(array.data)

    def _load(self, block: int, name: str, array: np.ndarray, first: int = 0) -> np.ndarray:
        """Fill ``array`` with the elements of a file from ``first`` on."""
        if array.size:
            with self._path(block, name).open("rb") as file:
                file.seek(_HEADER_BYTES + first * array.itemsize)
                if file.readinto(cast(Any, array).view(np.uint8)) != array.nbytes:
                    raise OSError(f"{self._path(block, name)} was cut by somebody else")
        return array
