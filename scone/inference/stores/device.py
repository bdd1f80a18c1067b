"""Rows on the accelerator, as they are stored: decoded there when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory, decode_rows
from scone.inference.stores.ram import load_rows
from scone.inference.table_format import TableFile
from scone.kernels.transfer import to_device
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes


class DeviceStore(RowStore):
    """``num_rows`` rows from ``first_row`` on, copied to ``device`` and checked on the way."""

    def __init__(self, file: TableFile, device: torch.device, first_row: int = 0, num_rows: int | None = None) -> None:
        """Raises SconeError: a chunk does not fit its checksum, or the accelerator has too little memory."""
        super().__init__(file.layout.row_format)
        self.first_row = first_row
        self.num_rows = file.layout.num_rows - first_row if num_rows is None else num_rows
        self._device = device
        size = self.num_rows * self.row_format.row_bytes
        try:
            self._rows = torch.empty(self.num_rows, self.row_format.row_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise SconeError(
                f"found too little memory on {device} for {human_bytes(size)} of table rows; use a smaller gpu:N"
            ) from error
        step = max(1, (256 << 20) // self.row_format.row_bytes)
        for low in range(0, self.num_rows, step):
            count = min(step, self.num_rows - low)
            part = load_rows(file, first_row + low, count, self._team.num_threads)
            self._rows[low : low + count] = torch.from_numpy(part).view(count, self.row_format.row_bytes)

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        raw = self.raw_rows(ranks)
        yield raw.numpy().reshape(-1), np.arange(len(ranks), dtype=np.int64) * self.row_format.row_bytes

    def raw_rows(self, ranks: np.ndarray, device: torch.device | None = None) -> Tensor:
        return self._rows.index_select(0, self._wanted(ranks)).to(device or "cpu")

    def rows_on_device(self, ranks: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
        return decode_rows(self._rows, self._wanted(ranks), self.row_format, dtype).to(device)

    def _wanted(self, ranks: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(ranks - self.first_row), self._rows.device)

    def within_reach(self, device: torch.device) -> list[Tensor] | None:
        return [self._rows] if device == self._rows.device else None

    @property
    def memory(self) -> StoreMemory:
        return StoreMemory(device=self._rows.nbytes)

    def describe(self) -> str:
        return f"{self.num_rows:,} rows on {self._device}"

    def close(self) -> None:
        super().close()
        self._rows = self._rows.new_empty(0)
