"""Row-RMS: one step of the learned rows that a batch touched, in place; on the CPU in one pass, as on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scone.kernels.common import run_in_parts, triton_is_installed

VALUES_PER_THREAD = 1 << 18
"""Below this many values a further thread costs more than it saves."""
_U = np.uint32


def update_rows(
    weight: Tensor,
    sums: Tensor,
    visits: Tensor,
    row_ids: Tensor,
    gradients: Tensor,
    columns: Tensor,
    mean: Tensor,
    *,
    prior: float,
    learning_rate: float,
    key: int = 0,
    stride: int = 1,
    first: int = 0,
) -> None:
    """Move the distinct rows ``row_ids`` int64 [n] against ``gradients`` float32 [n, D], all on one device.

    Args:
        weight: [R, D], changed in place; bfloat16 is rounded stochastically. May lie in pinned memory of the host.
        sums: float32 [R], of each row's second moments over its visits, changed in place.
        visits: float32 [R], changed in place.
        columns: float32 [D], second moments of the columns, mean one, above zero.
        mean: float32 [1], the second moment of a mean row.
        prior: how many visits ``mean`` counts for.
        learning_rate: the root mean square of a mean step.
        key: `rounding_key` of the step. Where ``weight`` is a share, its row r is number r · ``stride`` + ``first`` of
            all: a number is rounded alike whoever has it.

    Reference implementation: ``reference.rms_rows``; of the rounding, `rounded_stochastically`.
    """
    has_kernel = weight.dtype in (torch.float32, torch.bfloat16)
    if gradients.device.type == "cpu" and has_kernel:
        is_rounded = weight.dtype == torch.bfloat16
        factors = columns.reciprocal()
        tensors = (weight.view(torch.uint16) if is_rounded else weight, sums, visits, row_ids, gradients, factors)
        rule = (np.float32(prior * mean.item()), np.float32(prior), np.float32(learning_rate))
        noise = (is_rounded, _U(key), np.uint64(stride), np.uint64(first))
        arguments = [*(tensor.numpy() for tensor in (*tensors, factors.sqrt())), rule, noise]
        parts = min(torch.get_num_threads(), gradients.numel() // VALUES_PER_THREAD)
        run_in_parts(_update, arguments, len(row_ids), parts)
    elif gradients.device.type == "cuda" and has_kernel and triton_is_installed():
        from scone.kernels.rows_triton import update_rows_triton

        update_rows_triton(
            *(weight, sums, visits, row_ids, gradients, columns, mean),
            prior=prior,
            learning_rate=learning_rate,
            key=key,
            stride=stride,
            first=first,
        )
    else:
        visits.index_add_(0, row_ids, visits.new_ones(len(row_ids)))
        sums.index_add_(0, row_ids, (gradients.square() / columns).mean(1))
        variance = (prior * mean + sums[row_ids]) / (prior + visits[row_ids])
        steps = torch.where(variance > 0, learning_rate * variance.rsqrt(), 0.0)
        moves = gradients * steps[:, None] / columns.sqrt()
        if weight.dtype == torch.bfloat16:
            numbers = row_ids * stride + first
            weight[row_ids] = rounded_stochastically(weight[row_ids].float() - moves, numbers, key)
        else:
            weight.index_add_(0, row_ids, moves.to(weight.dtype), alpha=-1.0)


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
