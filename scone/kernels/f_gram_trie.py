"""The trie of f-grams in arrays: its hash index, checked, linked by suffixes, unrolled, walked depth first.

The index leads from (prefix node, last token) to the rank of an f-gram: 32-bit slots in buckets of 16, one cache line
each. A slot is 0 when empty, else ``rank + 1`` in its low ``rank_bits`` bits and a fingerprint of the key in the spare
high bits; a hit is confirmed in ``keys``, so a wrong fingerprint costs time and never correctness. A key lives in its
home bucket, or where that is full in the next one with room; buckets fill from their first slot on, so an empty last
slot ends a search. Nothing here trusts the slots: a damaged index finds too little, it does not read out of bounds and
does not loop for ever.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from scone.utils.errors import SconeError

LANES = 16
"""Slots that `largest_match` compares: 64 bytes, one cache line."""

_INT32 = ir.IntType(32)
_VECTOR = ir.VectorType(_INT32, LANES)


def _pointer_to(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _largest_match(typing_context, slots, start, wanted, low_mask):
    """The largest of ``slots[start : start + 16]`` (uint32) that equals ``wanted`` above ``low_mask``; 0 for none.

    In numpy: ``max(0, *group[(group ^ wanted) <= low_mask])``. Nothing checks the bounds. LLVM makes of it what the
    processor has: three instructions with AVX-512, a loop elsewhere.
    """
    signature = types.uint32(slots, types.uint64, types.uint32, types.uint32)

    def generate(context, builder, signature, arguments):
        array, start, wanted, low_mask = arguments
        pointer = _pointer_to(context, builder, signature.args[0], array, start)
        group = builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()))
        group.align = 4
        differs = builder.xor(group, _in_all_lanes(builder, wanted))
        is_match = builder.icmp_unsigned("<=", differs, _in_all_lanes(builder, low_mask))
        kept = builder.select(is_match, group, ir.Constant(_VECTOR, [0] * LANES))
        name = f"llvm.vector.reduce.umax.v{LANES}i32"
        largest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT32, [_VECTOR]), name)
        return builder.call(largest, [kept])

    return signature, generate


def _in_all_lanes(builder, value):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first_lane = builder.insert_element(undefined, value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first_lane, undefined, ir.Constant(_VECTOR, [0] * LANES))


def _prefetch(typing_context, array, index):
    """Ask for the cache line of ``array[index]`` and do not wait. Any index is harmless: a prefetch never faults.

    Args:
        array: one-dimensional, contiguous.
    """
    signature = types.void(array, types.uint64)

    def generate(context, builder, signature, arguments):
        pointer = _pointer_to(context, builder, signature.args[0], *arguments)
        byte_pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep_in_all_caches, data = (ir.Constant(_INT32, number) for number in (0, 3, 1))
        builder.call(function, [builder.bitcast(pointer, byte_pointer), read, keep_in_all_caches, data])
        return context.get_dummy_value()

    return signature, generate


# `Any`, because numba supplies the first argument and type checkers cannot know it.
largest_match: Any = intrinsic(_largest_match)
prefetch: Any = intrinsic(_prefetch)


NO_F_GRAM = -1
"""What lookups return when the vocabulary has no such f-gram."""

MOST_F_GRAMS = 2**32 - 1
"""Whose ``rank + 1`` fits a slot."""

BUCKET = LANES

_BUCKET = np.uint64(BUCKET)
_PREFIX_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_TOKEN_FACTOR = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_1 = np.uint64(1)
_32 = np.uint64(32)
_LOW_32 = np.uint64(0xFFFFFFFF)


def check_number_of_f_grams(number: int) -> None:
    """Raises SconeError for more than a slot can tell apart."""
    if number > MOST_F_GRAMS:
        raise SconeError(
            f"found {number:,} f-grams; expected at most {MOST_F_GRAMS:,}, which 32 bits tell apart; ask for fewer "
            "(--max_f_grams), or raise --min_freq"
        )


def num_slots(num_f_grams: int) -> int:
    """Slots of an index over ``num_f_grams`` f-grams: whole buckets, and always some that stay empty.

    5/3 slots of 4 bytes an f-gram, beside 13 bytes in arrays, stay below 20 bytes; a few in a hundred buckets overflow.
    """
    return max(4, num_f_grams * 5 // 3 // BUCKET) * BUCKET


def rank_bits(num_f_grams: int) -> int:
    """Low bits of a slot that hold ``rank + 1``; the other ``32 - rank_bits`` hold the fingerprint."""
    return max(1, int(num_f_grams).bit_length())


class ChildIndex(NamedTuple):
    """What `find_child` reads: the f-grams' keys and the slots that lead to them (compiled code: as a plain tuple)."""

    keys: np.ndarray
    """Unsigned [S, 2], prefix node and last token of every rank."""
    slots: np.ndarray
    """uint32 [M]."""
    rank_bits: int
    max_probes: int
    """Slots from the start of a home bucket beyond which no key lies."""

    @classmethod
    def build(cls, keys: np.ndarray) -> ChildIndex:
        """Index ``keys`` (about 0.1 µs an f-gram)."""
        slots, bits = empty_slots(len(keys)), rank_bits(len(keys))
        max_probes = build_child_index(keys, slots, bits)
        return cls(frozen(keys), frozen(slots), bits, int(max_probes))


