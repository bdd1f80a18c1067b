"""Learned rows: one trainable vector per frequent f-gram, read and updated only where a batch touches them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class LearnedRows(nn.Module):
    """R rows of width D; an f-gram's vector is the sum over its suffix chain (back-off).

    They start at zero, or from a normal distribution of deviation ``std``.

    The weight takes no gradient itself: each training step copies the batch's distinct rows into a small leaf tensor,
    and ``training.optimizer.AdamWWithRows`` applies that leaf's gradient to those rows alone. So a step costs the rows
    that it touches, whatever R is, under every wrapper (DDP, FSDP, gradient accumulation) alike.

    With ``on_host`` the rows stay in host memory wherever the model goes, and the copies of a step travel.
    """

    def __init__(self, num_rows: int, width: int, std: float = 0.0) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(untouched_zeros(num_rows, width, torch.get_default_device()), requires_grad=False)
        self.on_host = False
        self.pending: list[tuple[np.ndarray, Tensor]] = []
        """Of each pass since the last step, the row ids and the leaf whose gradient is theirs."""

    def reset(self) -> None:
        """Every row at its start. Memory that is zero already is only read: pages that nobody wrote to take no room."""
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        elif self.weight.device.type == "meta" or bool(self.weight.any()):
            nn.init.zeros_(self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedRows:
        """What ``to``, ``cuda``, ``half`` … do to a module; rows on the host neither move nor change their type."""
        return self if self.on_host else super()._apply(fn, recurse)  # type: ignore[no-any-return, misc]

    def forward(self, row_ids: np.ndarray, row_chains: Tensor) -> Tensor:
        """Sums over the suffix chains, ``[M, D]``.

        Args:
            row_ids: int64 ``[R_batch]`` distinct ranks, on the host, so that rows can be read there without waiting
                for the accelerator.
            row_chains: int64 ``[M, N - 1]``, 1 + index into ``row_ids``; 0 adds nothing.
        """
        device = row_chains.device
        ids = torch.from_numpy(row_ids)
        if self.weight.device.type == "cuda":
            ids = ids.pin_memory()  # from ordinary memory the copy would wait until the last step is through
        ids = ids.to(self.weight.device, non_blocking=True)
        rows = self._pinned_rows(ids) if self._must_travel(device) else self.weight.index_select(0, ids)
        rows = rows.to(device, non_blocking=True)
        if self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            self.pending.append((row_ids, rows))
        # row 0 of the bag is the zero vector that padding points to
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return nn.functional.embedding_bag(row_chains, table, mode="sum", padding_idx=0)

    def _must_travel(self, device: Any) -> bool:
        return self.weight.device.type == "cpu" and device.type == "cuda"

    def _pinned_rows(self, ids: Tensor) -> Tensor:
        """Copies of the rows in page-locked memory, from which an accelerator fetches while the host goes on."""
        rows = torch.empty(len(ids), self.weight.shape[1], dtype=self.weight.dtype, pin_memory=True)
        return torch.index_select(self.weight, 0, ids, out=rows)


def untouched_zeros(num_rows: int, width: int, device: torch.device) -> Tensor:
    """fp32 zeros ``[R, D]``; on the host, memory that the system provides page by page as it is written to.

    Huge pages are declined: rows are touched here and there, and each would bring two megabytes of zeros along.
    """
    if device.type != "cpu" or not num_rows or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(num_rows, width, device=device)
    memory = mmap.mmap(-1, 4 * num_rows * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(num_rows, width)
