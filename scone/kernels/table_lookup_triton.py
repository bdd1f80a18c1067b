"""Match f-grams and put their rows in place of token embeddings in one kernel (Triton): nothing waits for the host.

Two kernels, over the same parts: of a batch with its past, and of requests of any lengths, one behind another.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import GPUReadableRows, launching_on
from scone.kernels.f_gram_trie import BUCKET, ChildIndex
from scone.kernels.longest_match import FIRST_BIT
from scone.kernels.rows_triton import decoded, typed_rows

_BUCKET: tl.constexpr = tl.constexpr(BUCKET)
_FIRST_BIT: tl.constexpr = tl.constexpr(FIRST_BIT)
# as in `f_gram_trie.hash_key`, whose index this reads
_PREFIX_FACTOR: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_TOKEN_FACTOR: tl.constexpr = tl.constexpr(0xC2B2AE3D27D4EB4F)
_MIX_FACTOR: tl.constexpr = tl.constexpr(0xD6E8FEB86659FD93)


@triton.jit
def _longest_match(index, tokens, past, column, past_length, longest: tl.constexpr, context_size: tl.constexpr):
    """Rank of the longest f-gram ending at ``column`` of one sequence, int64; -1 for none, and at padding.

    ``tokens`` and ``past`` point at the sequence's first, as in `DeviceLookup`; ``context_size`` ≥ ``longest`` is a
    power of two. ``index``: f-grams' keys, slots, number of f-grams, of buckets, rank bits, most probes, V.
    """
    context, known = _context(tokens, past, column, past_length, longest, context_size)
    # Walk b begins b tokens back and comes here through the prefixes, under which the vocabulary is closed. All walk at
    # the same time: how long this takes is how many reads must wait for one another.
    back = tl.arange(0, context_size)
    vocab_size = index[6]
    is_token = (context >= 0) & (context < vocab_size)
    growing = (back == 0) | ((back <= known) & (back < longest) & is_token)
    node = context
    for step in range(longest - 1):
        ahead = back - 1 - step
        token = tl.sum(tl.where(back[None, :] == ahead[:, None], context[None, :], 0), 1)
        moving = growing & (ahead >= 0)
        rank = _find_child(index, node, token, moving, context_size)
        growing = growing & ((ahead < 0) | (rank >= 0))
        node = tl.where(moving, vocab_size + rank, node)
    best = tl.max(tl.where(growing, back, 0), 0)
    rank = tl.sum(tl.where(back == best, node, 0), 0) - vocab_size
    return tl.where(best > 0, rank, -1)


@triton.jit
def _context(tokens, past, column, past_length, longest: tl.constexpr, context_size: tl.constexpr):
    """Tokens int64 ``[context_size]``, the own first, then those before it; and how many before it are known.

    They are read ``context_size`` at a time, nearest first; padding is stepped over, and the first of an example is the
    last that is read. The own token at padding has none before it.
    """
    back = tl.arange(0, context_size)
    own = tl.load(tokens + column).to(tl.int64)
    context = tl.where(back == 0, own & (_FIRST_BIT - 1), 0)
    known = tl.full((), 0, tl.int32)
    before = tl.where((own >= 0) & (own < _FIRST_BIT), past_length + column - 1, -1)
    while (before >= 0) & (known < longest - 1):
        at = before - back
        is_past = (at >= 0) & (at < past_length)
        is_new = at >= past_length
        token = tl.load(past + at, mask=is_past, other=-1).to(tl.int64)
        token = tl.where(is_new, tl.load(tokens + (at - past_length), mask=is_new, other=-1).to(tl.int64), token)
        is_first = (token >= _FIRST_BIT).to(tl.int32)
        is_token = (token >= 0) & (tl.cumsum(is_first, 0) - is_first == 0)
        place = known + tl.cumsum(is_token.to(tl.int32), 0)
        found = is_token[None, :] & (place[None, :] == back[:, None])
        context += tl.sum(tl.where(found, (token & (_FIRST_BIT - 1))[None, :], 0), 1)
        known += tl.sum(is_token.to(tl.int32), 0)
        before = tl.where(tl.max(is_first, 0) > 0, -1, before - context_size)
    return context, known


@triton.jit
def _find_child(index, prefix, token, searching, size: tl.constexpr):
    """Ranks of the f-grams (``prefix``, ``token``), -1 for none and where not ``searching``; a bucket at a time."""
    keys, slots, num_f_grams, num_buckets, rank_bits, max_probes, _ = index
    mixed = prefix.to(tl.uint64) * _PREFIX_FACTOR + token.to(tl.uint64) * _TOKEN_FACTOR
    hashed = (mixed ^ (mixed >> 32)) * _MIX_FACTOR
    bucket = (((hashed >> 32) * num_buckets.to(tl.uint64)) >> 32).to(tl.int64)
    rank_mask = (tl.full((size,), 1, tl.int64) << rank_bits) - 1
    wanted = (hashed & 0xFFFFFFFF).to(tl.int64) & ~rank_mask
    slot = tl.arange(0, _BUCKET)[None, :]
    found = tl.full((size,), -1, tl.int64)
    probed = 0
    while (tl.max(searching.to(tl.int32), 0) > 0) & (probed < max_probes):
        value = tl.load(slots + bucket[:, None] * _BUCKET + slot, mask=searching[:, None], other=0)
        value = value.to(tl.uint32, bitcast=True).to(tl.int64)
        rank = (value & rank_mask[:, None]) - 1
        # a fingerprint that fits is confirmed in the keys
        likely = ((value ^ wanted[:, None]) <= rank_mask[:, None]) & (value != 0) & (rank >= 0) & (rank < num_f_grams)
        its_prefix = tl.load(keys + 2 * rank, mask=likely, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        its_token = tl.load(keys + 2 * rank + 1, mask=likely, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        is_it = likely & (its_prefix == prefix[:, None]) & (its_token == token[:, None])
        found = tl.maximum(found, tl.max(tl.where(is_it, rank, -1), 1))
        is_full = tl.sum(tl.where(slot == _BUCKET - 1, value, 0), 1) != 0
        searching = searching & (found < 0) & is_full
        bucket = tl.where(bucket + 1 == num_buckets, 0, bucket + 1)
        probed += _BUCKET
    return found


_BLOCK = 1024
"""Numbers of a row that the four warps of a program write at a time."""
_STARTS = 256
"""Beginnings of requests that a program compares with its place at a time."""


class DeviceLookup:
    """Finds the longest f-gram that ends at each position and reads its row, all on one CUDA device or in its reach.

    No token is checked, for which the host would have to wait: one outside 0 … V − 1 is in no f-gram.

    Attributes: ``counts``, int64 ``[2]`` on the device: positions looked up and rows read so far.
    """

    def __init__(
        self, index: ChildIndex, vocab_size: int, longest: int, rows: GPUReadableRows, device: torch.device
    ) -> None:
        """
        Args:
            index: of f-grams with uint32 keys.
            longest: N ≥ 2, the length of the longest f-gram.
            rows: of all ranks.
        """
        # uint32 as int32, which PyTorch does more with; the bits are the same
        keys, slots = (torch.from_numpy(part.view(np.int32).copy()).to(device) for part in (index.keys, index.slots))
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._is_empty = not len(keys)  # for which Triton compiles no kernel
        near = typed_rows(rows.near, rows.row_type)
        far = near if rows.far is None else typed_rows(rows.far, rows.row_type)
        group_size = max(rows.group_size, 1)
        block = min(_BLOCK, triton.next_power_of_2(rows.width))
        # what both kernels take
        self._constants = (
            *(keys, slots, len(keys), len(slots) // BUCKET, index.rank_bits, index.max_probes, vocab_size),
            *(near, far, len(near), near.shape[1], rows.width, group_size, triton.cdiv(rows.width, group_size)),
            self.counts,
        )
        self._choices = (
            *(longest, triton.next_power_of_2(longest)),
            *("" if near.dtype != torch.uint8 else rows.row_type, triton.cdiv(rows.width, block), block),
        )

    def __call__(
        self, vectors: Tensor, tokens: Tensor, past: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors with the row of each position at which an f-gram ends in place of its own, and which these are.

        Args:
            vectors: float ``[B, T, D]``.
            tokens: int64 ``[B, T]``. Padding is its complement (-1 − token): it is not there, and the tokens on both
                sides of it are neighbours. A token with ``FIRST_BIT`` has none before it.
            past: int64 ``[B, P]``, the tokens before those, likewise.
            places: int64 ``[]`` on the device: only the first ``places`` tokens of ``past`` are there (None: all).

        Returns:
            ``[B, T, D]`` and bool ``[B, T]``. Reference implementation: `reference.longest_matches` of each sequence
            without its padding, and `RowFormat.decode`.
        """
        output = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        found = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
        if self._is_empty or not tokens.numel():
            return output.copy_(vectors), found.zero_()
        tokens, token_row = _with_row_stride(tokens)
        past_, past_row, past_length = tokens, 0, 0
        if past is not None and past.shape[1]:
            past_, past_row = _with_row_stride(past)
            past_length = past.shape[1]
        with launching_on(vectors.device):
            _look_up[tokens.numel(),](
                *(vectors.contiguous(), output, found.view(torch.uint8), tokens, past_, tokens.shape[1], past_length),
                *(token_row, past_row, self.counts if places is None else places),
                *self._constants,
                places is not None,
                *self._choices,
                num_warps=4,
            )
        return output, found

    def look_up_ragged(
        self,
        vectors: Tensor,
        output: Tensor,
        tokens: Tensor,
        query_starts: Tensor,
        slots: Tensor,
        histories: Tensor,
        num_computed: Tensor,
    ) -> None:
        """The same of a step of continuous batching, into ``output``. Nothing is copied together first.

        Args:
            vectors: float ``[P, D]``, contiguous; ``output`` alike, of another memory.
            tokens: integers ``[P]``, the new tokens of R requests, one request behind another.
            query_starts: integers ``[R + 1]``, where each begins, and where the last one ends; what is behind it is
                padding, and keeps its vectors.
            slots: integers ``[R]``, where each request's history is.
            histories: integers ``[M, L]``, tokens of request slots from their first one on; those that count are
            num_computed: integers ``[M]``, how many there were before the new ones.
        """
        if self._is_empty or not len(vectors):
            output.copy_(vectors)
            return
        assert histories.stride(1) == 1, "a request's tokens lie side by side"
        with launching_on(vectors.device):
            _look_up_ragged[len(vectors),](
                *(vectors, output, tokens, query_starts, slots, histories, num_computed),
                *(len(slots), histories.stride(0)),
                *self._constants,
                *self._choices,
                starts_size=_STARTS,
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
    index = (keys, slots, num_f_grams, num_buckets, rank_bits, max_probes, vocab_size)
    at, before = tokens + sequence * token_row, past + sequence * past_row
    rank = _longest_match(index, at, before, column, past_length, longest, context_size)
    tl.store(found + place, (rank >= 0).to(tl.uint8))
    rows = (near, far, num_near, row_length, width, group_size, num_groups)
    _place_vector(output, vectors, place, rank, rows, counts, row_type, num_blocks, block)


@triton.jit(
    do_not_specialize=[
        *("num_requests", "history_stride"),
        *("num_f_grams", "num_buckets", "rank_bits", "max_probes", "vocab_size", "num_near"),
    ],
    do_not_specialize_on_alignment=["tokens", "query_starts", "slots", "histories"],
)
def _look_up_ragged(
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
        index = (keys, slots_of_index, num_f_grams, num_buckets, rank_bits, max_probes, vocab_size)
        history, num_before = histories + slot * history_stride, tl.load(num_computed + slot).to(tl.int64)
        rank = _longest_match(index, tokens + begin, history, place - begin, num_before, longest, context_size)
    rows = (near, far, num_near, row_length, width, group_size, num_groups)
    _place_vector(output, vectors, place, rank, rows, counts, row_type, num_blocks, block)


@triton.jit
def _place_vector(
    output, vectors, place, rank, rows, counts, row_type: tl.constexpr, num_blocks: tl.constexpr, block: tl.constexpr
):
    """Write the row of ``rank`` to ``output`` at ``place``, or for -1 the vector that is there in ``vectors``.

    ``rows``: the two blocks, how many rows the first has, numbers of a stored row, D, those of a group, groups.
    """
    near, far, num_near, row_length, width, group_size, num_groups = rows
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
