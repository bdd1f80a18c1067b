"""Rows split by rank over several stores, hot rows first; and the store that a placement means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores import RowStore, StoreMemory, parse_placement
from scone.inference.stores.direct import DirectStore
from scone.inference.stores.memory import DeviceStore, MemoryStore
from scone.inference.table_format import TableFile
from scone.utils.errors import SconeError

ROWS_IN_TURN = 128
"""Batches up to this are read store by store: 16 rows take 0.3 ms so and 0.5 to 0.7 on threads; 1,024 took 5.7 to 6.6
so and 5.3 on threads, 16,384 71 to 75 and 42 to 55 (2 KiB each, half of them in RAM, half on disk; two cores)."""


class TieredStore(RowStore):
    """Store k holds the ranks from ``cuts[k-1]`` to ``cuts[k]`` − 1 (from 0 in the first, to the end in the last).

    Nothing is evicted or counted: where a row is depends on its rank alone. Large batches are read from all stores at
    the same time.
    """

    def __init__(self, stores: Sequence[RowStore], cuts: Sequence[int]) -> None:
        """``cuts``: ascending ranks, one fewer than ``stores``."""
        if len(cuts) != len(stores) - 1 or list(cuts) != sorted(cuts):
            raise ValueError(f"{len(stores)} stores need {len(stores) - 1} ascending cuts, found {list(cuts)}")
        super().__init__(stores[0].row_format)
        self.stores, self.cuts = list(stores), np.asarray(cuts, dtype=np.int64)
        self._pool = ThreadPoolExecutor(len(stores), "scone-tier")

    def _split(self, ranks: np.ndarray) -> Iterator[tuple[RowStore, np.ndarray]]:
        """Each store that has rows of the batch, with their positions in it."""
        tier = np.searchsorted(self.cuts, ranks, side="right")
        for number, store in enumerate(self.stores):
            positions = np.flatnonzero(tier == number)
            if len(positions):
                yield store, positions

    def read(self, ranks: Tensor, out: Tensor) -> None:
        wanted, target = ranks.numpy(), out.view(torch.uint8).numpy()  # threads do not share inference mode

        def read_tier(store: RowStore, positions: np.ndarray) -> None:
            rows = store.new_rows(len(positions))
            store.read(torch.from_numpy(wanted[positions]), rows)
            target[positions] = rows.view(torch.uint8).numpy()

        parts = list(self._split(wanted))
        if len(parts) == 1:
            parts[0][0].read(ranks, out)
        elif len(wanted) <= ROWS_IN_TURN:
            for part in parts:
                read_tier(*part)
        else:
            tasks = [self._pool.submit(read_tier, *part) for part in parts]
            wait(tasks)
            for task in tasks:
                task.result()

    def gpu_blocks(self, device: torch.device) -> list[Tensor]:
        blocks: list[Tensor] = []
        for store in self.stores:
            part = store.gpu_blocks(device)
            if not part:
                break
            blocks += part
        return blocks

    def prefetch(self, ranks: Tensor) -> None:
        for store, positions in self._split(ranks.numpy()):
            store.prefetch(ranks[torch.from_numpy(positions)])

    @property
    def memory(self) -> StoreMemory:
        return sum((store.memory for store in self.stores), StoreMemory())

    def describe(self) -> str:
        return ", ".join(store.describe() for store in self.stores)

    def close(self) -> None:
        self._pool.shutdown()
        for store in self.stores:
            store.close()


def open_store(file: TableFile, placement: str, device: torch.device) -> RowStore:
    """The store that ``placement`` means (see `parse_placement`). Raises SconeError where it cannot be opened."""
    tiers = parse_placement(placement, file.layout.num_rows, file.layout.row_bytes)
    if device.type == "cpu" and any(tier.kind == "gpu" for tier in tiers):
        raise SconeError("found a gpu tier with device cpu; expected an accelerator; use ram, or give --device cuda")
    with ExitStack() as opened:
        stores: list[RowStore] = []
        for tier in tiers:
            if tier.kind == "gpu":
                stores.append(DeviceStore(file, device, tier.first_row, tier.num_rows))
            elif tier.kind in ("ram", "shared"):
                place = (tier.first_row, tier.num_rows, device)
                stores.append(MemoryStore.ram(file, *place, is_shared=tier.kind == "shared"))
            else:
                stores.append(MemoryStore.mapped(file) if tier.kind == "mmap" else DirectStore(file))
            opened.callback(stores[-1].close)
        opened.pop_all()  # they stay open
    return stores[0] if len(stores) == 1 else TieredStore(stores, [tier.first_row for tier in tiers[1:]])
