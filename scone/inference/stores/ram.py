"""Rows in this process's memory: read and checked once when opened, then independent of the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.stores.page_locked import page_lock
from scone.inference.table_format import TableFile, damaged
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes

_CPU = torch.device("cpu")


class RamStore(RowStore):
    """``num_rows`` rows (default: the rest) from ``first_row`` on, copied to memory and checked while they are read.

    For a CUDA device the memory is page-locked where the system allows it: kernels there read the rows over the bus.
    """

    def __init__(
        self,
        file: TableFile,
        first_row: int = 0,
        num_rows: int | None = None,
        num_threads: int | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails."""
        super().__init__(file.layout.row_format, num_threads)
        self.first_row = first_row
        self.num_rows = file.layout.num_rows - first_row if num_rows is None else num_rows
        self._bytes = load_rows(file, first_row, self.num_rows, self._team.num_threads)
        self._use_matrix(self._bytes)
        self._lock = page_lock(self._bytes, device)

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield self._bytes, (ranks - self.first_row) * self.row_format.row_bytes

    def rows_at_once(self, ranks: Tensor, out: Tensor | None) -> Tensor | None:
        if self._matrix is None or self.first_row:
            return None
        return torch.index_select(self._matrix, 0, ranks, out=out)

    def within_reach(self, device: torch.device) -> list[Tensor] | None:
        if self._lock is None or device.type != "cuda":
            return None
        rows = torch.from_numpy(self._bytes).view(self.num_rows, self.row_format.row_bytes)
        return [rows]

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(ram=self._bytes.nbytes)

    def describe(self) -> str:
        return f"{self.num_rows:,} rows in {'' if self._lock is None else 'page-locked '}RAM"

    def close(self) -> None:
        super().close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._bytes = np.empty(0, dtype=np.uint8)


def load_rows(file: TableFile, first_row: int, num_rows: int, num_threads: int) -> np.ndarray:
    """The bytes of ``num_rows`` rows from ``first_row`` on, uint8 [num_rows · row_bytes], checked chunk by chunk.

    Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails.
    """
    layout, checksums = file.layout, file.checksums()
    size, start = num_rows * layout.row_bytes, first_row * layout.row_bytes
    try:
        rows = np.empty(size, dtype=np.uint8)
    except MemoryError as error:
        raise SconeError(
            f"found too little memory for {human_bytes(size)} of table rows; "
            "use placement mmap or direct, or fewer rows in RAM"
        ) from error
    span, view = layout.checksum_rows * layout.row_bytes, rows.data

    def load(chunk: int) -> None:
        chunk_low, chunk_high = chunk * span, min((chunk + 1) * span, layout.payload_bytes)
        low, high = max(chunk_low, start), min(chunk_high, start + size)
        read_into(file, file.data_start + low, view[low - start : high - start])
        # A chunk is checked whole, also where only a part of it is wanted.
        digest = hashlib.sha256(file.read(file.data_start + chunk_low, low - chunk_low))
        digest.update(view[low - start : high - start])
        digest.update(file.read(file.data_start + high, chunk_high - high))
        if digest.digest() != checksums[chunk]:
            raise _damaged_rows(file, chunk * layout.checksum_rows)

    chunks = range(start // span, -(-(start + size) // span)) if size else ()
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(load, chunks):
            pass
    file.check_unchanged()
    return rows


def check_chunk(file: TableFile, chunk: int, checksum: bytes) -> None:
    """Read a chunk of rows and compare its checksum. Raises SconeError when it differs."""
    layout = file.layout
    first = chunk * layout.checksum_rows
    rows = file.read(
        file.data_start + first * layout.row_bytes,
        min(layout.checksum_rows, layout.num_rows - first) * layout.row_bytes,
    )
    if hashlib.sha256(rows).digest() != checksum:
        raise _damaged_rows(file, first)


def _damaged_rows(file: TableFile, first: int) -> SconeError:
    last = min(first + file.layout.checksum_rows, file.layout.num_rows) - 1
    return damaged(file.path, f"rows {first:,} to {last:,} do not fit their checksum")


def read_into(file: TableFile, offset: int, target: memoryview) -> None:
    """Fill ``target`` from the file. Raises SconeError when it ends early or the disk fails."""
    while len(target):
        try:
            got = os.preadv(file.descriptor, [target], offset)
        except OSError as error:
            raise SconeError(f"cannot read {file.path}: {error.strerror}; check the disk") from error
        if not got:
            raise damaged(file.path, f"it ends at byte {offset:,}")
        offset, target = offset + got, target[got:]
