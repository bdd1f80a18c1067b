"""Match f-grams and write their rows over the token embeddings in one kernel (Triton): no step waits for the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.child_index import BUCKET
from scone.kernels.dequantize_triton import decoded, typed_rows
from scone.kernels.longest_match_triton import longest_match
from scone.kernels.reachable_rows import ReachableRows
from scone.kernels.transfer import launching_on

_BLOCK = 1024
"""Numbers of a row that the four warps of a program write at a time."""


class TableLookUp:
    """Looks tokens up in a table, with everything on one CUDA device or within its reach.

    Attributes: ``num_found``, int64 ``[1]`` on the device: rows written so far. The kernel counts them.
    """

    def __init__(
        self,
        keys: Tensor,
        slots: Tensor,
        rank_bits: int,
        max_probes: int,
        vocab_size: int,
        longest: int,
        rows: ReachableRows,
    ) -> None:
        """
        Args:
            keys: int32 ``[S, 2]``, the bits of uint32: prefix node and last token of every rank.
            slots: int32 ``[M]``, the bits of uint32; with ``rank_bits`` and ``max_probes`` the index of `child_index`.
            longest: N ≥ 2, the length of the longest f-gram.
            rows: of all ranks.
        """
        self.num_found = torch.zeros(1, dtype=torch.int64, device=keys.device)
        near = typed_rows(rows.near, rows.row_type)
        far = near if rows.far is None else typed_rows(rows.far, rows.row_type)
        group_size = max(rows.group_size, 1)
        self._constants: tuple[Any, ...] = (
            *(keys, slots, len(keys), len(slots) // BUCKET, rank_bits, max_probes, vocab_size),
            *(near, far, len(near), near.shape[1], rows.width, group_size, triton.cdiv(rows.width, group_size)),
            self.num_found,
        )
        block = min(_BLOCK, triton.next_power_of_2(rows.width))
        is_float = near.dtype != torch.uint8
        self._choices: tuple[Any, ...] = (
            *(longest, triton.next_power_of_2(longest)),
            *("" if is_float else rows.row_type, triton.cdiv(rows.width, block), block),
        )

    def write(
        self,
        vectors: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        past: Tensor | None = None,
        places: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        """Write its row over the vector of each position at which an f-gram ends; the others stay.

        Args:
            vectors: float ``[B, T, D]``, contiguous.
            tokens: integers ``[B, T]``. None is checked: one outside 0 … V − 1 is in no f-gram.
            mask: ``[B, T]``, 0 at padding, where no f-gram ends. Padding is not there: the tokens on both sides of it
                are neighbours.
            past: integers ``[B, P]``, tokens before those, with padding as its complement (-1 − token).
            places, count: int64 ``[]`` on the device, for a history of fixed size: only the first ``places`` tokens of
                ``past`` are there, the new ones are written behind them, as far as there is room, and ``count`` grows
                by their number.

        Slow equal: `reference_matching.longest_matches` of each row without its padding, and `RowFormat.decode`.
        """
        num_programs = tokens.numel()
        if not num_programs:
            return
        tokens, token_row = _with_row_stride(tokens)
        mask_, mask_row, past_, past_row, past_length = tokens, 0, tokens, 0, 0
        records = places is not None and past is not None
        if mask is not None:
            mask_, mask_row = _with_row_stride(mask)
        if past is not None and past.shape[1]:
            past_, past_row = _with_row_stride(past)
            past_length = past.shape[1]
        with launching_on(vectors.device):
            _look_up[num_programs,](
                *(vectors, tokens, mask_, past_, tokens.shape[1], past_length, token_row, mask_row, past_row),
                *((places, count) if records else (self.num_found, self.num_found)),
                *self._constants,
                mask is not None,
                records,
                *self._choices,
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
        *("length", "past_length", "token_row", "mask_row", "past_row"),
        *("num_f_grams", "num_buckets", "rank_bits", "max_probes", "vocab_size", "num_near"),
    ],
    do_not_specialize_on_alignment=["tokens", "mask", "past", "places", "count"],
)
def _look_up(
    vectors,
    tokens,
    mask,
    past,
    length: tl.int64,
    past_length: tl.int64,
    token_row: tl.int64,
    mask_row: tl.int64,
    past_row: tl.int64,
    places,
    count,
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
    num_found,
    has_mask: tl.constexpr,
    records: tl.constexpr,
    longest: tl.constexpr,
    context_size: tl.constexpr,
    row_type: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
):
    """One program a position: many rows are on their way at a time, which those across the bus need."""
    place = tl.program_id(0).to(tl.int64)
    sequence, column = place // length, place % length
    if records:
        room = past_length
        past_length = tl.load(places)
        _record(tokens, mask, past, sequence, column, token_row, mask_row, past_row, past_length, room, has_mask)
        if place == 0:  # of which no other program knows
            tl.store(count, tl.load(count) + length)
    rank = longest_match(
        keys,
        slots,
        num_f_grams,
        num_buckets,
        rank_bits,
        max_probes,
        vocab_size,
        tokens + sequence * token_row,
        mask + sequence * mask_row,
        past + sequence * past_row,
        column,
        past_length,
        has_mask,
        longest,
        context_size,
    )
    if rank >= 0:
        tl.atomic_add(num_found, 1, sem="relaxed")
        vector = vectors + place * width
        if rank < num_near:
            row = near + rank * row_length
            _write_row(vector, row, width, group_size, num_groups, row_type, num_blocks, block)
        else:
            row = far + (rank - num_near) * row_length
            _write_row(vector, row, width, group_size, num_groups, row_type, num_blocks, block)


@triton.jit
def _record(
    tokens, mask, past, sequence, column, token_row, mask_row, past_row, past_length, room, has_mask: tl.constexpr
):
    """Write the token behind those that are there, which are all that the other programs read."""
    token = tl.load(tokens + sequence * token_row + column)
    if has_mask:
        token = tl.where(tl.load(mask + sequence * mask_row + column) != 0, token, ~token)
    tl.store(past + sequence * past_row + past_length + column, token, mask=past_length + column < room)


@triton.jit
def _write_row(
    vector, row, width, group_size, num_groups, row_type: tl.constexpr, num_blocks: tl.constexpr, block: tl.constexpr
):
    for number in tl.static_range(num_blocks):
        j = number * block + tl.arange(0, block)
        inside = j < width
        values = decoded(row, j, inside, group_size, num_groups, row_type)
        tl.store(vector + j, values.to(vector.dtype.element_ty), mask=inside)
