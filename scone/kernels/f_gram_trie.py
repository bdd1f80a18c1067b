"""The trie of f-grams in arrays: checked, linked by suffixes, unrolled, walked depth first."""

from __future__ import annotations

import numpy as np
from numba import njit

from scone.kernels.child_index import NO_F_GRAM, find_child, insert_child

VALID, BAD_TOKEN, SEPARATOR_INSIDE, PREFIX_MISSING, SUFFIX_MISSING, DUPLICATE, WRONG_ORDER, TOO_LONG = range(8)
"""Outcomes of `link_f_grams`."""
FAULTS = {
    BAD_TOKEN: "has a token outside 0 … V − 1",
    SEPARATOR_INSIDE: "contains a separator",
    PREFIX_MISSING: "has a prefix that is not an f-gram of lower rank",
    SUFFIX_MISSING: "has a suffix that is not an f-gram of lower rank",
    DUPLICATE: "occurs at a lower rank already",
    WRONG_ORDER: "is out of order (count descending, length ascending, tokens ascending)",
    TOO_LONG: "is longer than max_n",
}


@njit(cache=True, nogil=True)
def check_links(keys, suffixes, lengths, vocab_size, max_n):
    """Whether every node that the arrays point to lies before its f-gram and is one token shorter.

    Cheap enough for every opening of a file, and all that the other kernels need to stay in bounds. Returns the first
    offending rank, or -1.
    """
    for rank in range(len(keys)):
        prefix = np.int64(keys[rank, 0])
        token = np.int64(keys[rank, 1])
        suffix = np.int64(suffixes[rank])
        length = np.int64(lengths[rank])
        end = vocab_size + rank
        if prefix < 0 or prefix >= end or suffix < 0 or suffix >= end or token < 0 or token >= vocab_size:
            return rank
        prefix_length = 1 if prefix < vocab_size else np.int64(lengths[prefix - vocab_size])
        suffix_length = 1 if suffix < vocab_size else np.int64(lengths[suffix - vocab_size])
        if length > max_n or prefix_length != length - 1 or suffix_length != length - 1:
            return rank
    return NO_F_GRAM


@njit(cache=True)
def _contains(sorted_values, value):
    position = np.searchsorted(sorted_values, value)
    return position < len(sorted_values) and sorted_values[position] == value


@njit(cache=True)
def _unroll(keys, vocab_size, rank, length, tokens):
    """Write the ``length`` tokens of the f-gram of ``rank``, first token first, into ``tokens``."""
    position = length - 1
    while position > 0:
        tokens[position] = np.int64(keys[rank, 1])
        node = np.int64(keys[rank, 0])
        position -= 1
        if node < vocab_size:
            tokens[position] = node
            return
        rank = node - vocab_size


@njit(cache=True)
def _is_before(left, right, length):
    for position in range(length):
        if left[position] != right[position]:
            return left[position] < right[position]
    return False


@njit(cache=True, nogil=True)
def link_f_grams(counts, vocab_size, max_n, separators, suffixes, lengths, index):
    """Derive suffixes, lengths and slots from the keys of ``index``, checking everything that makes a vocabulary.

    Every f-gram's prefix and suffix come earlier in the ranking (or are tokens), no f-gram occurs twice or contains a
    separator, and the ranking is strictly by (count descending, length ascending, tokens lexicographic).

    Args:
        counts: unsigned [S]; separators: int64, ascending.
        suffixes: unsigned [S], lengths: uint8 [S]; filled.
        index: a `ChildIndex` (as a plain tuple) with empty slots, which are filled.

    Returns:
        (outcome, rank, max_probes): `VALID`, or what is wrong with the f-gram of that rank.

    Reference implementation: `reference.ranked` and `reference.closed`.
    """
    keys, slots, bits, _ = index
    index = (keys, slots, bits, len(slots))  # until all are in, an empty slot alone ends a search
    before = np.zeros(256, np.int64)
    current = np.zeros(256, np.int64)
    max_probes = 0
    for rank in range(len(keys)):
        prefix = np.int64(keys[rank, 0])
        token = np.int64(keys[rank, 1])
        if token < 0 or token >= vocab_size:
            return BAD_TOKEN, rank, max_probes
        if prefix < 0 or prefix >= vocab_size + rank:
            return PREFIX_MISSING, rank, max_probes
        is_bigram = prefix < vocab_size
        if _contains(separators, token) or (is_bigram and _contains(separators, prefix)):
            return SEPARATOR_INSIDE, rank, max_probes
        length = 2 if is_bigram else np.int64(lengths[prefix - vocab_size]) + 1
        if length > max_n:
            return TOO_LONG, rank, max_probes
        lengths[rank] = length
        suffix = token
        if not is_bigram:
            child = find_child(index, np.int64(suffixes[prefix - vocab_size]), token)
            if child == NO_F_GRAM:
                return SUFFIX_MISSING, rank, max_probes
            suffix = vocab_size + child
        suffixes[rank] = suffix
        if find_child(index, prefix, token) != NO_F_GRAM:
            return DUPLICATE, rank, max_probes
        max_probes = max(max_probes, insert_child(slots, bits, prefix, token, rank))
        _unroll(keys, vocab_size, rank, length, current)
        if rank > 0:
            if counts[rank] > counts[rank - 1]:
                return WRONG_ORDER, rank, max_probes
            if counts[rank] == counts[rank - 1]:
                if length < lengths[rank - 1]:
                    return WRONG_ORDER, rank, max_probes
                if length == lengths[rank - 1] and not _is_before(before, current, length):
                    return WRONG_ORDER, rank, max_probes
        before, current = current, before
    return VALID, len(keys), max_probes


@njit(cache=True, nogil=True)
def unroll_f_grams(keys, lengths, vocab_size, ranks, tokens):
    """Write the tokens of every f-gram in ``ranks`` (int64 [n]) into the rows of ``tokens`` (int64 [n, N])."""
    for row in range(len(ranks)):
        _unroll(keys, vocab_size, ranks[row], np.int64(lengths[ranks[row]]), tokens[row])


@njit(cache=True, nogil=True)
def depth_first_ranks(keys, vocab_size, bigrams_by_first_token, order):
    """Write the ranks in trie preorder into ``order`` (int64 [S]); children in rank order.

    Args:
        bigrams_by_first_token: int64, the ranks of all bigrams in the order in which their subtrees are visited.
    """
    size = len(keys)
    first_child = np.full(size, NO_F_GRAM, np.int64)
    next_sibling = np.full(size, NO_F_GRAM, np.int64)
    for rank in range(size - 1, -1, -1):
        prefix = np.int64(keys[rank, 0])
        if prefix >= vocab_size:
            next_sibling[rank] = first_child[prefix - vocab_size]
            first_child[prefix - vocab_size] = rank
    written = 0
    for root in bigrams_by_first_token:
        rank = root
        while True:
            order[written] = rank
            written += 1
            if first_child[rank] != NO_F_GRAM:
                rank = first_child[rank]
                continue
            while rank != root and next_sibling[rank] == NO_F_GRAM:
                rank = np.int64(keys[rank, 0]) - vocab_size
            if rank == root:
                break
            rank = next_sibling[rank]
    return written
