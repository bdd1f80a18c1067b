"""Longest f-gram ending at each position: level by level for batches, along suffix links for one step.

Because the vocabulary is closed under prefix and suffix, an f-gram of n + 1 tokens can end at position i only where an
f-gram of n tokens ends at i and another at i − 1. So level n + 1 probes the index with (node of length n at i − 1,
token i) at exactly those positions. The probes of a level do not depend on each other: first the cache lines of all
their buckets are asked for, then those of all the keys that they point to, so that the processor waits for many lines
at once instead of for one after another. (Following the automaton makes as many probes, each waiting for the last.)
"""

from __future__ import annotations

import numpy as np
from numba import njit

from scone.kernels.f_gram_trie import (
    BUCKET,
    NO_F_GRAM,
    find_child,
    fingerprint_of,
    hash_key,
    home_slot,
    largest_match,
    low_mask_of,
    prefetch,
)

BLOCK = 512
"""Positions that are matched together: enough independent probes, while their cache lines stay in the first cache."""

FRESH = -1
"""The state of a sequence that nothing reaches into."""

FIRST = 2
"""In a mask: a token that begins an example of its own, over whose beginning no f-gram reaches."""

FIRST_BIT = 1 << 40
"""Set in such a token, where tokens carry that mark themselves. Vocabularies have fewer than 2³² tokens."""

_1 = np.uint64(1)
_2 = np.uint64(2)
_LAST_IN_BUCKET = np.uint64(BUCKET - 1)

# Indices below are uint64 because numba guards signed ones against counting from the end, which costs a fifth.


@njit(cache=True)
def _request_buckets(index, node, token, candidates, num_candidates, home, wanted):
    _, slots, bits, _ = index
    for k in range(num_candidates):
        i = candidates[k]
        hashed = hash_key(node[i - _1], token[i])
        wanted[k] = fingerprint_of(hashed, bits)
        home[k] = home_slot(hashed, len(slots))
        prefetch(slots, home[k])


@njit(cache=True)
def _find_likely_ranks(index, node, token, candidates, num_candidates, home, wanted, likely, rank):
    """Keep the candidates whose fingerprint is in their bucket, with the rank beside it; request those keys."""
    keys, slots, bits, _ = index
    flat_keys = keys.reshape(-1)
    low_mask = low_mask_of(bits)
    kept = 0
    for k in range(num_candidates):
        i = candidates[k]
        value = largest_match(slots, home[k], wanted[k], low_mask)
        if (value == 0) & (slots[home[k] + _LAST_IN_BUCKET] != 0):
            value = np.uint32(find_child(index, node[i - _1], token[i]) + 1)
        found = np.uint64(value & low_mask) - _1  # 2⁶⁴ − 1 for none
        likely[kept] = i
        rank[kept] = found
        prefetch(flat_keys, _2 * found)
        kept += bool(found < np.uint64(len(keys)))
    return kept


@njit(cache=True)
def _confirm(index, vocab_size, length, node, token, level, likely, rank, num_likely, matched):
    """Raise the nodes whose keys are right; list them in ``matched``, descending.

    From right to left: ``node[i - 1]`` must still be one level down when position i is confirmed.
    """
    keys = index[0]
    num_matched = 0
    for k in range(num_likely - 1, -1, -1):
        i = likely[k]
        found = rank[k]
        if (np.int64(keys[found, 0]) != node[i - _1]) | (np.int64(keys[found, 1]) != token[i]):
            child = find_child(index, node[i - _1], token[i])
            if child == NO_F_GRAM:
                continue
            found = np.uint64(child)
        node[i] = vocab_size + np.int64(found)
        level[i] = length
        matched[num_matched] = i
        num_matched += 1
    return num_matched


