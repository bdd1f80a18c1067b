"""The embedding table as a model reads it: ranks in, rows out, wherever the rows are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores import RowStore, StoreMemory
from scone.inference.stores.tiered import open_store
from scone.inference.table_format import RowFormat, TableFile
from scone.kernels.common import GPUReadableRows, to_device, triton_is_installed
from scone.kernels.dequantize import dequantize_rows
from scone.utils.errors import SconeError
from scone.utils.files import Closing
from scone.utils.text import human_bytes

_DECODED_BYTES = 1 << 24  # stored bytes that are read and decoded at a time; above 32 MiB fresh memory is slow


class EmbeddingTable(Closing):
    """S rows of D numbers, row r for the f-gram of rank r; use `open`.

    Attributes: ``num_rows`` (S), ``width`` (D), ``row_type``, ``row_bytes`` (of a stored row, scales included),
    ``layout`` (the header), ``fingerprints`` (of what the rows were made from: hex digests by name, "" where unknown),
    ``store``, ``path``, ``device``.
    """

    def __init__(self, file: TableFile, store: RowStore, device: torch.device) -> None:
        self._file, self.store, self.device = file, store, device
        self.path, self.layout, row = file.path, file.layout, file.layout.row_format
        self.num_rows, self.width, self.row_type = self.layout.num_rows, row.width, row.row_type
        self.row_bytes, self.fingerprints = row.row_bytes, self.layout.fingerprints
        blocks = store.gpu_blocks(device)
        self._held = blocks[0] if blocks and len(blocks[0]) and blocks[0].device == device else None
        # looked up in every call, of which they are a tenth where one row is read
        self._by_host = device.type == "cpu" and self._held is None
        self._float_dtype = row.float_dtype

    @classmethod
    def open(
        cls,
        path: str | Path,
        placement: str = "ram",
        device: str | torch.device = "cpu",
        expected_fingerprints: Mapping[str, str] | None = None,
    ) -> EmbeddingTable:
        """Open a table file.

        Args:
            path: the file that `scone precompute` made.
            placement: where rows are kept. ``ram``: copied and checked when opened; ``mmap``: mapped, one copy for all
                processes of the machine; ``direct``: read from disk past the page cache; or tiers by rank,
                ``gpu:N,ram:M,disk``: the first N rows on ``device``, the next M in RAM, the rest on disk (see
                `parse_placement`).
            device: where `rows` puts its result.
            expected_fingerprints: what the model says it needs (``weights``, ``vocabulary``, ``tokenizer``); those that
                both sides know must be equal.

        Raises SconeError: the file is missing, damaged, of a newer version, foreign or another model's; the placement
        is unknown or does not fit.
        """
        file = TableFile(path, expected_fingerprints)
        try:
            store = open_store(file, placement, torch.device(device))
        except BaseException:
            file.close()
            raise
        return cls(file, store, torch.device(device))

    @property
    def memory(self) -> StoreMemory:
        """Bytes held, by kind of memory."""
        return self.store.memory

    def rows(self, ranks: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Rows by rank: int64 [n] → ``dtype`` [n, D] on the table's device; repeats and any order are fine.

        ``out``: float32 [n, D], contiguous, on the table's device, is filled and returned instead of a new tensor.
        Raises SconeError: a rank outside [0, S), or the file was changed while open.
        """
        if out is not None and (not out.dtype is dtype is torch.float32 or out.shape != (ranks.shape[0], self.width)):
            raise ValueError(f"out must be float32 [{len(ranks)}, {self.width}], found {out.dtype} {list(out.shape)}")
        if not self._by_host:
            return self._rows_on_device(self._checked(ranks), dtype, out)
        if ranks.dtype is not torch.int64 or ranks.ndim != 1:
            raise _not_ranks(ranks)
        try:
            if dtype is not self._float_dtype:
                return self._decoded(ranks, dtype, out)
            if out is None:  # nothing is to be decoded: rows go where they are wanted
                out = torch.empty(ranks.shape[0], self.width, dtype=dtype)
            self.store.read(ranks, out)
            return out
        except IndexError:  # stores check ranks: to do it here, too, would take longer than to read a few rows
            self._checked(ranks)  # says which one
            raise

    def _decoded(self, ranks: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Rows that are stored as another type than ``dtype``, on the CPU."""
        row, rows = self.layout.row_format, out
        if rows is None:
            rows = torch.empty(len(ranks), self.width, dtype=dtype if row.float_dtype else torch.float32)
        step = max(1, _DECODED_BYTES // row.row_bytes)
        scratch = self.store.new_rows(min(step, len(ranks)))
        for low in range(0, len(ranks), step):
            part = rows[low : low + step]
            stored = scratch[: len(part)]
            self.store.read(ranks[low : low + step], stored)
            if row.float_dtype is not None:
                part.copy_(stored)
            else:
                dequantize_rows(stored.numpy(), part.numpy(), row.row_type, row.group_size, torch.get_num_threads())
        return rows.to(dtype)

    def _rows_on_device(self, wanted: np.ndarray, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Rows ``wanted`` (checked) where the table's device holds the first ones, or none; they are decoded there."""
        row, held = self.layout.row_format, self._held
        on_host = np.arange(len(wanted)) if held is None else np.flatnonzero(wanted >= len(held))
        if held is None:
            rows = self._rows_by_host(wanted, dtype)
        else:
            near = torch.from_numpy(np.minimum(wanted, len(held) - 1))
            rows = decode_rows(held, to_device(near, self.device), row, dtype)
            if len(on_host):
                far = self._rows_by_host(wanted[on_host], dtype)
                rows.index_copy_(0, to_device(torch.from_numpy(on_host), self.device), far)
        return rows if out is None else out.copy_(rows)

    def _rows_by_host(self, wanted: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Rows that the host reads and ``self.device`` decodes."""
        pinned = self.device.type == "cuda"  # so that copying need not wait for the accelerator
        stored = self.store.new_rows(len(wanted), pinned)
        self.store.read(torch.from_numpy(wanted), stored)
        on_device = stored.view(torch.uint8).to(self.device, non_blocking=pinned)
        return decode_rows(on_device, torch.arange(len(wanted), device=self.device), self.layout.row_format, dtype)

    def gpu_rows(self, device: torch.device) -> GPUReadableRows | None:
        """The rows, where kernels on ``device`` read them by themselves and are there; None where the host has to."""
        blocks, row = self.store.gpu_blocks(device) if triton_is_installed() else [], self.layout.row_format
        # None where some rows are on disk; more than the GPU's and the host's blocks can only be given on purpose
        if not 1 <= len(blocks) <= 2 or sum(map(len, blocks)) < self.num_rows:
            return None
        rest = blocks[1] if len(blocks) > 1 else None
        return GPUReadableRows(blocks[0], rest, row.row_type, row.width, row.group_size)

    def prefetch(self, ranks: Tensor) -> None:
        """Start fetching these rows in the background (int64 [n]), so that `rows` of them waits less."""
        self.store.prefetch(torch.from_numpy(self._checked(ranks)))

    def _checked(self, ranks: Tensor) -> np.ndarray:
        if ranks.ndim != 1 or ranks.dtype != torch.int64:
            raise _not_ranks(ranks)
        wanted = np.ascontiguousarray(ranks.cpu().numpy())
        if len(wanted):
            low, high = int(wanted.min()), int(wanted.max())
            if low < 0 or high >= self.num_rows:
                raise SconeError(
                    f"found rank {low if low < 0 else high}; expected ranks of the {self.num_rows:,} rows of the "
                    f"embedding table {self.path}; give the table that belongs to the vocabulary"
                )
        return wanted

    def describe(self) -> str:
        """One line: size, row type, placement and memory."""
        memory = self.memory
        places = {f"on {self.device}": memory.device, "in RAM": memory.ram, "mapped (shared)": memory.mapped}
        held = [f"{human_bytes(size)} {where}" for where, size in places.items() if size]
        return (
            f"embedding table {self.path.name}: {self.num_rows:,} rows × {self.width} {self.row_type}, "
            f"{human_bytes(self.layout.payload_bytes)}; {self.store.describe()}; holds {', '.join(held) or 'nothing'}"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> EmbeddingTable:
        """A copied model reads the same rows: nobody writes to them, and they may be all that fits into memory."""
        return self

    def close(self) -> None:
        """Release files, memory and threads."""
        self._held = None
        self.store.close()
        self._file.close()


def decode_rows(table: Tensor, ranks: Tensor, row: RowFormat, dtype: torch.dtype) -> Tensor:
    """Rows ``ranks`` (int64 [n]) of ``table`` (uint8 [m, row_bytes]) as ``dtype`` [n, D], on the device of both.

    On CUDA one Triton kernel gathers and decodes, where Triton is installed; PyTorch does the same in several steps.
    """
    if table.device.type == "cuda" and triton_is_installed():
        from scone.kernels.rows_triton import gather_rows_triton

        return gather_rows_triton(table, ranks, row.row_type, row.width, row.group_size, dtype)
    return row.decode(table.index_select(0, ranks), dtype)


def _not_ranks(ranks: Tensor) -> ValueError:
    return ValueError(f"ranks must be int64 [n], found {ranks.dtype} {list(ranks.shape)}")
