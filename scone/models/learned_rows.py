"""Learned rows: one trainable vector per frequent f-gram, read and updated only where a batch touches them."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST_PASSES_PER_STEP = 4096
"""How many backward passes may wait for one step of a row optimizer: far more than anybody accumulates."""


class LearnedRows(nn.Module):
    """R rows of width D; an f-gram's vector is the sum over its suffix chain (back-off).

    They start at zero, or from a normal distribution of deviation ``std``.

    The weight is a parameter like any other: it gets a dense gradient, and any optimizer in any loop trains it, at the
    price of R rows a step. A row optimizer (``training.optimizer.RowOptimizer``) makes that the price of the rows that
    a step touches: it has the rows `collect_for` it, and finds in ``pending`` what each backward pass left.

    With ``on_host`` the rows stay in host memory wherever the model goes, and the copies of a step travel.

    Attributes:
        weight: fp32 ``[R, D]``. Rows train if it requires a gradient, whoever updates them.
        pending: of each backward pass since the last step of the row optimizer, the distinct row ids int64 ``[r]`` on
            the host and their gradients ``[r, D]``. Whoever takes a step empties it; without a row optimizer it is
            always empty.
    """

    def __init__(self, num_rows: int, width: int, std: float = 0.0) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(untouched_zeros(num_rows, width, torch.get_default_device()))
        self.on_host = False
        self.pending: list[tuple[np.ndarray, Tensor]] = []
        self._optimizer: weakref.ref[Any] | None = None

    def collect_for(self, optimizer: Any) -> None:
        """From now on, and as long as ``optimizer`` lives, gradients go to ``pending`` and not to the weight."""
        self._optimizer = weakref.ref(optimizer)
        self.pending.clear()
        self.weight.grad = None

    def release(self) -> None:
        """The weight gets its gradients itself again."""
        self._optimizer = None
        self.pending.clear()

    @property
    def are_collected(self) -> bool:
        """Whether a row optimizer takes the gradients."""
        return self._optimizer is not None and self._optimizer() is not None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is nobody's: the optimizer of the original would not update it."""
        return self.__dict__ | {"pending": [], "_optimizer": None}

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
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        if trains and not self.are_collected:
            rows = self.weight.index_select(0, ids).to(device)
        else:
            rows = self._copies(ids, device)
            if trains:
                rows.requires_grad_().register_post_accumulate_grad_hook(partial(self._collect, row_ids))
        # row 0 of the bag is the zero vector that padding points to
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return nn.functional.embedding_bag(row_chains, table, mode="sum", padding_idx=0)

    def _collect(self, row_ids: np.ndarray, rows: Tensor) -> None:
        """Keep what a backward pass found for its copies of rows. A pass without one leaves nothing behind."""
        if len(self.pending) >= MOST_PASSES_PER_STEP:
            raise RuntimeError(
                f"found the learned rows' gradients of {len(self.pending):,} backward passes and no step; expected a "
                "step of their row optimizer; call its step() and zero_grad() wherever the other optimizer's are "
                "called, or delete it, and the rows are trained by any optimizer of model.parameters()"
            )
        assert rows.grad is not None, "called when a gradient was accumulated"
        self.pending.append((row_ids, rows.grad))
        rows.grad = None  # a graph that is kept may be gone through again

    def _copies(self, ids: Tensor, device: Any) -> Tensor:
        """The rows without their history; to an accelerator by way of pinned memory, so that the host goes on."""
        weight = self.weight.detach()
        if weight.device.type != "cpu" or device.type != "cuda":
            return weight.index_select(0, ids).to(device)
        rows = torch.empty(len(ids), weight.shape[1], dtype=weight.dtype, pin_memory=True)
        return torch.index_select(weight, 0, ids, out=rows).to(device, non_blocking=True)


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