@njit(cache=True)
def _match_block(index, vocab_size, longest, token, node, level, is_first, m, scratch):
    """Raise ``node`` [m] from tokens (level 1; level 0 where nothing may match) to the longest matches.

    No match of two tokens ends at an ``is_first``. So no longer one reaches over it either: all begin as one of two.
    """
    candidates, likely, home, rank, wanted = scratch
    num_candidates = 0
    for i in range(_1, np.uint64(m)):
        candidates[num_candidates] = i
        num_candidates += (level[i - _1] == 1) & (level[i] == 1) & ~is_first[i]
    for length in range(2, longest + 1):
        if num_candidates == 0:
            return
        _request_buckets(index, node, token, candidates, num_candidates, home, wanted)
        num_likely = _find_likely_ranks(index, node, token, candidates, num_candidates, home, wanted, likely, rank)
        num_matched = _confirm(index, vocab_size, length, node, token, level, likely, rank, num_likely, candidates)
        # A match whose left neighbour has none of this length can grow no further.
        num_candidates = 0
        for k in range(num_matched - 1, -1, -1):
            i = candidates[k]
            likely[num_candidates] = i
            num_candidates += level[i - _1] == length
        candidates, likely = likely, candidates


@njit(cache=True, nogil=True)
def match_positions(index, vocab_size, longest, tokens, mask, length, nodes, start, stop):
    """Match the flat positions ``start`` … ``stop`` of a batch of sequences, reading up to N − 1 tokens to their left.

    Args:
        index: `ChildIndex`.
        longest: N, the length of the longest f-gram.
        tokens: int64 [B · T], sequence after sequence.
        mask: uint8 [B · T], 0 where nothing may match or cross, FIRST where an example begins; or [0] for no mask.
        length: T.
        nodes: int64 [B · T]; ``nodes[start:stop]`` is filled.

    Returns:
        The first flat position with a token outside 0 … V − 1, or -1.

    Reference implementation: `reference.longest_matches`, one sequence after the other.
    """
    room = BLOCK + 2 * longest + 2
    token = np.empty(room, np.int64)
    node = np.empty(room, np.int64)
    level = np.empty(room, np.int16)
    is_first = np.zeros(room, np.bool_)
    target = np.empty(room, np.int64)
    scratch = (
        np.empty(room, np.uint64),
        np.empty(room, np.uint64),
        np.empty(room, np.uint64),
        np.empty(room, np.uint64),
        np.empty(room, np.uint32),
    )
    has_mask = len(mask) > 0
    position = start
    while position < stop:
        # A block is a run of sequences or parts of them, each with a break (level 0) and its left context before it.
        m = 0
        while position < stop and m < BLOCK:
            sequence_start = position // length * length
            token[m] = node[m] = level[m] = 0
            target[m] = -1
            m += 1
            context_start = position - (longest - 1)
            end = min(sequence_start + length, stop, position + max(1, BLOCK - m))
            for p in range(max(context_start, sequence_start), end):
                value = tokens[p]
                if value < 0 or value >= vocab_size:
                    return p
                token[m] = node[m] = value
                level[m] = 1 if not has_mask or mask[p] else 0
                is_first[m] = has_mask and mask[p] == FIRST
                target[m] = p if p >= position else -1
                m += 1
            position = end
        _match_block(index, vocab_size, longest, token, node, level, is_first, m, scratch)
        for k in range(m):
            if target[k] >= 0:
                nodes[target[k]] = node[k]
    return np.int64(-1)


@njit(cache=True, nogil=True)
def match_step(index, suffixes, vocab_size, states, tokens, mask, nodes):
    """One token for each sequence: follow (state, token), else fall back to the suffix of the state and try again.

    Args:
        suffixes: unsigned [S]; states, tokens: int64 [B], a state is the node of the position before or -1.
        mask: bool [B] or [0]; nodes: int64 [B], filled.

    Returns:
        The first sequence with a token outside 0 … V − 1 or a state outside -1 … V + S − 1, or -1.

    Reference implementation: `reference.longest_matches` over the whole sequence.
    """
    for b in range(len(tokens)):
        token = tokens[b]
        state = states[b]
        if token < 0 or token >= vocab_size or state < FRESH or state >= vocab_size + len(suffixes):
            return b
        nodes[b] = token
        if len(mask) > 0 and not mask[b]:
            continue
        # A state of length N has no children; its suffix is the first that can have some. At most N fallbacks.
        while state != FRESH:
            rank = find_child(index, state, token)
            if rank != NO_F_GRAM:
                nodes[b] = vocab_size + rank
                break
            state = FRESH if state < vocab_size else np.int64(suffixes[state - vocab_size])
    return np.int64(-1)
