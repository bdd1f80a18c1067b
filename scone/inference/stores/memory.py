"""Rows in memory: copied there and checked (`ram`), once for all processes of a machine (`shared`), in the mapped file
(`mmap`), or on the accelerator.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores import RowStore, StoreMemory
from scone.inference.table_format import PAGE_BYTES, TableFile, damaged
from scone.kernels.common import pin, to_device
from scone.utils.errors import SconeError
from scone.utils.files import is_at
from scone.utils.progress import map_in_order
from scone.utils.text import human_bytes


class MemoryStore(RowStore):
    """Rows from ``first_row`` on in one array of bytes. Use `ram` or `mapped`."""

    def __init__(self, file: TableFile, content: np.ndarray, first_row: int, mapping: mmap.mmap | None) -> None:
        super().__init__(file.layout.row_format)
        row = self.row_format
        self._file, self._first_row, self._mapping, self._bytes = file, first_row, mapping, content
        self._unpin: weakref.finalize | None = None
        self._give_back: weakref.finalize | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody will write
            self._rows = (
                torch.from_numpy(content).view(row.storage_dtype).view(len(content) // row.row_bytes, row.storage_width)
            )

    @classmethod
    def ram(
        cls, file: TableFile, first_row: int, num_rows: int, device: torch.device, is_shared: bool = False
    ) -> MemoryStore:
        """``num_rows`` rows from ``first_row`` on, copied and checked now, then independent of the file.

        ``is_shared``: one copy for all processes of this machine that ask for one, see `shared_rows`. For a CUDA device
        the memory is pinned where the system allows it: kernels there read the rows over the bus.
        Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails.
        """
        if is_shared and num_rows:
            rows, give_back = shared_rows(file, first_row, num_rows)
            store = cls(file, rows, first_row, None)
            store._give_back = weakref.finalize(store, give_back)
        else:
            rows = load_rows(file, first_row, num_rows)
            store = cls(file, rows, first_row, None)
        if device.type == "cuda" and rows.nbytes:
            store._unpin = pin(store, rows.ctypes.data, rows.nbytes, device)
        return store

    @classmethod
    def mapped(cls, file: TableFile) -> MemoryStore:
        """The whole file, mapped read-only and shared.

        Before every batch its size is checked, since a page that was cut off would kill the process; after it, whether
        anybody wrote to it.
        """
        mapping = mmap.mmap(file.descriptor, file.layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        # Rows are read here and there: reading ahead around each would only fill memory with neighbours.
        mapping.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapping, np.uint8, file.layout.payload_bytes, file.layout.data_start)
        return cls(file, rows, 0, mapping)

    def read(self, ranks: Tensor, out: Tensor) -> None:
        # index_select checks the ranks itself: for one row, a check of ours would take longer than the read.
        if self._first_row:
            ranks = ranks - self._first_row
        if self._mapping is not None:
            self._file.check_size()
        torch.index_select(self._rows, 0, ranks, out=out)
        if self._mapping is not None:
            self._file.check_unchanged()

    def gpu_blocks(self, device: torch.device) -> list[Tensor]:
        return [] if self._unpin is None or device.type != "cuda" else [self._rows.view(torch.uint8)]

    def prefetch(self, ranks: Tensor) -> None:
        """Ask the system to read the pages of these rows; it returns at once and reads in the background."""
        if self._mapping is None or not len(ranks):
            return
        self._file.check_unchanged()
        first = np.unique(ranks.numpy()) * self.row_format.row_bytes + self._file.layout.data_start
        low, high = first // PAGE_BYTES, (first + self.row_format.row_bytes - 1) // PAGE_BYTES + 1
        starts = np.flatnonzero(np.concatenate(([True], low[1:] > high[:-1])))
        ends = np.append(starts[1:], len(low)) - 1
        for start, end in zip((low[starts] * PAGE_BYTES).tolist(), (high[ends] * PAGE_BYTES).tolist(), strict=True):
            self._mapping.madvise(mmap.MADV_WILLNEED, start, min(end, len(self._mapping)) - start)

    @property
    def memory(self) -> StoreMemory:
        size = self._bytes.nbytes
        return StoreMemory(ram=size) if self._mapping is None else StoreMemory(mapped=size)

    def describe(self) -> str:
        kind = f"in {'shared ' if self._give_back else ''}{'pinned ' if self._unpin else ''}RAM"
        return f"{len(self._rows):,} rows {kind if self._mapping is None else 'memory-mapped'}"

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._rows, self._bytes = self.new_rows(0), np.empty(0, np.uint8)
        if self._give_back is not None:
            self._give_back()
        if self._mapping is not None:
            self._mapping.close()


def load_rows(file: TableFile, first_row: int, num_rows: int, rows: np.ndarray | None = None) -> np.ndarray:
    """The bytes of ``num_rows`` rows from ``first_row`` on, uint8 [num_rows · row_bytes], checked chunk by chunk.

    ``rows``: where they go, if not into new memory.

    Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails.
    """
    layout, checksums = file.layout, file.checksums()
    data_start = layout.data_start
    size, start = num_rows * layout.row_bytes, first_row * layout.row_bytes
    try:
        rows = np.empty(size, dtype=np.uint8) if rows is None else rows
    except MemoryError as error:
        raise SconeError(
            f"found too little memory for {human_bytes(size)} of table rows; "
            "use placement mmap or direct, or fewer rows in RAM"
        ) from error
    span, view = layout.checksum_rows * layout.row_bytes, rows.data

    def load(chunk: int) -> None:
        chunk_low, chunk_high = chunk * span, min((chunk + 1) * span, layout.payload_bytes)
        low, high = max(chunk_low, start), min(chunk_high, start + size)
        file.read_into(data_start + low, view[low - start : high - start])
        # A chunk is checked whole, also where only a part of it is wanted.
        digest = hashlib.sha256(file.read(data_start + chunk_low, low - chunk_low))
        digest.update(view[low - start : high - start])
        digest.update(file.read(data_start + high, chunk_high - high))
        if digest.digest() != checksums[chunk]:
            rows_of = range(chunk * layout.checksum_rows, min((chunk + 1) * layout.checksum_rows, layout.num_rows))
            raise damaged(file.path, f"rows {rows_of[0]:,} to {rows_of[-1]:,} do not fit their checksum")

    chunks = range(start // span, -(-(start + size) // span)) if size else ()
    deque(map_in_order(load, chunks, torch.get_num_threads()), maxlen=0)
    file.check_unchanged()
    return rows


class DeviceStore(RowStore):
    """``num_rows`` rows from ``first_row`` on, copied to ``device`` and checked on the way."""

    def __init__(self, file: TableFile, device: torch.device, first_row: int, num_rows: int) -> None:
        """Raises SconeError: a chunk does not fit its checksum, or the accelerator has too little memory."""
        super().__init__(file.layout.row_format)
        self._first_row, row_bytes = first_row, self.row_format.row_bytes
        try:
            self._rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise SconeError(
                f"found too little memory on {device} for {human_bytes(num_rows * row_bytes)} of table rows; "
                "use a smaller gpu:N"
            ) from error
        step = max(1, (256 << 20) // row_bytes)
        for low in range(0, num_rows, step):
            count = min(step, num_rows - low)
            part = load_rows(file, first_row + low, count)
            self._rows[low : low + count] = torch.from_numpy(part).view(count, row_bytes)

    def read(self, ranks: Tensor, out: Tensor) -> None:
        places = ranks - self._first_row
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(self._rows):
            raise IndexError("a rank that is not on the device")  # a kernel there would end the process
        rows = self._rows.index_select(0, to_device(places, self._rows.device))
        out.view(torch.uint8).copy_(rows)

    def gpu_blocks(self, device: torch.device) -> list[Tensor]:
        return [self._rows] if device == self._rows.device else []

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(device=self._rows.nbytes)

    def describe(self) -> str:
        return f"{len(self._rows):,} rows on {self._rows.device}"

    def close(self) -> None:
        self._rows = self._rows.new_empty(0)


FOLDER = Path("/dev/shm")


def shared_rows(file: TableFile, first_row: int, num_rows: int) -> tuple[np.ndarray, Callable[[], None]]:
    """The bytes of ``num_rows`` rows from ``first_row`` on, uint8, and what gives them back.

    Whoever comes first loads them, the others wait for that, and the last one removes them. Each holds a lock, which
    ends with its process however that ends: so what nobody holds was left by processes that were killed, and the next
    one removes it. Raises SconeError as `load_rows` does, and where there is too little shared memory.
    """
    size, checksum = num_rows * file.layout.row_bytes, file.layout.rows_checksum
    remove_unused()
    path = FOLDER / f"scone-{os.getuid()}-{checksum[:32]}-{first_row}-{num_rows}"
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SconeError(
                f"cannot open shared memory {path}: {error.strerror}; use placement mmap, or ram for a copy of its own"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_full(descriptor, size):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not _is_full(descriptor, size):  # else somebody did while we waited for the lock
                    _make_room(descriptor, path, size)
                    array = np.frombuffer(mmap.mmap(descriptor, size + 1), np.uint8)
                    load_rows(file, first_row, num_rows, array[:size])
                    array[size] = 1
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            rows = np.frombuffer(mmap.mmap(descriptor, size + 1), np.uint8)[:size]
        except BaseException:
            _give_back(descriptor, path)
            raise
        if is_at(descriptor, path):  # else its last reader removed it between two of our locks
            return rows, partial(_give_back, descriptor, path)
        os.close(descriptor)


def _is_full(descriptor: int, size: int) -> bool:
    """Whether rows were filled in to their end: a byte of 1 behind them says so."""
    return os.pread(descriptor, 1, size) == b"\1"


def _make_room(descriptor: int, path: Path, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size + 1)  # else a page that is not there would kill the process
    except OSError as error:
        raise SconeError(
            f"found too little shared memory for {human_bytes(size)} of table rows in {path.parent}: {error.strerror}; "
            "give a container more (--ipc host or --shm-size), or use placement mmap"
        ) from error


def _give_back(descriptor: int, path: Path) -> None:
    """End to hold it; remove it where nobody else does."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def remove_unused() -> None:
    """Those of this user that no process holds."""
    for path in FOLDER.glob(f"scone-{os.getuid()}-*"):
        with suppress(OSError):
            _give_back(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path)
