"""Rows in a memory-mapped file: one copy for all processes of a machine, as much of it in RAM as the system spares."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.table_format import PAGE_BYTES, TableFile


class MmapStore(RowStore):
    """The whole file, mapped read-only and shared.

    Before every batch its size is checked, since a page that was cut off would kill the process; after it, whether
    anybody wrote to it.
    """

    def __init__(self, file: TableFile, num_threads: int | None = None) -> None:
        super().__init__(file.layout.row_format, num_threads)
        self._file = file
        self._map = mmap.mmap(file.descriptor, file.layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        # Rows are read here and there: reading ahead around each would only fill memory with neighbours.
        self._map.madvise(mmap.MADV_RANDOM)
        layout = file.layout
        self._bytes = np.frombuffer(self._map, np.uint8, layout.payload_bytes, file.data_start)
        self._use_matrix(self._bytes)

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self._file.check_size()
        yield self._bytes, ranks * self.row_format.row_bytes
        self._file.check_unchanged()

    def rows_at_once(self, ranks: Tensor, out: Tensor | None) -> Tensor | None:
        if self._matrix is None:
            return None
        self._file.check_size()
        rows = torch.index_select(self._matrix, 0, ranks, out=out)
        self._file.check_unchanged()
        return rows

    def prefetch(self, ranks: np.ndarray) -> None:
        """Ask the system to read the pages of these rows; it returns at once and reads in the background."""
        if not len(ranks):
            return
        self._file.check_unchanged()
        first = np.unique(ranks) * self.row_format.row_bytes + self._file.data_start
        low, high = first // PAGE_BYTES, (first + self.row_format.row_bytes - 1) // PAGE_BYTES + 1
        starts = np.flatnonzero(np.concatenate(([True], low[1:] > high[:-1])))
        ends = np.append(starts[1:], len(low)) - 1
        for start, end in zip((low[starts] * PAGE_BYTES).tolist(), (high[ends] * PAGE_BYTES).tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, start, min(end, len(self._map)) - start)

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(mapped=self._file.layout.payload_bytes)

    def describe(self) -> str:
        return f"{self._file.layout.num_rows:,} rows memory-mapped"

    def close(self) -> None:
        super().close()
        self._bytes = np.empty(0, dtype=np.uint8)
        self._map.close()
