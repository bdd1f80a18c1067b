"""Hashed n-grams: the 2- and the 3-gram that end at a position, frequent or not, as rows of a table of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTHS = (2, 3)
CONTEXT = max(LENGTHS) - 1
"""How many tokens before a position decide its rows."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as in Fibonacci hashing
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # one round of the finaliser of splitmix64
_SHIFT = np.uint64(31)


@dataclass(frozen=True)
class HashedGrams:
    """One table of ``num_rows`` rows: its first half for 2-grams, the rest for 3-grams.

    Grams that contain a separator or padding have no row, as f-grams do not.
    """

    num_rows: int
    separator_ids: tuple[int, ...] = ()

    def rows(self, tokens: np.ndarray, valid: np.ndarray | None = None, starts: np.ndarray | None = None) -> np.ndarray:
        """Rows of the 2-gram and the 3-gram that end at each position, int64 ``[..., T, 2]``; -1: none.

        Args:
            tokens: integers ``[..., T]``.
            valid: bool, same shape, False at padding.
            starts: bool, same shape, True where an example begins, over whose beginning no gram reaches.
        """
        usable = ~np.isin(tokens, self.separator_ids)
        if valid is not None:
            usable &= valid
        rows = np.full((*tokens.shape, len(LENGTHS)), -1, np.int64)
        first, key, whole = 0, tokens.astype(np.uint64), usable
        for column, length in enumerate(LENGTHS):
            size = self.num_rows // 2 if column == 0 else self.num_rows - self.num_rows // 2
            before = length - 1
            if tokens.shape[-1] <= before:
                break
            key = key[..., 1:] * _MULTIPLIER + tokens[..., :-before].astype(np.uint64) + np.uint64(1)
            whole = whole[..., 1:] & usable[..., :-before]
            if starts is not None:
                whole &= ~starts[..., 1 : starts.shape[-1] - before + 1]
            if size:  # of a single row, 2-grams get none
                mixed = (key ^ (key >> _SHIFT)) * _MIXER
                hashed = ((mixed ^ (mixed >> _SHIFT)) % np.uint64(size)).astype(np.int64)
                rows[..., before:, column] = np.where(whole, first + hashed, -1)
            first += size
        return rows

    def lookups(self, rows: np.ndarray, convert: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """What ``LearnedRows`` reads for ``rows`` ``[..., 2]``: distinct ``row_ids`` [R] on the host, and
        ``row_chains`` [P, 2], converted (to tensors), 1 + index into them; 0: none.
        """
        distinct, inverse = np.unique(rows.reshape(-1), return_inverse=True)
        missing = int(len(distinct) > 0 and distinct[0] < 0)
        chains = inverse.reshape(-1, len(LENGTHS)).astype(np.int64) + (1 - missing)
        return {"row_ids": distinct[missing:], "row_chains": convert(chains)}
