"""Gather table rows on a CUDA device by rank and decode them in the same kernel (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def gather_rows_triton(
    table: Tensor, ranks: Tensor, row_type: str, width: int, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of ``table`` (uint8 [S, row_bytes], as stored) by ``ranks`` (int64 [n]) → ``dtype`` [n, D], D = ``width``.

    Both on the same CUDA device; ranks are not checked here. Slow equal: `RowFormat.decode` of
    ``table.index_select(0, ranks)``.
    """
    out = torch.empty(len(ranks), width, dtype=dtype, device=table.device)
    write_rows_triton(out, table, row_type, group_size, wanted=ranks)
    return out


def write_rows_triton(
    out: Tensor,
    table: Tensor,
    row_type: str,
    group_size: int,
    *,
    wanted: Tensor | None = None,
    first: int = 0,
    targets: Tensor | None = None,
) -> None:
    """Write decoded rows over vectors of ``out`` ([m, D], contiguous): row ``wanted[i] - first`` over ``out[i]``.

    Args:
        table: uint8 [S, row_bytes], as stored, contiguous: on the device of ``out``, or page-locked host memory.
        wanted: int64 [n]; where ``wanted[i] - first`` is no row of the table, ``out[i]`` stays. None: every row in
            turn.
        targets: int64 [n], write over ``out[targets[i]]`` instead.

    Slow equal: ``out[targets] = RowFormat.decode(table[wanted - first])``, where these are rows.
    """
    count = len(table) if wanted is None else len(wanted)
    width = out.shape[1]
    if not count or not width or not len(table):
        return
    # numbers that are stored as they are can be read as such: whole words, which matters most across the bus
    source = table.view(_FLOATS[row_type]) if row_type in _FLOATS else table
    _write[(count, triton.cdiv(width, _BLOCK))](
        *(source, out if wanted is None else wanted, out if targets is None else targets, out),
        *(first, len(table), source.shape[1], width, max(group_size, 1), -(-width // group_size) if group_size else 0),
        row_type="" if row_type in _FLOATS else row_type,
        has_wanted=wanted is not None,
        has_targets=targets is not None,
        block=_BLOCK,
    )


@triton.jit(do_not_specialize=["first", "num_rows"])
def _write(
    source,
    wanted,
    targets,
    out,
    first,
    num_rows,
    row_length,
    width,
    group_size,
    num_groups,
    row_type: tl.constexpr,
    has_wanted: tl.constexpr,
    has_targets: tl.constexpr,
    block: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * block + tl.arange(0, block)
    rank = i
    if has_wanted:
        rank = tl.load(wanted + i) - first
    target = i
    if has_targets:
        target = tl.load(targets + i)
    inside = (j < width) & (rank >= 0) & (rank < num_rows)
    row = source + rank * row_length
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
    tl.store(out + target * width + j, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _two_bytes(at, inside):
    """The 16-bit number at each address, little-endian, in an int32."""
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    return low | (tl.load(at + 1, mask=inside, other=0).to(tl.int32) << 8)
