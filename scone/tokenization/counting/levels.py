"""One level of a count: its key space, the floor that rises with what was found, the survivors, their ids and ranks."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from scone.kernels import ngram_count
from scone.tokenization.counting.blocks import page_array
from scone.tokenization.counting.plan import CountingPlan
from scone.tokenization.f_gram_file import node_dtype

# Counts above are taken as this: the floor that is used while counting is then lower, never wrong.
_HISTOGRAM_SIZE = 1 << 12
_POOL_SLACK = 1 << 12  # candidates beyond 2 S before a pool is cut back, so that small S does not cut all the time


@dataclass(frozen=True)
class KeySpace:
    """How the n-grams of one level are keyed: ``prefix id * num_ids + suffix id`` in the ids of the level below."""

    num_ids: int
    key_bits: int
    remainder_bits: int
    multiplier: np.uint64
    inverse: np.uint64
    dtype: np.dtype

    @classmethod
    def of(cls, plan: CountingPlan, num_ids: int) -> KeySpace:
        """The key space above ``num_ids`` ids."""
        key_bits, remainder_bits = plan.level_bits(num_ids**2)
        multiplier, inverse = ngram_count.multiplier_for(key_bits)
        return cls(num_ids, key_bits, remainder_bits, multiplier, inverse, plan.remainder_dtype(remainder_bits))

    @property
    def num_partitions(self) -> int:
        return 1 << (self.key_bits - self.remainder_bits)


@dataclass(frozen=True)
class FrequentNGrams:
    """What a level found: keys uint64 [K], ascending (so lexicographic), their counts uint64 [K]; and how it was found.

    Only those with a count above ``cut`` get an id: nothing longer than the others can still enter the top.
    """

    num_ids_below: int
    keys: np.ndarray
    counts: np.ndarray
    cut: int
    num_candidates: int
    floor: int

    def id_indices(self) -> np.ndarray:
        """Indices of the survivors that have an id, in the order of their ids."""
        return np.flatnonzero(self.counts > self.cut)


class RisingFloor:
    """The fewest occurrences with which an n-gram can still be among the first S: it rises as candidates are found.

    Once S n-grams with at least c occurrences are known, an n-gram of the same level needs c, since it may come before
    them in lexicographic order; a longer one needs c + 1, since ties go to the shorter one.
    """

    def __init__(self, min_freq: int, max_f_grams: int | None) -> None:
        self._max_f_grams = max_f_grams
        self._histogram = np.zeros(_HISTOGRAM_SIZE, np.int64)
        self._finished: list[np.ndarray] = []
        self._lock = threading.Lock()
        self.cut = 0
        self.value = max(1, min_freq)

    def add(self, counts: np.ndarray) -> int:
        """Take the counts of new candidates of this level into account; returns the floor. Any thread may call."""
        if self._max_f_grams is None:
            return self.value
        with self._lock:
            sizes = np.minimum(counts, np.uint64(_HISTOGRAM_SIZE - 1)).astype(np.int64)  # the last takes the rest
            self._histogram += np.bincount(sizes, minlength=_HISTOGRAM_SIZE)
            at_least = np.cumsum(self._histogram[::-1])[::-1]
            enough = np.flatnonzero(at_least >= self._max_f_grams)
            if len(enough):
                self.value = max(self.value, int(enough[-1]))
            return self.value

    def finish_level(self, counts: np.ndarray) -> int:
        """End a level with all the counts that it kept; returns its cut, above which a count earns an id."""
        self._finished.append(counts)
        if self._max_f_grams is not None:
            everything = np.concatenate(self._finished)
            if len(everything) >= self._max_f_grams:
                place = len(everything) - self._max_f_grams
                self.cut = max(self.cut, int(np.partition(everything, place)[place]))
                self.value = max(self.value, self.cut + 1)
        return self.cut


class CandidatePool:
    """Candidates of one level, never many more than can be among the first S. Any thread may add."""

    def __init__(self, floor: RisingFloor, max_f_grams: int | None) -> None:
        self._floor = floor
        self._max_f_grams = max_f_grams
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._lock = threading.Lock()
        self.num_candidates = 0

    @property
    def floor(self) -> int:
        """The fewest occurrences that are worth adding now."""
        return self._floor.value

    def add(self, keys: np.ndarray, counts: np.ndarray, num_candidates: int) -> None:
        """Add ``keys`` with ``counts``, found among ``num_candidates`` different n-grams."""
        self._floor.add(counts)
        with self._lock:
            self.num_candidates += num_candidates
            self._pieces.append((keys, counts))
            self._size += len(keys)
            if self._max_f_grams is not None and self._size > 2 * self._max_f_grams + _POOL_SLACK:
                self._compact()

    def _compact(self) -> None:
        floor = np.uint64(self._floor.value)
        kept = [counts >= floor for _, counts in self._pieces]
        keys = np.concatenate([keys[mask] for (keys, _), mask in zip(self._pieces, kept, strict=True)])
        counts = np.concatenate([counts[mask] for (_, counts), mask in zip(self._pieces, kept, strict=True)])
        self._pieces = [first_of(keys, counts, self._max_f_grams)]
        self._size = len(self._pieces[0][0])

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything that can be among the first S, by ascending key. Empties the pool."""
        if not self._pieces:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._compact()
        keys, counts = self._pieces.pop()
        self._size = 0
        order = np.argsort(keys)
        return keys[order], counts[order]


