"""Row-RMS on a CUDA device: one step of the learned rows that a batch touched, in one kernel (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import launching_on


def update_rows_triton(
    *tensors: Tensor, prior: float, learning_rate: float, key: int = 0, stride: int = 1, first: int = 0
) -> None:
    """As ``row_rms.update_rows``, which see."""
    weight, _, _, row_ids, *_ = tensors
    width = weight.shape[1]
    if not len(row_ids):
        return
    with launching_on(row_ids.device):
        _update[(len(row_ids),)](
            *tensors,
            *(width, float(prior), float(learning_rate)),
            *(key - (key >> 31 << 32), stride, first),  # as int32, so that every step has the same kernel
            is_rounded=weight.dtype == torch.bfloat16,
            block=triton.next_power_of_2(width),
        )


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["key"])
def _update(
    weight,
    sums,
    visits,
    row_ids,
    gradients,
    columns,
    mean,
    width,
    prior,
    rate,
    key,
    stride,
    first,
    is_rounded: tl.constexpr,
    block: tl.constexpr,
):
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
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) - step * gradient / tl.sqrt(column)
    if is_rounded:
        number = row * stride + first
        high = (number >> 32).to(tl.uint32)
        row_key = _mixed(number.to(tl.uint32) ^ _mixed(high ^ key.to(tl.uint32)))
        noise = _mixed(row_key ^ j.to(tl.uint32)) >> 16
        bits = value.to(tl.uint32, bitcast=True)
        bits += tl.where((bits & 0x7F800000) == 0x7F800000, 0, noise)  # what is not finite stays what it is
        tl.store(place, (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)
    else:
        tl.store(place, value, mask=inside)
