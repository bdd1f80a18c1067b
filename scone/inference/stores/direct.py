"""Rows read from disk past the page cache: no memory but the batch's own, at the disk's random-read rate."""

from __future__ import annotations

import mmap
import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores import RowStore, StoreMemory
from scone.inference.table_format import PAGE_BYTES, TableFile, damaged
from scone.kernels.dequantize import close_queue, gather_bytes, open_queue, plan_pieces, read_pieces, read_pieces_queued
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

    def __init__(self, file: TableFile) -> None:
        super().__init__(file.layout.row_format)
        self._file = file
        self._descriptor, self.is_direct = _open_direct(file)
        self._queue_depth, self._use_queues = QUEUE_DEPTH, self.is_direct
        self._readers = ThreadPoolExecutor(_MAX_THREADS, "scone-read")
        # what one batch used is kept for the next: a queue takes time to open, fresh memory costs a page fault a row
        self._idle_queues: list[int] = []
        self._idle_buffers: deque[np.ndarray] = deque(maxlen=1)
        self._rows_at_once = max(1, _BATCH_BYTES // (-(-self.row_format.row_bytes // PAGE_BYTES) * PAGE_BYTES))

    def read(self, ranks: Tensor, out: Tensor) -> None:
        wanted, target = ranks.numpy(), out.view(torch.uint8).numpy()
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self._file.layout.num_rows:
            raise IndexError("a rank that is not in the file")
        order = np.arange(len(wanted))
        if len(wanted) > self._rows_at_once:  # in parts small enough for a buffer; in rank order, so that repeats meet
            order = np.argsort(wanted, kind="stable")
        for low in range(0, len(order), self._rows_at_once):
            part = order[low : low + self._rows_at_once]
            unique, inverse = np.unique(wanted[part], return_inverse=True)
            pieces, rows = plan_pieces(unique, self._file.layout.data_start, self.row_format.row_bytes)
            buffer = self._buffer(int(pieces[-1, 1] + pieces[-1, 2]))
            self._file.check_unchanged()
            self._fill(buffer, pieces)
            self._file.check_unchanged()
            gather_bytes(buffer, rows[inverse], target, part, torch.get_num_threads(), self._readers)
            self._idle_buffers.append(buffer)

    def _buffer(self, size: int) -> np.ndarray:
        """A buffer that nobody else uses, uint8 [≥ size]."""
        with suppress(IndexError):
            if len(kept := self._idle_buffers.pop()) >= size:
                return kept
        return _aligned(size)

    def _fill(self, buffer: np.ndarray, pieces: np.ndarray) -> None:
        """Read all ``pieces``. Raises SconeError: the file ends early, or the disk fails."""
        queue = self._queue() if self._use_queues else 0
        if not queue:
            parts = np.array_split(pieces, min(_MAX_THREADS, len(pieces)))
            for task in [self._readers.submit(self._read_in_turn, part, buffer) for part in parts]:
                task.result()
            return
        polls = _POLLS if len(pieces) <= _POLLED_PIECES else 0
        address, size = buffer.ctypes.data, self._file.layout.file_bytes
        failed = read_pieces_queued(queue, self._queue_depth, polls, self._descriptor, address, pieces, size)
        self._idle_queues.append(queue)
        if failed >= 0:
            # Some that came after it may have come well, but a failure is rare: read the rest again, one by one.
            self._read_in_turn(pieces[failed:], buffer)

    def _queue(self) -> int:
        """A queue of asynchronous reads that nobody else uses; 0 where there is none."""
        try:
            return self._idle_queues.pop()
        except IndexError:
            return int(open_queue(self._queue_depth))

    def _read_in_turn(self, pieces: np.ndarray, buffer: np.ndarray) -> None:
        try:
            read_pieces(self._descriptor, buffer.data, pieces, self._file.layout.file_bytes)
        except EOFError as error:
            raise damaged(self._file.path, f"it ends early ({error})") from error
        except OSError as error:
            raise SconeError(f"cannot read {self._file.path}: {error.strerror}; check the disk") from error

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(ram=sum(buffer.nbytes for buffer in self._idle_buffers))

    def describe(self) -> str:
        how = "with O_DIRECT" if self.is_direct else "through the page cache"
        return f"{self._file.layout.num_rows:,} rows on disk, read {how}"

    def close(self) -> None:
        self._readers.shutdown()
        while self._idle_queues:
            close_queue(self._idle_queues.pop())
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


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
