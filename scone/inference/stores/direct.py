"""Rows read from disk past the page cache: no memory but the batch's own, at the disk's random-read rate."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.table_format import PAGE_BYTES, TableFile, damaged
from scone.kernels.dequantize import gather_bytes
from scone.kernels.direct_read import close_queue, open_queue, plan_pieces, read_pieces, read_pieces_queued
from scone.utils.errors import SconeError

QUEUE_DEPTH = 128
_POLLED_PIECES = 64  # a batch of up to so many reads is polled for, so often that a fast disk has answered by then
_POLLS = 2000
_MAX_THREADS = 32
_BATCH_BYTES = 64 << 20  # a larger batch is read in parts, so that its buffer stays small


class DirectStore(RowStore):
    """Reads each batch's pages with O_DIRECT: without repeats, in file order, neighbours together, many at a time.

    Reads are queued with Linux's asynchronous interface; where there is none, threads read side by side. Where the file
    system refuses O_DIRECT, it warns once and reads through the page cache.
    """

    def __init__(self, file: TableFile, queue_depth: int = QUEUE_DEPTH, use_queues: bool = True) -> None:
        """``queue_depth``: reads under way at a time; ``use_queues=False`` reads on threads in any case."""
        super().__init__(file.layout.row_format)
        self._file = file
        self._descriptor, self.is_direct = _open_direct(file)
        self._queue_depth = queue_depth
        self._queues = _Queues(queue_depth) if use_queues and self.is_direct else None
        self._readers = ThreadPoolExecutor(min(queue_depth, _MAX_THREADS), "scone-read")
        self._buffers = _Buffers()
        self._rows_at_once = max(1, _BATCH_BYTES // (-(-self.row_format.row_bytes // PAGE_BYTES) * PAGE_BYTES))

    def read(self, ranks: Tensor, out: Tensor) -> None:
        wanted, target = ranks.numpy(), out.view(torch.uint8).numpy()
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self._file.layout.num_rows:
            raise IndexError("a rank that is not in the file")
        for part in self._parts(wanted):
            with self._located(wanted[part]) as (source, offsets):
                gather_bytes(source, offsets, target, part, torch.get_num_threads(), self._readers)

    @contextmanager
    def _located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The bytes of these rows: (buffer uint8 [any], offset of each row in it int64 [n]), valid inside."""
        unique, inverse = np.unique(ranks, return_inverse=True)
        pieces, rows = plan_pieces(unique, self._file.data_start, self.row_format.row_bytes)
        buffer = self._buffers.take(_bytes_of(pieces))
        try:
            self._read(pieces, buffer)
            yield buffer, rows[inverse]
        finally:
            self._buffers.give_back(buffer)

    def _parts(self, ranks: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of a large batch, in parts small enough for a buffer; in rank order, so that repeats meet."""
        if 0 < len(ranks) <= self._rows_at_once:
            yield np.arange(len(ranks))
            return
        order = np.argsort(ranks, kind="stable")
        for low in range(0, len(order), self._rows_at_once):
            yield order[low : low + self._rows_at_once]

    def _read(self, pieces: np.ndarray, buffer: np.ndarray) -> None:
        """Fill the buffer. Raises SconeError: the file was changed, ends early, or the disk fails."""
        self._file.check_unchanged()
        queue = self._queues.take() if self._queues is not None else 0
        if queue and self._queues is not None:
            try:
                self._read_queued(queue, pieces, buffer)
            finally:
                self._queues.give_back(queue)
        else:
            parts = np.array_split(pieces, min(self._queue_depth, _MAX_THREADS, len(pieces)))
            for task in [self._readers.submit(self._read_in_turn, part, buffer) for part in parts]:
                task.result()
        self._file.check_unchanged()

    def _read_queued(self, queue: int, pieces: np.ndarray, buffer: np.ndarray) -> None:
        polls = _POLLS if len(pieces) <= _POLLED_PIECES else 0
        failed = read_pieces_queued(
            queue, self._queue_depth, polls, self._descriptor, buffer.ctypes.data, pieces, self._file.file_bytes
        )
        if failed >= 0:
            # Some that came after it may have come well, but a failure is rare: read the rest again, one by one.
            self._read_in_turn(pieces[failed:], buffer)

    def _read_in_turn(self, pieces: np.ndarray, buffer: np.ndarray) -> None:
        try:
            read_pieces(self._descriptor, buffer.data, pieces, self._file.file_bytes)
        except EOFError as error:
            raise damaged(self._file.path, f"it ends early ({error})") from error
        except OSError as error:
            raise SconeError(f"cannot read {self._file.path}: {error.strerror}; check the disk") from error

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(ram=self._buffers.kept_bytes)

    def describe(self) -> str:
        how = "with O_DIRECT" if self.is_direct else "through the page cache"
        return f"{self._file.layout.num_rows:,} rows on disk, read {how}"

    def close(self) -> None:
        self._readers.shutdown()
        if self._queues is not None:
            self._queues.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Buffers:
    """Keeps one page-aligned buffer for the next batch: fresh memory costs a page fault for every row."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: np.ndarray | None = None

    def take(self, size: int) -> np.ndarray:
        with self._lock:
            kept, self._kept = self._kept, None
        return kept if kept is not None and len(kept) >= size else _aligned(size)

    def give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            if self._kept is None or len(self._kept) < len(buffer):
                self._kept = buffer

    @property
    def kept_bytes(self) -> int:
        kept = self._kept
        return 0 if kept is None else kept.nbytes


class _Queues:
    """Queues of asynchronous reads: one for each batch that is being read, kept for the next."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._lock = threading.Lock()
        self._idle: list[int] = []

    def take(self) -> int:
        """A queue that nobody else uses; 0 where the system gives none."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return int(open_queue(self._depth))

    def give_back(self, queue: int) -> None:
        with self._lock:
            self._idle.append(queue)

    def close(self) -> None:
        with self._lock:
            while self._idle:
                close_queue(self._idle.pop())


def _bytes_of(pieces: np.ndarray) -> int:
    """Size of the buffer that a plan's pieces fill."""
    return int(pieces[-1, 1] + pieces[-1, 2])


def _aligned(size: int) -> np.ndarray:
    """A writable buffer of ``size`` bytes that starts on a page, as O_DIRECT needs."""
    return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)


def _open_direct(file: TableFile) -> tuple[int, bool]:
    """A descriptor of the same open file for direct reads, and whether it is direct. Warns where it cannot be."""
    same_file = f"/proc/self/fd/{file.descriptor}"  # not by path: another file may have that name by now
    try:
        descriptor = os.open(same_file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(descriptor, [_aligned(PAGE_BYTES).data], 0)
            return descriptor, True
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        warnings.warn(
            f"the file system of {file.path} refuses direct reads ({error.strerror}): reading through the page cache",
            RuntimeWarning,
            stacklevel=2,
        )
    descriptor = os.dup(file.descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False
