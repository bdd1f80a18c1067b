"""The contract of a store: every store returns the same rows bit for bit; only memory and speed differ. And the words
by which a user says where rows are (no numba).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from scone.inference.table_format import RowFormat
from scone.utils.errors import SconeError
from scone.utils.text import parse_bytes


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


_KINDS = {"gpu": "gpu", "ram": "ram", "shared": "shared", "mmap": "mmap", "direct": "direct", "disk": "direct"}
_COUNT_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Tier:
    """``num_rows`` rows from ``first_row`` on are kept as ``kind`` says: gpu, ram, shared, mmap or direct."""

    kind: str
    first_row: int
    num_rows: int


def parse_placement(text: str, num_rows: int, row_bytes: int) -> list[Tier]:
    """Turn a placement into tiers that cover all rows of a table.

    ``ram``, ``shared`` (RAM, once for all processes that say so), ``mmap``, ``direct`` (or ``disk``) and ``gpu`` alone
    hold everything. A list gives each place but the last its number of rows, in order of rank:
    ``gpu:100k,ram:2M,disk``. k, M and G are thousands, millions and billions of rows; with B they are bytes
    (``ram:4GiB``). Tiers that are left without rows are dropped. Raises SconeError.
    """
    tiers: list[Tier] = []
    first = 0
    places = [place.strip() for place in text.split(",")]
    for number, place in enumerate(places):
        name, colon, size = place.partition(":")
        is_last = number == len(places) - 1
        if name not in _KINDS or bool(colon) == is_last:
            raise SconeError(
                f"found placement {text!r}; expected ram, shared, mmap, direct, gpu, or tiers with sizes but for the "
                "last; write for example ram, or gpu:100k,ram:2M,disk"
            )
        count = num_rows - first if is_last else min(_parse_rows(size, row_bytes, text), num_rows - first)
        if count or (is_last and not tiers):
            tiers.append(Tier(_KINDS[name], first, count))
        first += count
    return tiers


def _parse_rows(size: str, row_bytes: int, text: str) -> int:
    """Rows in "100k", or in as many bytes as "4GiB"."""
    if size[-1:].lower() == "b":
        return parse_bytes(size) // row_bytes
    factor = _COUNT_UNITS.get(size[-1:].lower(), 1)
    digits = size if factor == 1 else size[:-1]
    if not (digits.isascii() and digits.isdigit()):
        raise SconeError(f"found size {size!r} in placement {text!r}; expected rows or bytes; write 100k, 2M or 4GiB")
    return int(digits) * factor
