"""The plain equal of kernels/row_adam.py."""

from __future__ import annotations

import numpy as np


def adam_rows(
    weight: np.ndarray,
    average: np.ndarray,
    square: np.ndarray,
    row_ids: np.ndarray,
    gradients: np.ndarray,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    step: float,
) -> None:
    """What ``update_rows`` does, one row after the other."""
    for row, gradient in zip(row_ids, gradients, strict=True):
        average[row] = betas[0] * average[row] + (1 - betas[0]) * gradient
        square[row] = betas[1] * square[row] + (1 - betas[1]) * gradient**2
        mean = average[row] / (1 - betas[0] ** step)
        variance = square[row] / (1 - betas[1] ** step)
        weight[row] -= learning_rate * mean / (np.sqrt(variance) + eps)
