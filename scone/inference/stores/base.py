"""The contract of a store: every store returns the same rows bit for bit; only memory and speed differ."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scone.inference.row_types import RowFormat
from scone.kernels.dequantize import ThreadTeam, gather_bytes, gather_rows
from scone.kernels.installed import triton_is_installed


def decode_rows(table: Tensor, ranks: Tensor, row: RowFormat, dtype: torch.dtype) -> Tensor:
    """Rows ``ranks`` (int64 [n]) of ``table`` (uint8 [m, row_bytes]) as ``dtype`` [n, D], on the device of both.

    On CUDA one Triton kernel gathers and decodes, where Triton is installed; PyTorch does the same in several steps.
    """
    if table.device.type == "cuda" and triton_is_installed():
        from scone.kernels.dequantize_triton import gather_rows_triton

        return gather_rows_triton(table, ranks, row.row_type, row.width, row.group_size, dtype)
    return row.decode(table.index_select(0, ranks), dtype)


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
    """Rows of a table by rank.

    Ranks are int64 [n] numpy arrays of any order and with any repeats, already checked to lie in [0, S).
    All methods may be called from several threads at once. Reading raises SconeError when the file was changed.
    """

    def __init__(self, row_format: RowFormat, num_threads: int | None = None) -> None:
        self.row_format = row_format
        self._matrix: Tensor | None = None
        self._team = ThreadTeam(num_threads or torch.get_num_threads())

    @abstractmethod
    def located(self, ranks: np.ndarray) -> AbstractContextManager[tuple[np.ndarray, np.ndarray]]:
        """The bytes of these rows: (source uint8 [any], offset of each row in it int64 [n]), valid inside the context.

        This is all that an implementation has to give; the rest follows.
        """

    @property
    @abstractmethod
    def memory(self) -> StoreMemory:
        """What the store holds now."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the line that is printed: where the rows are."""

    def rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Decode row ``ranks[i]`` into ``out[targets[i]]`` (``out[i]`` without targets); ``out``: float32 [m, D]."""
        if not len(ranks):
            return
        with self.located(ranks) as (source, offsets):
            row = self.row_format
            if self._matrix is not None and targets is None:
                rows = offsets // row.row_bytes
                torch.index_select(self._matrix, 0, torch.from_numpy(rows), out=torch.from_numpy(out))
            else:
                gather_rows(source, offsets, out, row.row_type, row.group_size, targets, self._team)

    def rows_at_once(self, ranks: Tensor, out: Tensor | None) -> Tensor | None:
        """All rows ``ranks`` (int64 [n], not checked yet) as fp32 [n, D] in ``out`` or a new tensor by one operator of
        PyTorch, whose own check of the ranks raises IndexError; None where this store does not keep its rows that way.

        What a decoder asks for is so little that every further step would take longer than the reading.
        """
        del ranks, out
        return None

    def _use_matrix(self, source: np.ndarray) -> None:
        """Let PyTorch gather where nothing has to be decoded: its threads start faster than Python's.

        ``source`` (uint8) is all that `located` ever returns, and its rows start at multiples of ``row_bytes``.
        """
        if self.row_format.row_type == "fp32":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody will write
                self._matrix = torch.from_numpy(source.view(np.float32)).view(-1, self.row_format.width)

    def raw_rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        """As `rows_into`, but the rows stay as they are stored; ``out``: uint8 [m, row_bytes]."""
        if not len(ranks):
            return
        with self.located(ranks) as (source, offsets):
            gather_bytes(source, offsets, out, targets, self._team)

    def raw_rows(self, ranks: np.ndarray, device: torch.device | None = None) -> Tensor:
        """The rows as they are stored: uint8 [n, row_bytes] on ``device`` (None: the CPU)."""
        pinned = device is not None and device.type == "cuda"  # so that copying need not wait for the accelerator
        out = torch.empty(len(ranks), self.row_format.row_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.raw_rows_into(ranks, out.numpy())
        return out.to(device or "cpu", non_blocking=pinned)

    def rows_on_device(self, ranks: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows as ``dtype`` [n, D] on ``device``; they travel as they are stored and are decoded there."""
        raw = self.raw_rows(ranks, device)
        return decode_rows(raw, torch.arange(len(raw), device=device), self.row_format, dtype)

    def within_reach(self, device: torch.device) -> list[Tensor] | None:
        """All rows as they are stored, by rank, in blocks uint8 [m, row_bytes], where kernels on ``device`` can read
        them by themselves; None where the host has to (default).
        """
        del device
        return None

    def prefetch(self, ranks: np.ndarray) -> None:
        """Start reading these rows in the background, so that a later `rows_into` waits less (default: nothing)."""
        del ranks

    def close(self) -> None:
        """Release files, memory and threads; the store cannot be used afterwards."""
        self._matrix = None
        self._team.close()
