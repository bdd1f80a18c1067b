"""Row-RMS on a CUDA device: one step of the learned rows that a batch touched, in one kernel (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import launching_on


def update_rows_triton(
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
) -> None:
    """As ``row_rms.update_rows``, which see; everything on one device, ``mean`` float32 of one element."""
    width = weight.shape[1]
    if not len(row_ids):
        return
    with launching_on(weight.device):
        _update[(len(row_ids),)](
            *(weight, sums, visits, row_ids, gradients, columns, mean),
            *(width, float(prior), float(learning_rate)),
            block=triton.next_power_of_2(width),
        )


@triton.jit
def _update(weight, sums, visits, row_ids, gradients, columns, mean, width, prior, rate, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ids + index)
    j = tl.arange(0, block)
    inside = j < width
    gradient = tl.load(gradients + index * width + j, mask=inside, other=0.0)
    column = tl.load(columns + j, mask=inside, other=1.0)
    count = tl.load(visits + row) + 1
    total = tl.load(sums + row) + tl.sum(gradient * gradient / column, axis=0) / width
    tl.store(visits + row, count)
    tl.store(sums + row, total)
    variance = (prior * tl.load(mean) + total) / (prior + count)
    step = tl.where(variance > 0.0, rate / tl.sqrt(variance), 0.0)
    place = weight + row * width + j
    tl.store(place, tl.load(place, mask=inside, other=0.0) - step * gradient / tl.sqrt(column), mask=inside)