def empty_slots(num_f_grams: int) -> np.ndarray:
    """Zeroed slots that begin on a cache line, so that a bucket is one."""
    check_number_of_f_grams(num_f_grams)
    size = num_slots(num_f_grams)
    room = np.zeros(size + BUCKET, np.uint32)
    skipped = -room.ctypes.data % (4 * BUCKET) // 4
    return room[skipped : skipped + size]


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view: vocabularies are shared, and kernels compile once for loaded and for made ones."""
    view = array.view()
    view.flags.writeable = False
    return view


@njit(cache=True, inline="always")
def hash_key(prefix, token):
    """Mix a key into 64 bits: the top 32 choose the bucket, the next ones are the fingerprint."""
    mixed = np.uint64(prefix) * _PREFIX_FACTOR + np.uint64(token) * _TOKEN_FACTOR
    return (mixed ^ (mixed >> _32)) * _MIX_FACTOR


@njit(cache=True, inline="always")
def home_slot(hashed, slots_length):
    """First slot of the home bucket: the top 32 bits scaled to the number of buckets, which is any number."""
    return (((hashed >> _32) * (np.uint64(slots_length) // _BUCKET)) >> _32) * _BUCKET


@njit(cache=True, inline="always")
def fingerprint_of(hashed, bits):
    """The fingerprint, uint32, at its place above ``bits`` rank bits."""
    return np.uint32(((hashed & _LOW_32) >> np.uint64(bits)) << np.uint64(bits))


@njit(cache=True, inline="always")
def low_mask_of(bits):
    """uint32 with the ``bits`` rank bits set."""
    return np.uint32((_1 << np.uint64(bits)) - _1)


@njit(cache=True)
def find_child(index, prefix, token):
    """Rank of the f-gram (``prefix`` node, ``token``), both int64, or -1.

    Reference implementation: a dictionary from keys to ranks.
    """
    keys, slots, bits, max_probes = index
    hashed = hash_key(prefix, token)
    wanted = fingerprint_of(hashed, bits)
    low_mask = low_mask_of(bits)
    slot = home_slot(hashed, len(slots))
    for _ in range(max_probes):
        value = slots[slot]
        if value == 0:
            return NO_F_GRAM
        if np.uint32(value ^ wanted) <= low_mask:
            rank = np.int64(value & low_mask) - 1
            if 0 <= rank < len(keys) and np.int64(keys[rank, 0]) == prefix and np.int64(keys[rank, 1]) == token:
                return rank
        slot += _1
        if slot == np.uint64(len(slots)):
            slot = np.uint64(0)
    return NO_F_GRAM


@njit(cache=True)
def insert_child(slots, bits, prefix, token, rank):
    """Put a new key's ``rank`` into the first empty slot from its home; returns how many slots that looked at."""
    hashed = hash_key(prefix, token)
    slot = home_slot(hashed, len(slots))
    probes = 1
    while slots[slot] != 0:
        slot += _1
        probes += 1
        if slot == np.uint64(len(slots)):
            slot = np.uint64(0)
    slots[slot] = fingerprint_of(hashed, bits) | np.uint32(rank + 1)
    return probes


@njit(cache=True, nogil=True)
def build_child_index(keys, slots, bits):
    """Fill zeroed ``slots`` with all ``keys`` in rank order.

    Returns:
        max_probes: the most slots that an insertion looked at (0 for no f-grams).
    """
    max_probes = 0
    for rank in range(len(keys)):
        probes = insert_child(slots, bits, np.int64(keys[rank, 0]), np.int64(keys[rank, 1]), rank)
        max_probes = max(max_probes, probes)
    return max_probes


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
def link_f_grams(counts, is_by_count, vocab_size, max_n, separators, suffixes, lengths, index):
    """Derive suffixes, lengths and slots from the keys of ``index``, checking everything that makes a vocabulary.

    Every f-gram's prefix and suffix come earlier in the ranking (or are tokens), no f-gram occurs twice or contains a
    separator, and the ranking, where ``is_by_count``, is strictly by (count descending, length ascending, tokens
    lexicographic).

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
        if not is_by_count:
            continue
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