def first_of(keys: np.ndarray, counts: np.ndarray, number: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first ``number`` by (count descending, key ascending), in no promised order."""
    if number is None or len(keys) <= number:
        return keys, counts
    if number == 0:
        return keys[:0], counts[:0]
    place = len(counts) - number
    cut = np.partition(counts, place)[place]
    above = counts > cut
    ties = np.flatnonzero(counts == cut)
    wanted = number - int(above.sum())
    lowest = ties[np.argpartition(keys[ties], wanted - 1)[:wanted]] if wanted < len(ties) else ties
    above[lowest] = True
    return keys[above], counts[above]


@dataclass(frozen=True)
class IdTable:
    """Looks the ids of a level's survivors up by partition and remainder."""

    slot_bits: int
    slots: np.ndarray

    @classmethod
    def build(cls, keys: np.ndarray, space: KeySpace) -> IdTable:
        """``keys`` uint64 [K] ascending; the id of a key is its index."""
        mask = np.uint64(2**space.key_bits - 1)
        shuffled = (keys * space.multiplier) & mask
        sizes = np.bincount((shuffled >> np.uint64(space.remainder_bits)).astype(np.int64), minlength=1)
        slot_bits = max(1, int(2 * sizes.max() - 1).bit_length() if len(keys) else 1)
        table = cls(slot_bits, page_array(2 * (space.num_partitions << slot_bits), space.dtype))
        ngram_count.build_id_table(keys, space.multiplier, space.key_bits, space.remainder_bits, slot_bits, table.slots)
        return table


def rank_survivors(
    token_of_id: np.ndarray, levels: list[FrequentNGrams], vocab_size: int, max_f_grams: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first S over all levels by frequency: keys [S, 2], suffixes, lengths and counts, as a vocabulary has them.

    ``token_of_id`` uint32 [K]: the tokens that have ids; ``levels[0]`` holds the bigrams. Levels follow one another
    from short to long and each is in lexicographic order, so a stable sort by count gives the total order of ranks.
    Takes the levels out of the list, so that each is free when it has been placed.
    """
    if not any(len(level.keys) for level in levels):
        nodes = node_dtype(vocab_size, 0)
        return np.empty((0, 2), nodes), np.empty(0, nodes), np.empty(0, np.uint8), np.empty(0, np.uint64)
    cut = np.uint64(levels[-1].cut)  # of all levels: what occurs less often is not among the first S
    order, counts = _by_falling_count([level.counts for level in levels], cut, max_f_grams)
    total, size = len(order), len(counts)
    rank_of = np.full(total, total, np.uint32 if total < 2**32 else np.uint64)
    rank_of[order[:size]] = np.arange(size, dtype=rank_of.dtype)
    del order
    nodes = node_dtype(vocab_size, size)
    keys, suffixes = np.empty((size, 2), nodes), np.empty(size, nodes)
    lengths = np.empty(size, np.uint8)
    node_of_id, last_of_id = token_of_id.astype(np.uint64), token_of_id
    start, length = 0, 2
    while levels:
        level = levels.pop(0)
        radix = np.uint64(max(1, level.num_ids_below))
        kept = level.counts >= cut
        stop = start + int(np.count_nonzero(kept))
        ranks = np.full(len(kept), total, rank_of.dtype)
        ranks[kept] = rank_of[start:stop]
        last = last_of_id[level.keys % radix]
        chosen = np.flatnonzero(ranks < size)
        places, keys_of_chosen = ranks[chosen], level.keys[chosen]
        keys[places, 0] = node_of_id[keys_of_chosen // radix]
        keys[places, 1] = last[chosen]
        suffixes[places] = node_of_id[keys_of_chosen % radix]
        lengths[places] = length
        with_id = level.id_indices()
        # an id whose n-gram fell out of the first S has no node; nothing that was chosen refers to it
        node_of_id = ranks[with_id].astype(np.uint64) + np.uint64(vocab_size)
        last_of_id = last[with_id]
        start, length = stop, length + 1
    return keys, suffixes, lengths, counts


def _by_falling_count(
    counts_of_levels: list[np.ndarray], cut: np.uint64, number: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of the counts that reach ``cut``, numbered from the first level on: their numbers by falling count, equal ones in
    order, int64; and the first ``number`` counts in that order, uint64.

    A sort of integers that hold count and number is several times faster than a stable sort of indices.
    """
    sizes = [int(np.count_nonzero(counts >= cut)) for counts in counts_of_levels]
    bits = np.uint64(sum(sizes).bit_length())
    most = max(counts.max() for counts in counts_of_levels if len(counts))
    assert int(most).bit_length() + int(bits) <= 64, (most, sizes)
    packed = np.empty(sum(sizes), np.uint64)
    start = 0
    for counts, size in zip(counts_of_levels, sizes, strict=True):  # in place: this is where most is held
        part = packed[start : start + size]
        part[:] = counts[counts >= cut]
        np.subtract(most, part, out=part)
        part <<= bits
        part |= np.arange(start, start + size, dtype=np.uint64)
        start += size
    packed.sort()
    first = packed[:number] >> bits
    np.subtract(most, first, out=first)
    packed &= (np.uint64(1) << bits) - np.uint64(1)
    return packed.view(np.int64), first
