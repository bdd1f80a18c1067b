"""The longest f-gram that ends at a position, for kernels on a CUDA device (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from scone.kernels.child_index import BUCKET
from scone.kernels.longest_match import FIRST_BIT

_BUCKET: tl.constexpr = tl.constexpr(BUCKET)
_FIRST_BIT: tl.constexpr = tl.constexpr(FIRST_BIT)
# as in `child_index.hash_key`, whose index this reads
_PREFIX_FACTOR: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_TOKEN_FACTOR: tl.constexpr = tl.constexpr(0xC2B2AE3D27D4EB4F)
_MIX_FACTOR: tl.constexpr = tl.constexpr(0xD6E8FEB86659FD93)


@triton.jit
def longest_match(
    keys,
    slots,
    num_f_grams,
    num_buckets,
    rank_bits,
    max_probes,
    vocab_size,
    tokens,
    past,
    column,
    past_length,
    longest: tl.constexpr,
    context_size: tl.constexpr,
):
    """Rank of the longest f-gram ending at ``column`` of one sequence, int64; -1 for none, and at padding.

    ``tokens`` and ``past`` point at the sequence's first; ``context_size`` ≥ ``longest`` is a power of two. What they
    are says `table_lookup_triton.TableKernel`.
    """
    context, known = _context(tokens, past, column, past_length, longest, context_size)
    # Walk b begins b tokens back and comes here through the prefixes, under which the vocabulary is closed. All walk at
    # the same time: how long this takes is how many reads must wait for one another.
    back = tl.arange(0, context_size)
    is_token = (context >= 0) & (context < vocab_size)
    growing = (back == 0) | ((back <= known) & (back < longest) & is_token)
    node = context
    for step in range(longest - 1):
        ahead = back - 1 - step
        token = tl.sum(tl.where(back[None, :] == ahead[:, None], context[None, :], 0), 1)
        moving = growing & (ahead >= 0)
        rank = _find_child(
            keys, slots, num_f_grams, num_buckets, rank_bits, max_probes, node, token, moving, context_size
        )
        growing = growing & ((ahead < 0) | (rank >= 0))
        node = tl.where(moving, vocab_size + rank, node)
    best = tl.max(tl.where(growing, back, 0), 0)
    rank = tl.sum(tl.where(back == best, node, 0), 0) - vocab_size
    return tl.where(best > 0, rank, -1)


@triton.jit
def _context(
    tokens,
    past,
    column,
    past_length,
    longest: tl.constexpr,
    context_size: tl.constexpr,
):
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
def _find_child(
    keys,
    slots,
    num_f_grams,
    num_buckets,
    rank_bits,
    max_probes,
    prefix,
    token,
    searching,
    size: tl.constexpr,
):
    """Ranks of the f-grams (``prefix``, ``token``), -1 for none and where not ``searching``; a bucket at a time."""
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
