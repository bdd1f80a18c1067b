"""Gather table rows on a CUDA device by rank and decode them in the same kernel (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


def gather_rows_triton(
    table: Tensor, ranks: Tensor, row_type: str, width: int, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of ``table`` (uint8 [S, row_bytes], as stored) by ``ranks`` (int64 [n]) → ``dtype`` [n, D], D = ``width``.

    Both on the same CUDA device; ranks are not checked here. Slow equal: `RowFormat.decode` of
    ``table.index_select(0, ranks)``.
    """
    out = torch.empty(len(ranks), width, dtype=dtype, device=table.device)
    if out.numel():
        grid = (len(ranks), triton.cdiv(width, _BLOCK))
        num_groups = -(-width // group_size) if group_size else 0
        _gather[grid](table, ranks, out, table.shape[1], width, max(group_size, 1), num_groups, row_type, _BLOCK)
    return out


@triton.jit
def _gather(table, ranks, out, row_bytes, width, group_size, num_groups, row_type: tl.constexpr, block: tl.constexpr):
    # Rows start anywhere (an int4 row may have an odd number of bytes), so numbers are put together from single bytes.
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * block + tl.arange(0, block)
    inside = j < width
    row = table + tl.load(ranks + i) * row_bytes
    if row_type == "fp32":
        low = _two_bytes(row + 4 * j, inside)
        values = (low | (_two_bytes(row + 4 * j + 2, inside) << 16)).to(tl.float32, bitcast=True)
    elif row_type == "bf16":
        values = (_two_bytes(row + 2 * j, inside) << 16).to(tl.float32, bitcast=True)
    elif row_type == "fp16":
        values = _two_bytes(row + 2 * j, inside).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scales = (_two_bytes(row + 2 * (j // group_size), inside) << 16).to(tl.float32, bitcast=True)
        codes = row + 2 * num_groups
        if row_type == "int8":
            code = tl.load(codes + j, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        else:
            pair = tl.load(codes + j // 2, mask=inside, other=0).to(tl.int32)
            code = (((pair >> (4 * (j % 2))) & 15) ^ 8) - 8
        values = scales * code.to(tl.float32)
    tl.store(out + i * width + j, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _two_bytes(at, inside):
    """The 16-bit number at each address, little-endian, in an int32."""
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    return low | (tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8)
