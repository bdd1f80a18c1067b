"""The reference implementation of row-RMS over steps, from the dense gradient that autograd gives."""

from __future__ import annotations

import numpy as np

from scone.tests.kernels.reference import rms_rows
from scone.training.optimizer import MEMORY, PRIOR_VISITS


class DenseRowRMS:
    """Row-RMS over a dense float64 weight and its dense gradient, a row touched where its gradient is not zero."""

    def __init__(self, num_rows: int, width: int, learning_rate: float) -> None:
        self.weight, self.rate, self.step_number = np.zeros((num_rows, width)), learning_rate, 0
        self.sums, self.visits, self.columns, self.mean = np.zeros(num_rows), np.zeros(num_rows), np.ones(width), 0.0

    def step(self, gradient: np.ndarray) -> None:
        touched = np.flatnonzero(gradient.any(1))
        if not len(touched):
            return
        self.step_number += 1
        kept = min(MEMORY, 1 - 1 / self.step_number)
        now = (gradient[touched] ** 2).mean(0)
        self.columns = np.maximum(kept * self.columns + (1 - kept) * now / now.mean(), 1e-8)
        self.mean = kept * self.mean + (1 - kept) * (now / self.columns).mean()
        rms_rows(
            *(self.weight, self.sums, self.visits, touched, gradient[touched], self.columns),
            mean=self.mean,
            prior=PRIOR_VISITS,
            learning_rate=self.rate,
        )
