"""The lookup of a step of continuous batching in one kernel (Triton): requests of any lengths, one behind another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import launching_on
from scone.kernels.table_lookup_triton import TableKernel, longest_match, place_vector

_STARTS = 256
"""Beginnings of requests that a program compares with its place at a time."""


def look_up_ragged(
    kernel: TableKernel,
    vectors: Tensor,
    output: Tensor,
    tokens: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    histories: Tensor,
    num_computed: Tensor,
) -> None:
    """Write the row of each position at which an f-gram ends into ``output``, and the vectors of all others.

    Nothing is copied together first, and nothing waits for the host. All tensors lie on one device, or within its
    reach. A token outside the vocabulary is in no f-gram.

    Args:
        kernel: of the table.
        vectors: float ``[P, D]``, contiguous; ``output`` alike, of another memory.
        tokens: integers ``[P]``, the new tokens of R requests, one request behind another.
        query_starts: integers ``[R + 1]``, where each begins, and where the last one ends; what is behind it is
            padding, and keeps its vectors.
        slots: integers ``[R]``, where each request's history is.
        histories: integers ``[M, L]``, tokens of request slots from their first one on; those that count are
        num_computed: integers ``[M]``, how many there were before the new ones.

    Reference implementation: `reference.longest_matches` of each request's whole text, and `RowFormat.decode`.
    """
    if not len(vectors):
        return
    assert histories.stride(1) == 1, "a request's tokens lie side by side"
    with launching_on(vectors.device):
        _look_up[len(vectors),](
            *(vectors, output, tokens, query_starts, slots, histories, num_computed),
            *(len(slots), histories.stride(0)),
            *kernel.constants,
            *kernel.choices,
            starts_size=_STARTS,
            num_warps=4,
        )


# What changes from step to step is taken as it comes, so that one compilation serves every step.
@triton.jit(
    do_not_specialize=[
        *("num_requests", "history_stride"),
        *("num_f_grams", "num_buckets", "rank_bits", "max_probes", "vocab_size", "num_near"),
    ],
    do_not_specialize_on_alignment=["tokens", "query_starts", "slots", "histories"],
)
def _look_up(
    vectors,
    output,
    tokens,
    query_starts,
    slots,
    histories,
    num_computed,
    num_requests: tl.int64,
    history_stride: tl.int64,
    keys,
    slots_of_index,
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
    longest: tl.constexpr,
    context_size: tl.constexpr,
    row_type: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
    starts_size: tl.constexpr,
):
    """One program a position: many rows are on their way at a time, which those across the bus need."""
    place = tl.program_id(0).to(tl.int64)
    if place == 0:
        tl.atomic_add(counts, tl.num_programs(0).to(tl.int64), sem="relaxed")
    # the requests that end before this place are those in front of its own
    request = tl.full((), 0, tl.int64)
    first = 0
    while first < num_requests:
        number = first + 1 + tl.arange(0, starts_size)
        ends = tl.load(query_starts + number, mask=number <= num_requests, other=2147483647).to(tl.int64)
        request += tl.sum((ends <= place).to(tl.int64), 0)
        first += starts_size
    rank = tl.full((), -1, tl.int64)
    if request < num_requests:
        begin = tl.load(query_starts + request).to(tl.int64)
        slot = tl.load(slots + request).to(tl.int64)
        rank = longest_match(
            keys,
            slots_of_index,
            num_f_grams,
            num_buckets,
            rank_bits,
            max_probes,
            vocab_size,
            tokens + begin,
            histories + slot * history_stride,
            place - begin,
            tl.load(num_computed + slot).to(tl.int64),
            longest,
            context_size,
        )
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
