"""Rows on a CUDA device (Triton): gathered by rank and decoded in one kernel; learned rows moved by one (row-RMS)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import launching_on

_BLOCK = 256
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def typed_rows(table: Tensor, row_type: str) -> Tensor:
    """``table`` (uint8 [S, row_bytes]) as what `decoded` reads.

    Numbers that are stored as they are can be read as such: whole words, which matters most across the bus.
    """
    return table.view(_FLOATS[row_type]) if row_type in _FLOATS else table


def gather_rows_triton(
    table: Tensor, ranks: Tensor, row_type: str, width: int, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of ``table`` (uint8 [S, row_bytes], as stored) by ``ranks`` (int64 [n]) → ``dtype`` [n, D], D = ``width``.

    Both on the same CUDA device, or the table in pinned memory of the host; ranks are not checked here. Reference
    implementation: `RowFormat.decode` of ``table.index_select(0, ranks)``.
    """
    out = torch.empty(len(ranks), width, dtype=dtype, device=ranks.device)
    if out.numel():
        source = typed_rows(table, row_type)
        group_size = max(group_size, 1)
        with launching_on(ranks.device):
            _gather[(len(ranks), triton.cdiv(width, _BLOCK))](
                *(source, ranks, out, source.shape[1], width, group_size, triton.cdiv(width, group_size)),
                row_type="" if row_type in _FLOATS else row_type,
                block=_BLOCK,
            )
    return out


@triton.jit
def _gather(source, ranks, out, row_length, width, group_size, num_groups, row_type: tl.constexpr, block: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * block + tl.arange(0, block)
    inside = j < width
    row = source + tl.load(ranks + i) * row_length
    values = decoded(row, j, inside, group_size, num_groups, row_type)
    tl.store(out + i * width + j, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decoded(row, j, inside, group_size, num_groups, row_type: tl.constexpr):
    """Numbers ``j`` of the row that starts at ``row`` (of `typed_rows`), float32; ``row_type`` is "" for floats."""
    if row_type == "":
        values = tl.load(row + j, mask=inside, other=0.0).to(tl.float32)
    else:
        # rows start anywhere (an int4 row may have an odd number of bytes), so scales are put together from bytes
        scales = (_two_bytes(row + 2 * (j // group_size), inside) << 16).to(tl.float32, bitcast=True)
        codes = row + 2 * num_groups
        if row_type == "int8":
            code = tl.load(codes + j, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        else:
            pair = tl.load(codes + j // 2, mask=inside, other=0).to(tl.int32)
            code = (((pair >> (4 * (j % 2))) & 15) ^ 8) - 8
        values = scales * code.to(tl.float32)
    return values


@triton.jit
def _two_bytes(at, inside):
    """The 16-bit number at each address, little-endian, in an int32."""
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    return low | (tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8)


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
