"""Rows on the accelerator, as they are stored: decoded there when they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.stores.memory import load_rows
from scone.inference.table_format import TableFile
from scone.kernels.common import to_device
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes


class DeviceStore(RowStore):
    """``num_rows`` rows from ``first_row`` on, copied to ``device`` and checked on the way."""

    def __init__(self, file: TableFile, device: torch.device, first_row: int = 0, num_rows: int | None = None) -> None:
        """Raises SconeError: a chunk does not fit its checksum, or the accelerator has too little memory."""
        super().__init__(file.layout.row_format)
        self._first_row, row_bytes = first_row, self.row_format.row_bytes
        num_rows = file.layout.num_rows - first_row if num_rows is None else num_rows
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
