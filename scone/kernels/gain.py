"""What every candidate says about the next token beyond its suffix: the scores of the ranking by gain.

One thread and basic arithmetic alone, the logarithm included: sums have one order, and a mathematics library that
rounds the last bit otherwise would swap f-grams whose scores are almost equal. So every machine ranks alike.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_SQRT_HALF, _LN2 = math.sqrt(0.5), math.log(2.0)
_TERMS = 11  # of the series below, whose argument is at most 0.172: the next term is 10⁻¹⁷ of the sum
# Of long n-grams that occur once in a long repetition, every length takes a factor of 10⁻⁵ and less: from 64 tokens on
# the product is 0, and nothing can be divided by it.
_LEAST_PROBABILITY = 1e-250


@njit(cache=True)
def natural_log(value):
    """log of a positive float64: with value = m · 2ᵉ and s = (m − 1) / (m + 1), 2 (s + s³/3 + s⁵/5 + …) + e · log 2."""
    mantissa, exponent = math.frexp(value)
    if mantissa < _SQRT_HALF:
        mantissa *= 2.0
        exponent -= 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = 0.0
    for term in range(_TERMS - 1, -1, -1):
        series = series * s * s + 1.0 / (2 * term + 1)
    return 2.0 * s * series + exponent * _LN2


@njit(cache=True, nogil=True)
def closed_scores(
    keys, suffixes, lengths, counts, token_counts, max_n, discount, unseen_weight, least_unseen, half_visits
):
    """The closed score of every candidate, float64 [S]; −∞ for those of more than ``max_n`` tokens.

    Args:
        keys, suffixes, lengths, counts: of a vocabulary in which parts come before what has them.
        token_counts: int64 [V], 0 for separators.
        discount: taken off every count; unseen_weight: of what is lost on continuations that are no candidates;
        least_unseen: the least share that a candidate leaves to them; half_visits: occurrences that halve a gain.

    Reference implementation: `reference.gain_scores`.
    """
    vocab_size, size = len(token_counts), len(keys)
    unseen = np.empty(vocab_size + size, np.int64)  # occurrences of a node whose next token makes no candidate
    unseen[:vocab_size] = token_counts
    for rank in range(size):
        unseen[vocab_size + rank] = np.int64(counts[rank])
    types = np.zeros(vocab_size + size, np.uint32)
    for rank in range(size):
        prefix = np.int64(keys[rank, 0])
        unseen[prefix] -= np.int64(counts[rank])
        types[prefix] += np.uint32(1)

    probability = np.empty(vocab_size + size, np.float64)  # of a node's last token after its prefix
    total = 0
    for token in range(vocab_size):
        total += token_counts[token]
    for token in range(vocab_size):
        probability[token] = (token_counts[token] + 0.5) / (total + 0.5 * vocab_size)

    score = np.zeros(size, np.float64)
    for rank in range(size):
        prefix, count = np.int64(keys[rank, 0]), np.int64(counts[rank])
        of_prefix = token_counts[prefix] if prefix < vocab_size else np.int64(counts[prefix - vocab_size])
        others = max(of_prefix - 1, 1)
        left = min(1.0, discount * (np.int64(types[prefix]) + unseen[prefix]) / others)
        back = probability[np.int64(suffixes[rank])]
        here = max(max(count - 1 - discount, 0.0) / others + left * back, _LEAST_PROBABILITY)
        probability[vocab_size + rank] = here
        if prefix >= vocab_size:
            score[prefix - vocab_size] += count * natural_log(here / back)

    for rank in range(size):
        count, missed = np.int64(counts[rank]), unseen[vocab_size + rank]
        if missed > 0:
            seen = np.int64(types[vocab_size + rank]) + missed - 1
            left = min(1.0, discount * seen / max(count - 1, 1))
            score[rank] += unseen_weight * missed * natural_log(max(left, least_unseen))
        score[rank] *= count / (count + half_visits)

    for rank in range(size - 1, -1, -1):  # what has a part comes after it: when a part is read, it is final
        if lengths[rank] > max_n:
            score[rank] = -np.inf
            continue
        for part in (np.int64(keys[rank, 0]), np.int64(suffixes[rank])):
            if part >= vocab_size:
                score[part - vocab_size] = max(score[part - vocab_size], score[rank])
    return score
