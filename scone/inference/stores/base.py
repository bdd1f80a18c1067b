"""The contract of a store: every store returns the same rows bit for bit; only memory and speed differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scone.inference.table_format import RowFormat


@dataclass(frozen=True)
class StoreMemory:
    """Bytes that a store holds: ``ram`` of this process alone, ``mapped`` shared with every process that maps the file
    (and given back by the system under pressure), ``device`` on the accelerator.
    """

    ram: int = 0
    mapped: int = 0
    device: int = 0

    def __add__(self, other: StoreMemory) -> StoreMemory:
        return StoreMemory(self.ram + other.ram, self.mapped + other.mapped, self.device + other.device)


class RowStore(ABC):
    """Rows of a table by rank, as they are stored; `EmbeddingTable` decodes them and moves them to where they go.

    All methods may be called from several threads at once.
    """

    def __init__(self, row_format: RowFormat) -> None:
        self.row_format = row_format

    @abstractmethod
    def read(self, ranks: Tensor, out: Tensor) -> None:
        """Copy row ``ranks[i]`` into ``out[i]``: int64 [n] and ``row_format.storage_dtype`` [n, storage_width], both on
        the CPU and contiguous. Any order and any repeats are fine.

        Raises IndexError: a rank that the store does not hold; SconeError: the file was changed, or the disk fails.
        """

    def gpu_blocks(self, device: torch.device) -> list[Tensor]:
        """The rows from the first one on, uint8 [m, row_bytes] a block, as far as kernels on ``device`` can read them
        by themselves: on it, or in pinned memory of the host. [] where they cannot (default).
        """
        del device
        return []

    def prefetch(self, ranks: Tensor) -> None:
        """Start reading these rows (int64 [n]) in the background, so that a later `read` waits less (default: no)."""
        del ranks

    @property
    @abstractmethod
    def memory(self) -> StoreMemory:
        """What the store holds now."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the line that is printed: where the rows are."""

    @abstractmethod
    def close(self) -> None:
        """Release files, memory and threads; the store cannot be used afterwards."""

    def new_rows(self, count: int, pin: bool = False) -> Tensor:
        """An empty tensor for `read`."""
        row = self.row_format
        return torch.empty(count, row.storage_width, dtype=row.storage_dtype, pin_memory=pin)
