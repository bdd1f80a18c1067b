"""Adam on some rows of a large table on the CPU, in place and in one pass over what the rows hold."""

from __future__ import annotations

import numpy as np
from numba import njit

from scone.kernels.common import run_in_parts

VALUES_PER_THREAD = 1 << 18
"""Below this many values a further thread costs more than it saves."""


def update_rows(
    num_threads: int,
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
    """One step of Adam (Kingma and Ba, 2014) on the rows ``row_ids`` int64 [n], which are distinct, from ``gradients``
    float32 [n, D].

    ``weight``, ``average`` and ``square`` are float32 [R, D], changed in place; ``step`` counts from one.
    Reference implementation: ``reference.adam_rows``. Rows are split over at most ``num_threads`` threads.
    """
    correction = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
    scalars = (learning_rate / correction[0], 1 - betas[0], betas[1], 1 - betas[1], correction[1], eps)
    numbers = [np.float32(scalar) for scalar in scalars]
    arguments = [weight, average, square, row_ids, gradients, *numbers]
    run_in_parts(_update, arguments, len(row_ids), min(num_threads, gradients.size // VALUES_PER_THREAD))


@njit(cache=True, nogil=True)
def _update(
    weight, average, square, row_ids, gradients, rate, new_share, kept, new_square, root_correction, eps, first, last
):
    for index in range(first, last):
        row = row_ids[index]
        for column in range(weight.shape[1]):
            gradient = gradients[index, column]
            mean = average[row, column]
            mean += (gradient - mean) * new_share
            variance = square[row, column] * kept + gradient * gradient * new_square
            average[row, column] = mean
            square[row, column] = variance
            weight[row, column] -= rate * mean / (np.sqrt(variance) / root_correction + eps)
