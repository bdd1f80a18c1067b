"""Longest f-gram ending at each position, on a CUDA device (Triton): decoding need not wait for the host to match."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.child_index import BUCKET

_POSITIONS = 8
"""Positions of one program (one warp). Few: all wait for the one with the longest match."""

_BUCKET: tl.constexpr = tl.constexpr(BUCKET)
# as in `child_index.hash_key`, whose index this reads
_PREFIX_FACTOR: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_TOKEN_FACTOR: tl.constexpr = tl.constexpr(0xC2B2AE3D27D4EB4F)
_MIX_FACTOR: tl.constexpr = tl.constexpr(0xD6E8FEB86659FD93)


def match_positions_triton(
    keys: Tensor,
    slots: Tensor,
    rank_bits: int,
    max_probes: int,
    vocab_size: int,
    longest: int,
    tokens: Tensor,
    mask: Tensor | None = None,
    past: Tensor | None = None,
) -> Tensor:
    """Nodes of ``tokens``, int64 ``[B, T]``, everything on one CUDA device.

    Args:
        keys: int32 ``[S, 2]``, the bits of uint32: prefix node and last token of every rank.
        slots: int32 ``[M]``, the bits of uint32; with ``rank_bits`` and ``max_probes`` the index of `child_index`.
        longest: N, the length of the longest f-gram.
        tokens: int64 ``[B, T]``. None is checked: one outside 0 … V − 1 is in no f-gram.
        mask: ``[B, T]``, 0 at padding, whose node is its own token. Padding is not there: the tokens on both sides of
            it are neighbours.
        past: int64 ``[B, P]``, tokens before those, with padding as its complement (-1 − token).

    Slow equal: `reference_matching.longest_matches` of each row without its padding.
    """
    num_rows, length = tokens.shape
    nodes = torch.empty(num_rows, length, dtype=torch.int64, device=tokens.device)
    if nodes.numel():
        _match[(triton.cdiv(nodes.numel(), _POSITIONS),)](
            *(keys, slots, tokens, tokens if mask is None else mask, tokens if past is None else past, nodes),
            *(len(keys), len(slots) // BUCKET, rank_bits, max_probes, vocab_size),
            *(num_rows, length, 0 if past is None else past.shape[1]),
            *tokens.stride(),
            *((0, 0) if mask is None else mask.stride()),
            *((0, 0) if past is None else past.stride()),
            has_mask=mask is not None,
            longest=longest,
            context_size=triton.next_power_of_2(longest),
            positions=_POSITIONS,
            num_warps=1,
        )
    return nodes


# sizes and strides change from step to step of a decoder: one compilation serves them all
@triton.jit(do_not_specialize=["num_rows", "length", "past_length", "token_row", "mask_row", "past_row"])
def _match(
    keys,
    slots,
    tokens,
    mask,
    past,
    nodes,
    num_f_grams,
    num_buckets,
    rank_bits,
    max_probes,
    vocab_size,
    num_rows,
    length,
    past_length,
    token_row,
    token_column,
    mask_row,
    mask_column,
    past_row,
    past_column,
    has_mask: tl.constexpr,
    longest: tl.constexpr,
    context_size: tl.constexpr,
    positions: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * positions + tl.arange(0, positions)
    inside = place < num_rows * length
    row, column = place // length, place % length
    own = tl.load(tokens + row * token_row + column * token_column, mask=inside, other=0)
    growing = inside
    if has_mask:
        growing = inside & (tl.load(mask + row * mask_row + column * mask_column, mask=inside, other=0) != 0)

    # The tokens before this one, nearest first, as far as an f-gram reaches; padding is stepped over.
    index = tl.arange(0, context_size)[None, :]
    context = tl.zeros((positions, context_size), tl.int64)
    known = tl.zeros((positions,), tl.int32)
    before = past_length + column - 1
    looking = growing & (before >= 0) & (known < longest - 1)
    while tl.max(looking.to(tl.int32), 0) > 0:
        is_new = before >= past_length
        earlier = before - past_length
        token = tl.load(past + row * past_row + before * past_column, mask=looking & (before < past_length), other=-1)
        at = tokens + row * token_row + earlier * token_column
        there = looking & is_new
        token = tl.where(is_new, tl.load(at, mask=there, other=-1), token)
        is_token = looking & (token >= 0)
        if has_mask:
            is_kept = tl.load(mask + row * mask_row + earlier * mask_column, mask=there, other=1) != 0
            is_token = is_token & (is_kept | (before < past_length))
        context = tl.where(is_token[:, None] & (index == known[:, None]), token[:, None], context)
        known += is_token.to(tl.int32)
        before -= 1
        looking = looking & (before >= 0) & (known < longest - 1)

    # An f-gram of n tokens ends here only where one of n - 1 does: the vocabulary is closed under suffix. Each is
    # walked from its first token, through prefixes that the vocabulary is closed under too.
    node = own
    for n in tl.static_range(2, longest + 1):
        growing = growing & (known >= n - 1)
        walked = tl.sum(tl.where(index == n - 2, context, 0), 1)
        rank = tl.zeros((positions,), tl.int64)
        for back in tl.static_range(n - 1):
            token = own
            if back < n - 2:
                token = tl.sum(tl.where(index == n - 3 - back, context, 0), 1)
            rank = _find_child(
                keys, slots, num_f_grams, num_buckets, rank_bits, max_probes, walked, token, growing, positions
            )
            growing = growing & (rank >= 0)
            walked = vocab_size + rank
        node = tl.where(growing, walked, node)
    tl.store(nodes + place, node, mask=inside)


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
    positions: tl.constexpr,
):
    """Ranks of the f-grams (``prefix``, ``token``), -1 for none and where not ``searching``; a bucket at a time."""
    mixed = prefix.to(tl.uint64) * _PREFIX_FACTOR + token.to(tl.uint64) * _TOKEN_FACTOR
    hashed = (mixed ^ (mixed >> 32)) * _MIX_FACTOR
    bucket = (((hashed >> 32) * num_buckets.to(tl.uint64)) >> 32).to(tl.int64)
    rank_mask = (tl.full((positions,), 1, tl.int64) << rank_bits) - 1
    wanted = (hashed & 0xFFFFFFFF).to(tl.int64) & ~rank_mask
    slot = tl.arange(0, _BUCKET)[None, :]
    found = tl.full((positions,), -1, tl.int64)
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
