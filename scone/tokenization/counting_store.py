"""Where the keyed blocks of a count live between passes: in memory, or in files of a work folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from scone.kernels import ngram_count
from scone.tokenization.counting_memory import page_array
from scone.tokenization.counting_plan import CountingPlan

_MAGIC = 0x53434F4E45424C4B
_HEADER_WORDS = 8


@dataclass(frozen=True)
class Block:
    """The n-grams of one block of L positions: the partition of each position, and remainders ordered by partition.

    parts uint16 [L]; offsets int64 [P + 1]; remainders uint32 or uint64 [>= offsets[P]].
    """

    parts: np.ndarray
    offsets: np.ndarray
    remainders: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Remainders in memory of partitions ``first … first + len(starts) - 1``: block share b of partition first + p is
    ``remainders[starts[p, b]:stops[p, b]]``. ``complete`` is False where more pieces of one partition follow.
    """

    first: int
    remainders: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    complete: bool


class BlockStore(Protocol):
    """What counting needs of a store. Levels replace each other: writing a block at one level drops it at the last."""

    def level_of(self, block: int) -> int:
        """The level that the block is stored at; 0 when it is not."""

    def read(self, level: int, block: int, dtype: np.dtype) -> Block:
        """The block as written; its arrays are valid until the same thread reads or makes room again."""

    def room(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        """Arrays to write the block of the next level into, before ``write``."""

    def write(self, level: int, block: int, content: Block) -> None:
        """Keep what was written into ``room``. Raises OSError."""

    def last_remainder(self, level: int, block: int, dtype: np.dtype) -> tuple[int, int] | None:
        """(partition, remainder) of the n-gram that ends at the block's last position; None when none does."""

    def pieces(self, level: int, first: int, last: int, num_partitions: int, dtype: np.dtype) -> Iterator[Piece]:
        """The remainders of partitions ``first:last`` over all blocks, in pieces of the plan's ``group_bytes``."""

    def release_buffers(self) -> None:
        """Give up the buffers of all threads: between passes, counting needs the memory."""

    def partition_sizes(self, level: int, num_partitions: int) -> np.ndarray:
        """How many n-grams each partition has over all blocks, int64 [P]."""


def block_length(plan: CountingPlan, block: int) -> int:
    """Positions of a block."""
    return min(plan.block_positions, plan.num_positions - block * plan.block_positions)


class MemoryStore:
    """Blocks in two arrays, each level over the one before in place: 6 (or 10) bytes a position."""

    def __init__(self, plan: CountingPlan) -> None:
        self._plan = plan
        self._parts = page_array(plan.num_positions, np.uint16)
        self._bytes = page_array(plan.num_positions * plan.remainder_bytes, np.uint8)
        self._offsets: list[np.ndarray] = [np.zeros(1, np.int64)] * plan.num_blocks
        self._levels = [0] * plan.num_blocks

    def level_of(self, block: int) -> int:
        return self._levels[block]

    def read(self, level: int, block: int, dtype: np.dtype) -> Block:
        assert self._levels[block] == level, (self._levels[block], level)
        return self._views(block, self._offsets[block], dtype)

    def room(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        return self._views(block, np.empty(num_partitions + 1, np.int64), dtype)

    def _views(self, block: int, offsets: np.ndarray, dtype: np.dtype) -> Block:
        start, length = block * self._plan.block_positions, block_length(self._plan, block)
        first = start * self._plan.remainder_bytes
        remainders = self._bytes[first : first + length * dtype.itemsize].view(dtype)
        return Block(self._parts[start : start + length], offsets, remainders)

    def write(self, level: int, block: int, content: Block) -> None:
        self._offsets[block] = content.offsets
        self._levels[block] = level

    def release_buffers(self) -> None:
        return

    def last_remainder(self, level: int, block: int, dtype: np.dtype) -> tuple[int, int] | None:
        content = self.read(level, block, dtype)
        part = int(content.parts[-1])
        if part == ngram_count.NO_PARTITION:
            return None
        return part, int(content.remainders[content.offsets[part + 1] - 1])

    def pieces(self, level: int, first: int, last: int, num_partitions: int, dtype: np.dtype) -> Iterator[Piece]:
        offsets = np.stack(self._offsets, axis=1)
        stride = self._plan.block_positions * self._plan.remainder_bytes // dtype.itemsize
        bases = np.arange(self._plan.num_blocks) * stride
        flat = self._bytes[: self._bytes.size // dtype.itemsize * dtype.itemsize].view(dtype)
        yield Piece(first, flat, offsets[first:last] + bases, offsets[first + 1 : last + 1] + bases, True)

    def partition_sizes(self, level: int, num_partitions: int) -> np.ndarray:
        return np.sum([np.diff(offsets) for offsets in self._offsets], axis=0)


class FileStore:
    """Blocks in one file each, named by level and block; a file with its final name is complete.

    File: 8 words of 64 bits (magic, level, positions, partitions, n-grams, bytes a remainder, checksum, 0), offsets,
    remainders, parts; little-endian as the machine. It lives for one count on one machine.
    """

    def __init__(self, plan: CountingPlan, folder: Path) -> None:
        """Find the blocks that an interrupted count left in ``folder``; those that are damaged are dropped."""
        self._plan = plan
        self._folder = folder
        self._buffers = threading.local()
        self._levels = [0] * plan.num_blocks
        for path in sorted(folder.glob("block-*.bin")):  # sorted: a higher level of the same block comes later
            _, number, level = path.stem.split("-")
            block = int(number)
            if self._levels[block]:
                self._path(self._levels[block], block).unlink()
            if _is_whole(path):
                self._levels[block] = int(level)
            else:
                path.unlink()
                self._levels[block] = 0
        for path in folder.glob("*.part"):
            path.unlink()

    def _path(self, level: int, block: int) -> Path:
        return self._folder / f"block-{block:08d}-{level:03d}.bin"

    def level_of(self, block: int) -> int:
        return self._levels[block]

    def read(self, level: int, block: int, dtype: np.dtype) -> Block:
        with self._path(level, block).open("rb", buffering=0) as file:
            header = _read_exactly(file.fileno(), np.empty(_HEADER_WORDS, np.int64), 0)
            offsets = np.empty(header[3] + 1, np.int64)
            remainders = self._buffer("read-remainders", int(header[4]), dtype)
            parts = self._buffer("read-parts", int(header[2]), np.dtype(np.uint16))
            position = header.nbytes
            for array in (offsets, remainders, parts):
                _read_exactly(file.fileno(), array, position)
                position += array.nbytes
        return Block(parts, offsets, remainders)

    def room(self, block: int, num_partitions: int, dtype: np.dtype) -> Block:
        length = block_length(self._plan, block)
        return Block(
            self._buffer("write-parts", length, np.dtype(np.uint16)),
            np.empty(num_partitions + 1, np.int64),
            self._buffer("write-remainders", length, dtype),
        )

    def _buffer(self, name: str, length: int, dtype: np.dtype) -> np.ndarray:
        """An array of this thread that the next call under the same name takes again."""
        buffer = getattr(self._buffers, name, None)
        if buffer is None:
            item_bytes = 2 if dtype.itemsize == 2 else self._plan.remainder_bytes
            buffer = page_array(self._plan.block_positions * item_bytes, np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer[: length * dtype.itemsize].view(dtype)

    def release_buffers(self) -> None:
        self._buffers = threading.local()

    def write(self, level: int, block: int, content: Block) -> None:
        used = content.remainders[: content.offsets[-1]]
        body = (content.offsets, used, content.parts)
        checksum = _checksum(body)
        item_bytes = used.dtype.itemsize
        header = np.array(
            [_MAGIC, level, len(content.parts), len(content.offsets) - 1, len(used), item_bytes, checksum, 0], np.uint64
        )
        path = self._path(level, block)
        temporary = path.with_suffix(".part")
        try:
            with temporary.open("wb", buffering=0) as file:
                for array in (header, *body):
                    _write_exactly(file.fileno(), array)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if self._levels[block]:
            self._path(self._levels[block], block).unlink()
        self._levels[block] = level

    def last_remainder(self, level: int, block: int, dtype: np.dtype) -> tuple[int, int] | None:
        with self._path(level, block).open("rb", buffering=0) as file:
            number = file.fileno()
            header = _read_exactly(number, np.empty(_HEADER_WORDS, np.int64), 0)
            parts_at = 8 * (_HEADER_WORDS + int(header[3]) + 1) + int(header[4]) * dtype.itemsize
            part = int(_read_exactly(number, np.empty(1, np.uint16), parts_at + 2 * (int(header[2]) - 1))[0])
            if part == ngram_count.NO_PARTITION:
                return None
            end = int(_read_exactly(number, np.empty(1, np.int64), 8 * (_HEADER_WORDS + part + 1))[0])
            at = 8 * (_HEADER_WORDS + int(header[3]) + 1) + (end - 1) * dtype.itemsize
            return part, int(_read_exactly(number, np.empty(1, dtype), at)[0])

    def pieces(self, level: int, first: int, last: int, num_partitions: int, dtype: np.dtype) -> Iterator[Piece]:
        offsets = np.empty((self._plan.num_blocks, last - first + 1), np.int64)
        for block in range(self._plan.num_blocks):
            with self._path(level, block).open("rb", buffering=0) as file:
                _read_exactly(file.fileno(), offsets[block], 8 * (_HEADER_WORDS + first))
        sizes = (offsets[:, -1] - offsets[:, 0]) * dtype.itemsize
        block = 0
        while block < self._plan.num_blocks:
            stop, total = block, 0
            while stop < self._plan.num_blocks and (stop == block or total + sizes[stop] <= self._plan.group_bytes):
                total += sizes[stop]
                stop += 1
            complete = block == 0 and stop == self._plan.num_blocks
            yield self._piece(level, first, num_partitions, dtype, offsets[block:stop], block, complete)
            block = stop

    def _piece(
        self,
        level: int,
        first: int,
        num_partitions: int,
        dtype: np.dtype,
        offsets: np.ndarray,
        first_block: int,
        complete: bool,
    ) -> Piece:
        lengths = offsets[:, -1] - offsets[:, 0]
        ends = np.cumsum(lengths)
        flat = page_array(int(ends[-1]), dtype)
        for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            at = 8 * (_HEADER_WORDS + num_partitions + 1) + int(offsets[row, 0]) * dtype.itemsize
            with self._path(level, first_block + row).open("rb", buffering=0) as file:
                _read_exactly(file.fileno(), flat[end - length : end], at)
        shifted = (offsets - offsets[:, :1] + (ends - lengths)[:, None]).T
        return Piece(first, flat, np.ascontiguousarray(shifted[:-1]), np.ascontiguousarray(shifted[1:]), complete)

    def partition_sizes(self, level: int, num_partitions: int) -> np.ndarray:
        total = np.zeros(num_partitions, np.int64)
        for block in range(self._plan.num_blocks):
            with self._path(level, block).open("rb", buffering=0) as file:
                offsets = np.empty(num_partitions + 1, np.int64)
                total += np.diff(_read_exactly(file.fileno(), offsets, 8 * _HEADER_WORDS))
        return total


def _checksum(body: tuple[np.ndarray, ...]) -> int:
    total = 0
    for array in body:
        words = array.view(np.uint64) if array.dtype == np.int64 else array
        total = (total * 31 + int(ngram_count.checksum_words(words, 0))) % 2**64
    return total


def _is_whole(path: Path) -> bool:
    """Whether a block file is as it was written (a machine that lost power may leave names without their data)."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8 * _HEADER_WORDS:
            return False
        header = _read_exactly(file.fileno(), np.empty(_HEADER_WORDS, np.uint64), 0)
        positions, partitions, n_grams, item_bytes = (int(word) for word in header[2:6])
        if header[0] != _MAGIC or item_bytes not in (4, 8):
            return False
        if size != 8 * (_HEADER_WORDS + partitions + 1) + n_grams * item_bytes + 2 * positions:
            return False
        body = (
            np.empty(partitions + 1, np.int64),
            np.empty(n_grams, np.uint32 if item_bytes == 4 else np.uint64),
            np.empty(positions, np.uint16),
        )
        at = 8 * _HEADER_WORDS
        for array in body:
            _read_exactly(file.fileno(), array, at)
            at += array.nbytes
        return _checksum(body) == int(header[6])


def _read_exactly(descriptor: int, array: np.ndarray, position: int) -> np.ndarray:
    view = memoryview(cast(Any, array)).cast("B") if array.size else memoryview(b"")
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], position + done)
        if got == 0:
            raise OSError(f"a work file ended at byte {position + done}, before byte {position + len(view)}")
        done += got
    return array


def _write_exactly(descriptor: int, array: np.ndarray) -> None:
    view = memoryview(cast(Any, np.ascontiguousarray(array))).cast("B") if array.size else memoryview(b"")
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
