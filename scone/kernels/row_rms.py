"""Row-RMS on the CPU: one step of the learned rows that a batch touched, in place and in one pass."""

from __future__ import annotations

import numpy as np
from numba import njit

from scone.kernels.common import run_in_parts

VALUES_PER_THREAD = 1 << 18
"""Below this many values a further thread costs more than it saves."""


def update_rows(
    num_threads: int,
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
    """Move the distinct rows ``row_ids`` int64 [n] against ``gradients`` float32 [n, D].

    Args:
        num_threads: at most so many share the rows.
        weight: float32 [R, D], changed in place.
        sums: float32 [R], of each row's second moments over its visits, changed in place.
        visits: float32 [R], changed in place.
        columns: float32 [D], second moments of the columns, mean one, above zero.
        mean: the second moment of a mean row.
        prior: how many visits ``mean`` counts for.
        learning_rate: the root mean square of a mean step.

    Reference implementation: ``reference.rms_rows``.
    """
    factors = (1.0 / columns).astype(np.float32)
    numbers = [np.float32(number) for number in (prior * mean, prior, learning_rate)]
    arguments = [weight, sums, visits, row_ids, gradients, factors, np.sqrt(factors), *numbers]
    run_in_parts(_update, arguments, len(row_ids), min(num_threads, gradients.size // VALUES_PER_THREAD))


@njit(cache=True, nogil=True)
def _update(weight, sums, visits, row_ids, gradients, factors, roots, prior_sum, prior, rate, first, last):
    width = weight.shape[1]
    for index in range(first, last):
        row = row_ids[index]
        moment = np.float32(0.0)
        for column in range(width):
            moment += gradients[index, column] * gradients[index, column] * factors[column]
        visits[row] += np.float32(1.0)
        sums[row] += moment / np.float32(width)
        variance = (prior_sum + sums[row]) / (prior + visits[row])
        if variance > 0.0:
            step = rate / np.sqrt(variance)
            for column in range(width):
                weight[row, column] -= step * gradients[index, column] * roots[column]
