"""Rows in this process's memory: read and checked once when opened, then independent of the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.table_format import TableFile, damaged
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes


class RamStore(RowStore):
    """The first ``num_rows`` rows (all by default), copied to memory and checked while they are read."""

    def __init__(self, file: TableFile, num_rows: int | None = None, num_threads: int | None = None) -> None:
        """Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails."""
        super().__init__(file.layout.row_format, num_threads)
        self.num_rows = file.layout.num_rows if num_rows is None else min(num_rows, file.layout.num_rows)
        self._bytes = load_rows(file, self.num_rows, self._team.num_threads)

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield self._bytes, ranks * self.row_format.row_bytes

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(ram=self._bytes.nbytes)

    def describe(self) -> str:
        return f"{self.num_rows:,} rows in RAM"

    def close(self) -> None:
        super().close()
        self._bytes = np.empty(0, dtype=np.uint8)


def load_rows(file: TableFile, num_rows: int, num_threads: int) -> np.ndarray:
    """The bytes of the first ``num_rows`` rows, uint8 [num_rows · row_bytes], checked chunk by chunk.

    Raises SconeError: a chunk does not fit its checksum, the memory is not there, the disk fails.
    """
    layout, checksums = file.layout, file.checksums()
    size = num_rows * layout.row_bytes
    try:
        rows = np.empty(size, dtype=np.uint8)
    except MemoryError as error:
        raise SconeError(
            f"found too little memory for {human_bytes(size)} of table rows; "
            "use placement mmap or direct, or fewer rows in RAM"
        ) from error
    span = layout.checksum_rows * layout.row_bytes
    view = rows.data

    def load(chunk: int) -> None:
        low, high = chunk * span, min((chunk + 1) * span, size)
        read_into(file, file.data_start + low, view[low:high])
        digest = hashlib.sha256(view[low:high])
        chunk_end = min((chunk + 1) * span, layout.payload_bytes)
        digest.update(file.read(file.data_start + high, chunk_end - high))  # the rest of a chunk that is cut
        if digest.digest() != checksums[chunk]:
            raise damaged(file.path, f"rows from {chunk * layout.checksum_rows:,} on do not fit their checksum")

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(load, range(-(-size // span) if size else 0)):
            pass
    file.check_unchanged()
    return rows


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
