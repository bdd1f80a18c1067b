"""The embedding table as a model reads it: ranks in, rows out, wherever the rows are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.inference.stores.placement import open_store
from scone.inference.table_format import TableFile
from scone.kernels.installed import triton_is_installed
from scone.kernels.reachable_rows import ReachableRows
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes

_FP32, _INT64 = torch.float32, torch.int64  # looked up in every call, which of one row is a tenth of its time


class EmbeddingTable:
    """S rows of D numbers, row r for the f-gram of rank r; use `open`.

    Attributes: ``num_rows`` (S), ``width`` (D), ``layout`` (the header), ``store``, ``path``, ``device``.
    """

    def __init__(self, file: TableFile, store: RowStore, device: torch.device) -> None:
        self._file = file
        self.layout = file.layout
        self.num_rows = file.layout.num_rows
        self.width = file.layout.row_format.width
        self.store = store
        self.path = file.path
        self.device = device
        self._on_cpu = device.type == "cpu"
        self._reach: dict[torch.device, ReachableRows | None] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        placement: str = "ram",
        device: str | torch.device = "cpu",
        expected_fingerprints: Mapping[str, str] | None = None,
        num_threads: int | None = None,
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
            num_threads: threads for large batches; PyTorch's number by default.

        Raises SconeError: the file is missing, damaged, of a newer version, foreign or another model's; the placement
        is unknown or does not fit.
        """
        file = TableFile(path, expected_fingerprints)
        try:
            store = open_store(file, placement, torch.device(device), num_threads)
        except BaseException:
            file.close()
            raise
        return cls(file, store, torch.device(device))

    @property
    def row_type(self) -> str:
        """fp32, fp16, bf16, int8 or int4."""
        return self.layout.row_format.row_type

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, scales included."""
        return self.layout.row_bytes

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What the rows were made from: hex digests by name, "" where unknown."""
        return self.layout.fingerprints

    @property
    def memory(self) -> StoreMemory:
        """Bytes held, by kind of memory."""
        return self.store.memory

    def rows(self, ranks: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """Rows by rank: int64 [n] → ``dtype`` [n, D] on the table's device; repeats and any order are fine.

        ``out``: float32 [n, D], contiguous, on the CPU, is filled and returned instead of a new tensor (CPU only).
        Raises SconeError: a rank outside [0, S), or the file was changed while open.
        """
        if self._on_cpu and dtype is _FP32 and ranks.dtype is _INT64 and ranks.ndim == 1:
            if out is not None:
                self._check_out(out, ranks.shape[0])  # len() takes as long as all other checks together
            try:
                rows = self.store.rows_at_once(ranks, out)
            except IndexError:
                self._checked(ranks)  # says which rank
                raise
            if rows is not None:
                return rows
        wanted = self._checked(ranks)
        if self.device.type != "cpu" or dtype == self.layout.row_format.float_dtype != torch.float32:
            if out is not None:
                raise ValueError("out is for rows that are decoded to float32 on the CPU")
            return self.store.rows_on_device(wanted, self.device, dtype)
        if out is None:
            out = torch.empty(len(wanted), self.width)
        else:
            self._check_out(out, len(wanted))
        self.store.rows_into(wanted, out.numpy())
        return out.to(dtype)

    def within_reach(self, device: torch.device) -> ReachableRows | None:
        """The rows, where kernels on ``device`` read them by themselves and are there; None where the host has to."""
        if device not in self._reach:
            self._reach[device] = self._rows_within_reach(device) if triton_is_installed() else None
        return self._reach[device]

    def _rows_within_reach(self, device: torch.device) -> ReachableRows | None:
        blocks = self.store.within_reach(device)
        if blocks is None or len(blocks) > 2:  # more than the GPU's and the host's can only be given on purpose
            return None
        row = self.layout.row_format
        return ReachableRows(blocks[0], blocks[1] if len(blocks) > 1 else None, row.row_type, row.width, row.group_size)

    def prefetch(self, ranks: Tensor) -> None:
        """Start fetching these rows in the background (int64 [n]), so that `rows` of them waits less."""
        self.store.prefetch(self._checked(ranks))

    def _check_out(self, out: Tensor, count: int) -> None:
        if out.shape != (count, self.width) or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(f"out must be contiguous float32 [{count}, {self.width}], found {list(out.shape)}")

    def _checked(self, ranks: Tensor) -> np.ndarray:
        if ranks.ndim != 1 or ranks.dtype != torch.int64:
            raise ValueError(f"ranks must be int64 [n], found {ranks.dtype} {list(ranks.shape)}")
        return self._in_range(np.ascontiguousarray(ranks.cpu().numpy()))

    def _in_range(self, wanted: np.ndarray) -> np.ndarray:
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
        held = [
            f"{human_bytes(size)} {where}"
            for size, where in (
                (memory.device, f"on {self.device}"),
                (memory.ram, "in RAM"),
                (memory.mapped, "mapped (shared)"),
            )
            if size
        ]
        return (
            f"embedding table {self.path.name}: {self.num_rows:,} rows × {self.width} {self.row_type}, "
            f"{human_bytes(self.layout.payload_bytes)}; {self.store.describe()}; holds {', '.join(held) or 'nothing'}"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> EmbeddingTable:
        """A copied model reads the same rows: nobody writes to them, and they may be all that fits into memory."""
        return self

    def close(self) -> None:
        """Release files, memory and threads."""
        self._reach.clear()
        self.store.close()
        self._file.close()

    def __enter__(self) -> EmbeddingTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
