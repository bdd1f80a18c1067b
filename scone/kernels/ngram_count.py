"""Hot loops of n-gram counting: key the n-grams of a block, partition the keys, count a partition, bring ids back.

An n-gram of level n + 1 that ends at position i is known by the ids of the two n-grams of level n that end at i - 1 and
at i (its prefix and its suffix). Its key is ``prefix * num_ids + suffix``, and ids are given in lexicographic order, so
keys compare as the tokens do. A multiplication by an odd number modulo a power of two shuffles keys and can be undone:
the upper bits of the product choose a partition and only the lower bits (the *remainder*) are stored.

One block of positions goes through ``partition_keys``; its remainders are then ordered by partition and inside one by
position. ``count_partition`` counts one partition over all blocks in a hash table that fits in the L2 cache.
``ids_of_remainders`` replaces remainders by the new ids, and ``restore_positions`` streams them back into the order of
positions: that pass reads each partition's stream from front to back, so nothing in it misses the cache.

All kernels release the GIL and run on one core; the callers use threads. Reference implementation of all together:
``collections.Counter`` of the keys.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# "no n-gram of this level ends here": a separator, the start of a corpus, or an n-gram that did not survive
NO_ID = np.uint32(0xFFFFFFFF)
NO_PARTITION = np.uint16(0xFFFF)
_ONE = np.uint64(1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: multiplying by it spreads keys over the upper bits


def multiplier_for(key_bits: int) -> tuple[np.uint64, np.uint64]:
    """An odd multiplier that shuffles keys of ``key_bits`` bits, and its inverse, modulo ``2**key_bits``."""
    modulus = 1 << key_bits
    multiplier = ((int(_GOLDEN) >> (64 - key_bits)) | 1) if key_bits else 1
    return np.uint64(multiplier % modulus), np.uint64(pow(multiplier, -1, modulus) if modulus > 1 else 0)


@njit(nogil=True, cache=True)
def histogram_tokens(tokens, counts):
    """Add the occurrences of each token to ``counts`` int64 [V]. Returns the index of the first token >= V, else -1.

    ``tokens`` unsigned [L]. Reference implementation: ``numpy.bincount``.
    """
    limit = np.uint64(counts.size)
    for i in range(tokens.size):
        token = np.uint64(tokens[i])
        if token >= limit:
            return i
        counts[token] += 1
    return -1


@njit(nogil=True, cache=True)
def checksum_words(words, start):
    """A 64-bit sum of ``words`` (unsigned [L]), each weighted by a hash of its index ``start + i``: finds changes.

    Sums of neighbouring pieces add up (modulo 2**64) to the sum of the whole.
    """
    total = np.uint64(0)
    for i in range(words.size):
        index = np.uint64(start) + np.uint64(i)
        total += (np.uint64(words[i]) + _ONE) * ((index * _GOLDEN) | _ONE)
    return total


@njit(nogil=True, cache=True)
def map_tokens(tokens, id_of_token, ids):
    """Write ``id_of_token[token]`` into ``ids`` uint32 [L] (``NO_ID`` for separators and tokens that are too rare)."""
    for i in range(tokens.size):
        ids[i] = id_of_token[tokens[i]]


@njit(nogil=True, cache=True)
def partition_keys(ids, carry, num_ids, multiplier, key_bits, remainder_bits, parts, remainders, offsets):
    """Key every n-gram of a block and scatter the remainders by partition. Returns how many n-grams there were.

    ids        uint32 [L]: the n-gram of the level below that ends at each position, or ``NO_ID``
    carry      the id at the position before the block (``NO_ID`` where there is none)
    num_ids    how many ids the level below has
    parts      uint16 [L], written: the partition of the key of each position, or ``NO_PARTITION``
    remainders unsigned [>= L], written: ordered by partition, then by position
    offsets    int64 [P + 1], written: partition p is at ``offsets[p]:offsets[p + 1]``
    """
    num_partitions = offsets.size - 1
    radix = np.uint64(num_ids)
    mask = _low_bits(key_bits)
    remainder_mask = _low_bits(remainder_bits)
    shift = np.uint64(remainder_bits)
    cursors = np.zeros(num_partitions, np.uint64)
    previous = np.uint32(carry)
    for i in range(np.uint64(ids.size)):
        current = ids[i]
        if previous == NO_ID or current == NO_ID:
            parts[i] = NO_PARTITION
        else:
            part = (((np.uint64(previous) * radix + np.uint64(current)) * multiplier) & mask) >> shift
            parts[i] = np.uint16(part)
            cursors[part] += _ONE
        previous = current
    total = np.uint64(0)
    for part in range(num_partitions):
        offsets[part] = total
        count = cursors[part]
        cursors[part] = total
        total += count
    offsets[num_partitions] = total
    previous = np.uint32(carry)
    for i in range(np.uint64(ids.size)):
        current = ids[i]
        if parts[i] != NO_PARTITION:
            part = np.uint64(parts[i])
            target = cursors[part]
            remainders[target] = ((np.uint64(previous) * radix + np.uint64(current)) * multiplier) & remainder_mask
            cursors[part] = target + _ONE
        previous = current
    return total


@njit(nogil=True, cache=True)
def _low_bits(bits):
    """A mask of the lower ``bits`` bits, 0 … 64."""
    return (_ONE << np.uint64(bits)) - _ONE if bits < 64 else ~np.uint64(0)


@njit(nogil=True, cache=True)
def count_partition(remainders, starts, stops, table, distinct):
    """Add the remainders of one partition to an open-addressing table.

    remainders unsigned [M]: of all blocks; block b's share of this partition is ``starts[b]:stops[b]`` (int64 [blocks])
    table      of the type of ``remainders`` [2 * capacity, a power of two, at least 4]: remainder and count side by
               side, count 0 where free; a count must fit the type
    distinct   how many different remainders the table holds already
    Returns the table, a larger one if it had to grow, and how many different remainders it holds now.
    """
    for block in range(starts.size):
        position = starts[block]
        while True:
            position, added = _count_run(remainders, position, stops[block], table, table.size // 4 - distinct)
            distinct += added
            if position == stops[block]:
                break
            table = _grown(table)
    return table, distinct


@njit(nogil=True, cache=True)
def collect_counts(table, floor):
    """(remainders, counts) uint64 [K] of those that occur at least ``floor`` >= 1 times, in no promised order."""
    kept = 0
    for slot in range(1, table.size, 2):
        kept += table[slot] >= floor
    kept_remainders = np.empty(kept, np.uint64)
    kept_counts = np.empty(kept, np.uint64)
    kept = 0
    for slot in range(1, table.size, 2):
        if table[slot] >= floor:
            kept_remainders[kept] = table[slot - 1]
            kept_counts[kept] = table[slot]
            kept += 1
    return kept_remainders, kept_counts


@njit(nogil=True, cache=True)
def _count_run(remainders, start, stop, table, room):
    """Count ``remainders[start:stop]`` until ``room`` new ones were added. Returns where it stopped, how many it added.

    All indices are unsigned: with signed ones, which may be negative, this loop is three times slower.
    """
    shift = _table_shift(table)
    mask = np.uint64(table.size // 2 - 1)
    added = np.int64(0)
    for i in range(np.uint64(start), np.uint64(stop)):
        remainder = remainders[i]
        slot = (np.uint64(remainder) * _GOLDEN) >> shift
        while True:
            entry = slot << _ONE
            count = table[entry + _ONE]
            if count == 0:
                if added == room:
                    return np.int64(i), added
                added += 1
                table[entry] = remainder
                table[entry + _ONE] = 1
                break
            if table[entry] == remainder:
                table[entry + _ONE] = count + table.dtype.type(1)
                break
            slot = (slot + _ONE) & mask
    return stop, added


@njit(nogil=True, cache=True)
def _grown(table):
    """A table of twice the capacity with the same entries."""
    larger = np.zeros(2 * table.size, table.dtype)
    shift = _table_shift(larger)
    mask = np.uint64(larger.size // 2 - 1)
    for entry in range(0, table.size, 2):
        if table[entry + 1] != 0:
            slot = (np.uint64(table[entry]) * _GOLDEN) >> shift
            while larger[(slot << _ONE) + _ONE] != 0:
                slot = (slot + _ONE) & mask
            larger[slot << _ONE] = table[entry]
            larger[(slot << _ONE) + _ONE] = table[entry + 1]
    return larger


@njit(nogil=True, cache=True)
def _table_shift(table):
    """How far a multiplied remainder is shifted so that the table's number of slots remains."""
    shift = np.uint64(64)
    slots = table.size // 2
    while slots > 1:
        slots //= 2
        shift -= _ONE
    return shift


