"""Rows read from disk past the page cache: no memory but the batch's own, at the disk's random-read rate."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.table_format import PAGE_BYTES, TableFile, damaged
from scone.kernels.direct_read import read_pieces, reference_read
from scone.utils.errors import SconeError

QUEUE_DEPTH = 32
_PIECE_PAGES = 32  # longest single read, in pages: long enough for full bandwidth, short enough to share among threads
_BATCH_BYTES = 64 << 20  # a larger batch is read in parts, so that its buffer stays small
_PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class ReadPlan:
    """What to read for a batch: pieces of whole pages, and where each row will lie in the buffer. All int64.

    ``offsets``, ``sizes``, ``targets`` [m]: bytes of each piece in the file and in the buffer. ``rows`` [n]: where in
    the buffer each row starts. ``buffer_bytes``: its size.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    buffer_bytes: int


def plan_reads(ranks: np.ndarray, data_start: int, row_bytes: int) -> ReadPlan:
    """The page-aligned pieces that hold the rows ``ranks`` (int64 [n], n ≥ 1, strictly ascending).

    Rows on the same or neighbouring pages share a run; a run longer than 128 KiB is cut into pieces.
    """
    start = data_start + ranks * row_bytes
    first, last = start // PAGE_BYTES, (start + row_bytes - 1) // PAGE_BYTES
    is_new = np.concatenate(([True], first[1:] > last[:-1] + 1))
    run_of_row = np.cumsum(is_new) - 1
    run_first = first[is_new]
    run_pages = last[np.append(np.flatnonzero(is_new)[1:], len(ranks)) - 1] - run_first + 1
    run_target = np.cumsum(run_pages) - run_pages
    rows = (run_target - run_first)[run_of_row] * PAGE_BYTES + start
    num_pieces = -(-run_pages // _PIECE_PAGES)
    run_of_piece = np.repeat(np.arange(len(run_pages)), num_pieces)
    page_in_run = (np.arange(len(run_of_piece)) - (np.cumsum(num_pieces) - num_pieces)[run_of_piece]) * _PIECE_PAGES
    return ReadPlan(
        offsets=(run_first[run_of_piece] + page_in_run) * PAGE_BYTES,
        sizes=np.minimum(run_pages[run_of_piece] - page_in_run, _PIECE_PAGES) * PAGE_BYTES,
        targets=(run_target[run_of_piece] + page_in_run) * PAGE_BYTES,
        rows=rows,
        buffer_bytes=int(run_pages.sum()) * PAGE_BYTES,
    )


@dataclass(frozen=True)
class _Batch:
    """Rows fetched ahead: unique sorted ranks, each one's place in the buffer, and the buffer once it is read."""

    ranks: np.ndarray
    rows: np.ndarray
    buffer: Future[np.ndarray]

    def find(self, ranks: np.ndarray) -> np.ndarray | None:
        """Where these rows are in the buffer; None unless all of them are here and reading has not failed."""
        if self.buffer.done() and self.buffer.exception():
            return None
        place = np.minimum(np.searchsorted(self.ranks, ranks), len(self.ranks) - 1)
        return self.rows[place] if np.array_equal(self.ranks[place], ranks) else None


class DirectStore(RowStore):
    """Reads each batch's pages with O_DIRECT: without repeats, in file order, neighbours together, many at a time.

    Where the file system refuses O_DIRECT it warns once and reads through the page cache.
    """

    def __init__(self, file: TableFile, num_threads: int | None = None, queue_depth: int = QUEUE_DEPTH) -> None:
        """``queue_depth``: reads under way at a time, each on a thread of its own that does not hold Python's lock."""
        super().__init__(file.layout.row_format, num_threads)
        self._file = file
        self._descriptor, self.is_direct = _open_direct(file)
        self._queue_depth = queue_depth
        self._readers = ThreadPoolExecutor(queue_depth, "scone-read")
        self._prefetcher = ThreadPoolExecutor(1, "scone-prefetch")
        self._prefetched: deque[_Batch] = deque(maxlen=_PREFETCHED_BATCHES)
        self._buffers = _Buffers()
        self._rows_at_once = max(1, _BATCH_BYTES // (-(-self.row_format.row_bytes // PAGE_BYTES) * PAGE_BYTES))

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in tuple(self._prefetched):
            rows = batch.find(ranks)
            if rows is not None:
                yield batch.buffer.result(), rows
                return
        unique, inverse = np.unique(ranks, return_inverse=True)
        plan = plan_reads(unique, self._file.data_start, self.row_format.row_bytes)
        buffer = self._buffers.take(plan.buffer_bytes)
        try:
            self._read(plan, buffer)
            yield buffer, plan.rows[inverse]
        finally:
            self._buffers.give_back(buffer)

    def rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        for part in self._parts(ranks):
            super().rows_into(ranks[part], out, part if targets is None else targets[part])

    def raw_rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        for part in self._parts(ranks):
            super().raw_rows_into(ranks[part], out, part if targets is None else targets[part])

    def _parts(self, ranks: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of a large batch, in parts small enough for a buffer; in rank order, so that repeats meet."""
        if len(ranks) <= self._rows_at_once:
            yield np.arange(len(ranks))
            return
        order = np.argsort(ranks, kind="stable")
        for low in range(0, len(order), self._rows_at_once):
            yield order[low : low + self._rows_at_once]

    def prefetch(self, ranks: np.ndarray) -> None:
        """Read these rows in the background. A later batch of which all are among them takes them from memory.

        The last two such batches are kept; one of more than 64 MiB is not fetched ahead.
        """
        unique = np.unique(ranks)
        if 0 < len(unique) <= self._rows_at_once:
            plan = plan_reads(unique, self._file.data_start, self.row_format.row_bytes)
            self._prefetched.append(_Batch(unique, plan.rows, self._prefetcher.submit(self._fetch, plan)))

    def _fetch(self, plan: ReadPlan) -> np.ndarray:
        buffer = _aligned(plan.buffer_bytes)
        self._read(plan, buffer)
        return buffer

    def _read(self, plan: ReadPlan, buffer: np.ndarray) -> None:
        """Fill the buffer. Raises SconeError: the file was changed, ends early, or the disk fails."""
        self._file.check_unchanged()
        needed = np.minimum(plan.sizes, self._file.layout.file_bytes - plan.offsets)
        parts = min(self._queue_depth, len(plan.offsets))
        cuts = [len(plan.offsets) * part // parts for part in range(parts + 1)]
        if parts == 1:
            self._read_some(plan, buffer, needed, 0, cuts[1])
        else:
            tasks = [
                self._readers.submit(self._read_some, plan, buffer, needed, cuts[part], cuts[part + 1])
                for part in range(parts)
            ]
            for task in tasks:
                task.result()
        self._file.check_unchanged()

    def _read_some(self, plan: ReadPlan, buffer: np.ndarray, needed: np.ndarray, low: int, high: int) -> None:
        while low < high:
            pieces = [array[low:high] for array in (plan.offsets, plan.sizes, plan.targets, needed)]
            failed = read_pieces(self._descriptor, buffer.ctypes.data, *pieces)
            if failed < 0:
                return
            low += failed
            try:
                reference_read(self._descriptor, buffer.data, *(array[failed : failed + 1] for array in pieces))
            except EOFError as error:
                raise damaged(self._file.path, f"it ends early ({error})") from error
            except OSError as error:
                raise SconeError(f"cannot read {self._file.path}: {error.strerror}; check the disk") from error
            low += 1

    @property
    def memory(self) -> StoreMemory:
        fetched = [batch.buffer for batch in tuple(self._prefetched)]
        ready = [buffer.result().nbytes for buffer in fetched if buffer.done() and not buffer.exception()]
        return StoreMemory(ram=self._buffers.kept_bytes + sum(ready))

    def describe(self) -> str:
        how = "with O_DIRECT" if self.is_direct else "through the page cache"
        return f"{self._file.layout.num_rows:,} rows on disk, read {how}"

    def close(self) -> None:
        self._prefetcher.shutdown()
        self._readers.shutdown()
        super().close()
        self._prefetched.clear()
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
