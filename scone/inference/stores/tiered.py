"""Rows split by rank over several stores: rank is temperature, so the first rows go to the fastest memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores.base import RowStore, StoreMemory
from scone.kernels.transfer import to_device


class TieredStore(RowStore):
    """Store k holds the ranks from ``cuts[k-1]`` to ``cuts[k]`` − 1 (from 0 in the first, to the end in the last).

    Nothing is evicted or counted: where a row is depends on its rank alone. The slower stores read while the first is
    being decoded.
    """

    def __init__(self, stores: Sequence[RowStore], cuts: Sequence[int]) -> None:
        """``cuts``: ascending ranks, one fewer than ``stores``."""
        if len(cuts) != len(stores) - 1 or list(cuts) != sorted(cuts):
            raise ValueError(f"{len(stores)} stores need {len(stores) - 1} ascending cuts, found {list(cuts)}")
        super().__init__(stores[0].row_format)
        self.stores, self.cuts = list(stores), np.asarray(cuts, dtype=np.int64)
        self._pool = ThreadPoolExecutor(max(1, len(stores) - 1), "scone-tier")

    def _split(self, ranks: np.ndarray) -> Iterator[tuple[RowStore, np.ndarray]]:
        """Each store that has rows of the batch, with their positions in it."""
        tier = np.searchsorted(self.cuts, ranks, side="right")
        for number, store in enumerate(self.stores):
            positions = np.flatnonzero(tier == number)
            if len(positions):
                yield store, positions

    @contextmanager
    def located(self, ranks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        raw = self.raw_rows(ranks)
        yield raw.numpy().reshape(-1), np.arange(len(ranks), dtype=np.int64) * self.row_format.row_bytes

    def rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        def read(store: RowStore, positions: np.ndarray) -> None:
            store.rows_into(ranks[positions], out, positions if targets is None else targets[positions])

        self._each_tier(ranks, read)

    def raw_rows_into(self, ranks: np.ndarray, out: np.ndarray, targets: np.ndarray | None = None) -> None:
        def read(store: RowStore, positions: np.ndarray) -> None:
            store.raw_rows_into(ranks[positions], out, positions if targets is None else targets[positions])

        self._each_tier(ranks, read)

    def raw_rows(self, ranks: np.ndarray, device: torch.device | None = None) -> Tensor:
        out = torch.empty(len(ranks), self.row_format.row_bytes, dtype=torch.uint8, device=device or "cpu")

        def read(store: RowStore, positions: np.ndarray) -> None:
            rows = store.raw_rows(ranks[positions], device)
            out.index_copy_(0, to_device(torch.from_numpy(positions), out.device), rows)

        self._each_tier(ranks, read)
        return out

    def _each_tier(self, ranks: np.ndarray, read: Callable[[RowStore, np.ndarray], None]) -> None:
        """Call ``read`` for every tier that is concerned: the fastest here, the others on threads of their own."""
        parts = list(self._split(ranks))
        is_inference = torch.is_inference_mode_enabled()  # which threads do not share

        def read_there(store: RowStore, positions: np.ndarray) -> None:
            with torch.inference_mode(is_inference):
                read(store, positions)

        tasks = [self._pool.submit(read_there, *part) for part in parts[1:]]
        try:
            for part in parts[:1]:
                read(*part)
        finally:
            wait(tasks)
        for task in tasks:
            task.result()

    def within_reach(self, device: torch.device) -> list[Tensor] | None:
        blocks: list[Tensor] = []
        for store in self.stores:
            part = store.within_reach(device)
            if part is None:
                return None
            blocks += part
        return blocks

    def prefetch(self, ranks: np.ndarray) -> None:
        for store, positions in self._split(ranks):
            store.prefetch(ranks[positions])

    @property
    def memory(self) -> StoreMemory:
        return sum((store.memory for store in self.stores), StoreMemory())

    def describe(self) -> str:
        return ", ".join(store.describe() for store in self.stores)

    def close(self) -> None:
        self._pool.shutdown()
        super().close()
        for store in self.stores:
            store.close()