@njit(nogil=True, cache=True)
def keys_of_remainders(remainders, partition, inverse, key_bits, remainder_bits):
    """Undo the shuffle: the keys uint64 [K] of one partition's ``remainders`` [K]."""
    mask = _low_bits(key_bits)
    upper = np.uint64(partition) << np.uint64(remainder_bits)
    keys = np.empty(remainders.size, np.uint64)
    for i in range(remainders.size):
        keys[i] = ((upper | np.uint64(remainders[i])) * inverse) & mask
    return keys


@njit(nogil=True, cache=True)
def build_id_table(keys, multiplier, key_bits, remainder_bits, slot_bits, table):
    """Fill one lookup table per partition from the surviving ``keys`` uint64 [K]: the id of a key is its index.

    Partition p has the ``2**slot_bits`` slots from ``p << slot_bits``; none may be full. ``table`` (type of the
    remainders) holds the remainder and the id of every slot of every partition side by side, where one look finds both.
    """
    mask = _low_bits(key_bits)
    remainder_mask = _low_bits(remainder_bits)
    slot_mask = _low_bits(slot_bits)
    table[:] = NO_ID
    for i in range(keys.size):
        shuffled = (keys[i] * multiplier) & mask
        remainder = shuffled & remainder_mask
        first = (shuffled >> np.uint64(remainder_bits)) << np.uint64(slot_bits)
        slot = (remainder * _GOLDEN) >> np.uint64(64 - slot_bits)
        while table[((first + slot) << _ONE) + _ONE] != NO_ID:
            slot = (slot + _ONE) & slot_mask
        table[(first + slot) << _ONE] = remainder
        table[((first + slot) << _ONE) + _ONE] = i


