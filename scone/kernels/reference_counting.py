"""Slow equals of the kernels in ``ngram_count.py``, in plain Python: what they must compute, without how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from scone.kernels.ngram_count import NO_ID, NO_PARTITION


def count_n_grams(
    corpora: Iterable[Sequence[int]], max_n: int, separator_ids: Collection[int] = ()
) -> Counter[tuple[int, ...]]:
    """Occurrences of all n-grams of 2 … ``max_n`` tokens that stay inside a corpus and contain no separator."""
    counts: Counter[tuple[int, ...]] = Counter()
    separators = set(separator_ids)
    for corpus in corpora:
        tokens = [int(token) for token in corpus]
        for n in range(2, max_n + 1):
            grams = zip(*(tokens[start:] for start in range(n)), strict=False)
            counts.update(gram for gram in grams if separators.isdisjoint(gram))
    return counts


def partition_keys(
    ids: np.ndarray, carry: int, num_ids: int, multiplier: int, key_bits: int, remainder_bits: int
) -> tuple[list[int], list[list[int]]]:
    """The partition of every position, and the remainders of every partition in the order of positions."""
    parts: list[int] = []
    remainders: list[list[int]] = [[] for _ in range(1 << (key_bits - remainder_bits))]
    before = [int(carry), *(int(value) for value in ids[:-1])] if num_ids else [0] * len(ids)
    for previous, current in zip(before, (int(value) for value in ids), strict=True):
        if NO_ID in (previous, current):
            parts.append(int(NO_PARTITION))
            continue
        shuffled = (previous * num_ids + current) * int(multiplier) % 2**key_bits
        parts.append(shuffled >> remainder_bits)
        remainders[parts[-1]].append(shuffled % 2**remainder_bits)
    return parts, remainders


def count_partition(remainders: Iterable[int]) -> Counter[int]:
    """Occurrences of every remainder."""
    return Counter(int(remainder) for remainder in remainders)


def ids_by_position(ids: np.ndarray, carry: int, num_ids: int, surviving_keys: Sequence[int]) -> list[int]:
    """The new id of the n-gram that ends at every position: the index of its key, or ``NO_ID``.

    What ``ids_of_remainders`` and ``restore_positions`` do together.
    """
    id_of_key = {int(key): index for index, key in enumerate(surviving_keys)}
    before = [int(carry), *(int(value) for value in ids[:-1])]
    found = []
    for previous, current in zip(before, (int(value) for value in ids), strict=True):
        whole = NO_ID not in (previous, current)
        found.append(id_of_key.get(previous * num_ids + current, int(NO_ID)) if whole else int(NO_ID))
    return found
