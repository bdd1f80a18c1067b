"""The reference implementation of kernels/row_rms.py and kernels/row_rms_triton.py."""

from __future__ import annotations

import numpy as np


def rms_rows(
    weight: np.ndarray,
    sums: np.ndarray,
    visits: np.ndarray,
    row_ids: np.ndarray,
    gradients: np.ndarray,
    columns: np.ndarray,
    *,
    mean: float,
    prior: float,
    learning_rate: float,
) -> None:
    """What ``update_rows`` does, one row after the other."""
    for row, gradient in zip(row_ids, gradients, strict=True):
        visits[row] += 1
        sums[row] += (gradient**2 / columns).mean()
        variance = (prior * mean + sums[row]) / (prior + visits[row])
        if variance > 0:
            weight[row] -= learning_rate * gradient / np.sqrt(columns * variance)