@njit(nogil=True, cache=True)
def ids_of_remainders(remainders, offsets, slot_bits, table, ids):
    """Write the id of each remainder of a block (``NO_ID`` if it did not survive) into ``ids`` uint32, in that order.

    ``offsets`` int64 [P + 1] as from ``partition_keys``, ``table`` as from ``build_id_table`` with ``slot_bits`` >= 1.
    """
    shift = np.uint64(64 - slot_bits)
    slot_mask = _low_bits(slot_bits)
    for part in range(offsets.size - 1):
        first = np.uint64(part) << np.uint64(slot_bits)
        for i in range(np.uint64(offsets[part]), np.uint64(offsets[part + 1])):
            remainder = remainders[i]
            slot = (np.uint64(remainder) * _GOLDEN) >> shift
            entry = (first + slot) << _ONE
            found = table[entry + _ONE]
            while found != NO_ID and table[entry] != remainder:
                slot = (slot + _ONE) & slot_mask
                entry = (first + slot) << _ONE
                found = table[entry + _ONE]
            ids[i] = found


@njit(nogil=True, cache=True)
def restore_positions(ids_by_partition, offsets, parts, ids):
    """Bring ids that are ordered by partition back into the order of positions: ``ids`` uint32 [L], else ``NO_ID``.

    Reads every partition's stream once from front to back, guided by ``parts`` uint16 [L].
    """
    cursors = offsets.astype(np.uint64)
    for i in range(np.uint64(parts.size)):
        if parts[i] == NO_PARTITION:
            ids[i] = NO_ID
        else:
            part = np.uint64(parts[i])
            source = cursors[part]
            ids[i] = ids_by_partition[source]
            cursors[part] = source + _ONE
