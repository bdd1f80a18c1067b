"""Rows split by rank over several stores, hot rows first; and the store that a placement means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from scone.inference.stores import RowStore, StoreMemory, parse_placement
from scone.inference.stores.direct import DirectStore
from scone.inference.stores.memory import DeviceStore, MemoryStore
from scone.inference.table_format import TableFile
from scone.utils.errors import SconeError


class TieredStore(RowStore):
    """Store k holds the ranks from ``cuts[k-1]`` to ``cuts[k]`` − 1 (from 0 in the first, to the end in the last).

    Nothing is evicted or counted: where a row is depends on its rank alone. Stores read in turn: of a batch, almost all
    time is the disk's, and threads beside it gain nothing.
    """

    def __init__(self, stores: Sequence[RowStore], cuts: Sequence[int]) -> None:
        """``cuts``: ascending ranks, one fewer than ``stores``."""
        if len(cuts) != len(stores) - 1 or list(cuts) != sorted(cuts):
            raise ValueError(f"{len(stores)} stores need {len(stores) - 1} ascending cuts, found {list(cuts)}")
        super().__init__(stores[0].row_format)
        self.stores, self.cuts = list(stores), np.asarray(cuts, dtype=np.int64)

    def _split(self, ranks: np.ndarray) -> Iterator[tuple[RowStore, np.ndarray]]:
        """Each store that has rows of the batch, with their positions in it."""
        tier = np.searchsorted(self.cuts, ranks, side="right")
        for number, store in enumerate(self.stores):
            positions = np.flatnonzero(tier == number)
            if len(positions):
                yield store, positions

    def read(self, ranks: Tensor, out: Tensor) -> None:
        wanted, target = ranks.numpy(), out.view(torch.uint8).numpy()
        for store, positions in self._split(wanted):
            if len(positions) == len(wanted):
                store.read(ranks, out)
            else:
                rows = store.new_rows(len(positions))
                store.read(torch.from_numpy(wanted[positions]), rows)
                target[positions] = rows.view(torch.uint8).numpy()

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
