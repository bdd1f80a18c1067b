"""Row-RMS on the CPU: one step of the learned rows that a batch touched, in place and in one pass."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scone.kernels.common import run_in_parts

VALUES_PER_THREAD = 1 << 18
"""Below this many values a further thread costs more than it saves."""
_U = np.uint32


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
    key: int = 0,
    stride: int = 1,
    first: int = 0,
) -> None:
    """Move the distinct rows ``row_ids`` int64 [n] against ``gradients`` float32 [n, D].

    Args:
        num_threads: at most so many share the rows.
        weight: float32 [R, D], or uint16, the bits of bfloat16, which are rounded stochastically; changed in place.
        sums: float32 [R], of each row's second moments over its visits, changed in place.
        visits: float32 [R], changed in place.
        columns: float32 [D], second moments of the columns, mean one, above zero.
        mean: the second moment of a mean row.
        prior: how many visits ``mean`` counts for.
        learning_rate: the root mean square of a mean step.
        key: `rounding_key` of the step. Where ``weight`` is a share, its row r is number r · ``stride`` + ``first`` of
            all: a number is rounded alike whoever has it.

    Reference implementation: ``reference.rms_rows``; of the rounding, `rounded_stochastically`.
    """
    factors = (1.0 / columns).astype(np.float32)
    rule = (np.float32(prior * mean), np.float32(prior), np.float32(learning_rate))
    noise = (weight.dtype == np.uint16, _U(key), np.uint64(stride), np.uint64(first))
    arguments = [weight, sums, visits, row_ids, gradients, factors, np.sqrt(factors), rule, noise]
    run_in_parts(_update, arguments, len(row_ids), min(num_threads, gradients.size // VALUES_PER_THREAD))


@njit(cache=True, nogil=True)
def _update(weight, sums, visits, row_ids, gradients, factors, roots, rule, noise, first, last):
    prior_sum, prior, rate = rule
    is_rounded, key, stride, offset = noise
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
            if is_rounded:
                number = np.uint64(row) * stride + offset
                row_key = _mixed(_U(number) ^ _mixed(_U(number >> np.uint64(32)) ^ key))
                for column in range(width):
                    old = _U(_U(weight[row, column]) << _U(16)).view(np.float32)
                    new = np.float32(old - step * gradients[index, column] * roots[column]).view(np.uint32)
                    if new & _U(0x7F800000) != _U(0x7F800000):  # else it is no finite number, and stays what it is
                        new = _U(new + (_mixed(row_key ^ _U(column)) >> _U(16)))
                    weight[row, column] = np.uint16(new >> _U(16))
            else:
                for column in range(width):
                    weight[row, column] -= step * gradients[index, column] * roots[column]


@njit(cache=True, nogil=True)
def _mixed(x):
    """A hash of 32 bits (Wellons, "lowbias32"): noise without a state, alike on every device and after a resume."""
    x = _U(_U(x ^ (x >> _U(16))) * _U(0x7FEB352D))
    x = _U(_U(x ^ (x >> _U(15))) * _U(0x846CA68B))
    return _U(x ^ (x >> _U(16)))


def rounding_key(step: int) -> int:
    """What the noise of a step's rounding begins from, uint32."""
    return int(_mixed(_U(step & 0xFFFFFFFF)))


def rounded_stochastically(values: Tensor, row_numbers: Tensor, key: int) -> Tensor:
    """float32 ``values`` [n, D] as bfloat16: up or down with the chances that make the mean of many roundings the
    value itself, by PyTorch's operators. ``row_numbers`` int64 [n], of all rows.
    """

    def mixed(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    row_keys = mixed((row_numbers & 0xFFFFFFFF) ^ mixed((row_numbers >> 32) ^ key))
    noise = mixed(row_keys[:, None] ^ torch.arange(values.shape[1], device=values.device)) >> 16
    noise = torch.where(values.isfinite(), noise, 0).to(torch.int32)
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)
