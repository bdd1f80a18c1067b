"""Gather table rows on a CUDA device by rank and decode them in the same kernel (Triton)."""

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
