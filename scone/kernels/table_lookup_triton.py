"""Match f-grams and put their rows in place of token embeddings in one kernel (Triton): nothing waits for the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.child_index import BUCKET
from scone.kernels.common import GPUReadableRows, launching_on
from scone.kernels.dequantize_triton import decoded, typed_rows
from scone.kernels.longest_match_triton import longest_match

_BLOCK = 1024
"""Numbers of a row that the four warps of a program write at a time."""


class TableKernel:
    """Looks tokens up in a table, with everything on one CUDA device or within its reach.

    Attributes: ``counts``, int64 ``[2]`` on the device: positions looked up and rows written so far. The kernel counts.
    ``constants`` and ``choices``: what kernels that look up in this table take last, as `_look_up` does.
    """

    def __init__(
        self,
        keys: Tensor,
        slots: Tensor,
        rank_bits: int,
        max_probes: int,
        vocab_size: int,
        longest: int,
        rows: GPUReadableRows,
    ) -> None:
        """
        Args:
            keys: int32 ``[S, 2]``, the bits of uint32: prefix node and last token of every rank.
            slots: int32 ``[M]``, the bits of uint32; with ``rank_bits`` and ``max_probes`` the index of `child_index`.
            longest: N ≥ 2, the length of the longest f-gram.
            rows: of all ranks.
        """
        self.counts = torch.zeros(2, dtype=torch.int64, device=keys.device)
        near = typed_rows(rows.near, rows.row_type)
        far = near if rows.far is None else typed_rows(rows.far, rows.row_type)
        group_size = max(rows.group_size, 1)
        self.constants: tuple[Any, ...] = (
            *(keys, slots, len(keys), len(slots) // BUCKET, rank_bits, max_probes, vocab_size),
            *(near, far, len(near), near.shape[1], rows.width, group_size, triton.cdiv(rows.width, group_size)),
            self.counts,
        )
        block = min(_BLOCK, triton.next_power_of_2(rows.width))
        is_float = near.dtype != torch.uint8
        self.choices: tuple[Any, ...] = (
            *(longest, triton.next_power_of_2(longest)),
            *("" if is_float else rows.row_type, triton.cdiv(rows.width, block), block),
        )

    def __call__(
        self,
        vectors: Tensor,
        tokens: Tensor,
        past: Tensor | None,
        places: Tensor | None,
        output: Tensor,
        found: Tensor,
    ) -> None:
        """Write the row of each position at which an f-gram ends into ``output``, and the vectors of all others.

        Args:
            vectors: float ``[B, T, D]``, contiguous; ``output`` alike, of another memory.
            tokens: int64 ``[B, T]``. Padding is its complement (-1 − token): it is not there, and the tokens on both
                sides of it are neighbours. A token with ``FIRST_BIT`` has none before it. None is checked: one outside
                0 … V − 1 is in no f-gram.
            past: int64 ``[B, P]``, the tokens before those, likewise.
            places: int64 ``[]`` on the device: only the first ``places`` tokens of ``past`` are there (None: all).
            found: bool ``[B, T]``, whether a row was written.

        Reference implementation: `reference.longest_matches` of each sequence without its padding, and
        `RowFormat.decode`.
        """
        num_programs = tokens.numel()
        if not num_programs:
            return
        tokens, token_row = _with_row_stride(tokens)
        past_, past_row, past_length = tokens, 0, 0
        if past is not None and past.shape[1]:
            past_, past_row = _with_row_stride(past)
            past_length = past.shape[1]
        with launching_on(vectors.device):
            _look_up[num_programs,](
                *(vectors, output, found.view(torch.uint8), tokens, past_, tokens.shape[1], past_length),
                *(token_row, past_row, self.counts if places is None else places),
                *self.constants,
                places is not None,
                *self.choices,
                num_warps=4,
            )


def _with_row_stride(values: Tensor) -> tuple[Tensor, int]:
    """``values`` [B, T] with neighbours side by side, and how far apart its rows are."""
    row, column = values.stride()
    if column == 1:
        return values, row
    return values.contiguous(), values.shape[1]


# What changes from step to step is taken as it comes, so that one compilation serves every step.
@triton.jit(
    do_not_specialize=[
        *("length", "past_length", "token_row", "past_row"),
        *("num_f_grams", "num_buckets", "rank_bits", "max_probes", "vocab_size", "num_near"),
    ],
    do_not_specialize_on_alignment=["tokens", "past", "places", "found"],
)
def _look_up(
    vectors,
    output,
    found,
    tokens,
    past,
    length: tl.int64,
    past_length: tl.int64,
    token_row: tl.int64,
    past_row: tl.int64,
    places,
    keys,
    slots,
    num_f_grams: tl.int64,
    num_buckets: tl.int64,
    rank_bits: tl.int64,
    max_probes: tl.int64,
    vocab_size: tl.int64,
    near,
    far,
    num_near: tl.int64,
    row_length,
    width,
    group_size,
    num_groups,
    counts,
    has_places: tl.constexpr,
    longest: tl.constexpr,
    context_size: tl.constexpr,
    row_type: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
):
    """One program a position: many rows are on their way at a time, which those across the bus need."""
    place = tl.program_id(0).to(tl.int64)
    sequence, column = place // length, place % length
    if has_places:
        past_length = tl.load(places)
    if place == 0:
        tl.atomic_add(counts, tl.num_programs(0).to(tl.int64), sem="relaxed")
    rank = longest_match(
        keys,
        slots,
        num_f_grams,
        num_buckets,
        rank_bits,
        max_probes,
        vocab_size,
        tokens + sequence * token_row,
        past + sequence * past_row,
        column,
        past_length,
        longest,
        context_size,
    )
    tl.store(found + place, (rank >= 0).to(tl.uint8))
    place_vector(
        output,
        vectors,
        place,
        rank,
        near,
        far,
        num_near,
        row_length,
        width,
        group_size,
        num_groups,
        counts,
        row_type,
        num_blocks,
        block,
    )


@triton.jit
def place_vector(
    output,
    vectors,
    place,
    rank,
    near,
    far,
    num_near,
    row_length,
    width,
    group_size,
    num_groups,
    counts,
    row_type: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
):
    """Write the row of ``rank`` to ``output`` at ``place``, or for -1 the vector that is there in ``vectors``."""
    target = output + place * width
    if rank >= 0:
        tl.atomic_add(counts + 1, 1, sem="relaxed")
        if rank < num_near:
            row = near + rank * row_length
            _write_row(target, row, width, group_size, num_groups, row_type, num_blocks, block)
        else:
            row = far + (rank - num_near) * row_length
            _write_row(target, row, width, group_size, num_groups, row_type, num_blocks, block)
    else:
        for number in tl.static_range(num_blocks):
            j = number * block + tl.arange(0, block)
            tl.store(target + j, tl.load(vectors + place * width + j, mask=j < width), mask=j < width)


@triton.jit
def _write_row(
    vector, row, width, group_size, num_groups, row_type: tl.constexpr, num_blocks: tl.constexpr, block: tl.constexpr
):
    for number in tl.static_range(num_blocks):
        j = number * block + tl.arange(0, block)
        inside = j < width
        values = decoded(row, j, inside, group_size, num_groups, row_type)
        tl.store(vector + j, values.to(vector.dtype.element_ty), mask=inside)
