"""Learned rows: one trainable vector per frequent f-gram, read and updated only where a batch touches them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedRows(nn.Module):
    """R rows of width D, zero at the start; an f-gram's vector is the sum over its suffix chain (back-off).

    The weight takes no gradient itself: each training step copies the batch's distinct rows into a small leaf tensor,
    and ``training.optimizer.AdamWWithRows`` applies that leaf's gradient to those rows alone. So a step costs the rows
    that it touches, whatever R is, under every wrapper (DDP, FSDP, gradient accumulation) alike.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, width), requires_grad=False)
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, row_ids: Tensor, row_chains: Tensor) -> Tensor:
        """Sums over the suffix chains, ``[M, D]``.

        Args:
            row_ids: int64 ``[R_batch]`` distinct ranks.
            row_chains: int64 ``[M, N - 1]``, 1 + index into ``row_ids``; 0 adds nothing.
        """
        rows = self.weight.index_select(0, row_ids)
        if self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            self.pending.append((row_ids, rows))
        # row 0 of the bag is the zero vector that padding points to
        table = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return nn.functional.embedding_bag(row_chains, table, mode="sum", padding_idx=0)
