"""The counting kernels equal a Counter: odd sizes, repeats, nothing at all, keys of up to 64 bits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import ngram_count
from scone.kernels.ngram_count import NO_ID

KEY_SPACES = [(3, 4, 1), (3, 4, 3), (50, 12, 6), (1 << 16, 32, 20), (3_000_000_000, 64, 52), (4_294_967_295, 64, 60)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, np.uint32, int, int, int]:
    """Ids of a block with the id before it, and a key space: num_ids, key bits, remainder bits."""
    num_ids, key_bits, remainder_bits = draw(st.sampled_from(KEY_SPACES))
    seen = [int(NO_ID), *draw(st.lists(st.integers(0, num_ids - 1), min_size=1, max_size=4))]
    ids = draw(st.lists(st.sampled_from(seen), min_size=1, max_size=200))
    return np.array(ids[1:] or ids, np.uint32), np.uint32(ids[0]), num_ids, key_bits, remainder_bits


@settings(max_examples=100, deadline=None)
@given(blocks(), st.integers(1, 3), st.integers(0, 200))
def test_keys_are_counted_and_the_ids_of_the_frequent_come_back_to_their_positions(block, floor, cut):
    """What the passes of a count do with one block, whose share of a partition comes in two pieces."""
    ids, carry, num_ids, key_bits, remainder_bits = block
    pairs = zip([int(carry), *ids[:-1].tolist()], ids.tolist(), strict=True)
    keys = [None if NO_ID in pair else pair[0] * num_ids + pair[1] for pair in pairs]
    wanted = {key: n for key, n in Counter(keys).items() if key is not None and n >= floor}
    multiplier, inverse = ngram_count.multiplier_for(key_bits)
    space = (key_bits, remainder_bits)
    parts = np.zeros(len(ids), np.uint16)
    remainders = np.zeros(len(ids), np.uint32 if remainder_bits <= 32 else np.uint64)
    offsets = np.zeros((1 << (key_bits - remainder_bits)) + 1, np.int64)
    total = ngram_count.partition_keys(ids, carry, num_ids, multiplier, *space, parts, remainders, offsets)
    assert total == offsets[-1] == len(keys) - keys.count(None)
    found = {}
    for part in np.flatnonzero(np.diff(offsets)):
        low, high = offsets[part : part + 2]
        starts, stops = np.array([low, min(low + cut, high)]), np.array([min(low + cut, high), high])
        table, _ = ngram_count.count_partition(remainders, starts, stops, np.zeros(4, remainders.dtype), 0)
        frequent, counts = ngram_count.collect_counts(table, floor)
        its_keys = ngram_count.keys_of_remainders(frequent, part, inverse, *space)
        found |= dict(zip(its_keys.tolist(), counts.tolist(), strict=True))
    assert found == wanted
    survivors = np.array(sorted(found), np.uint64)
    slot_bits = max(1, (2 * len(survivors)).bit_length())
    table = np.zeros(2 * ((len(offsets) - 1) << slot_bits), remainders.dtype)
    ngram_count.build_id_table(survivors, multiplier, *space, slot_bits, table)
    in_order, restored = np.zeros(len(ids), np.uint32), np.zeros(len(ids), np.uint32)
    ngram_count.ids_of_remainders(remainders, offsets, slot_bits, table, in_order)
    ngram_count.restore_positions(in_order, offsets, parts, restored)
    place = {key: index for index, key in enumerate(survivors.tolist())}
    assert restored.tolist() == [place.get(key, int(NO_ID)) for key in keys]


@pytest.mark.parametrize("key_bits", [1, 2, 13, 32, 63, 64])
def test_multiplier_can_be_undone(key_bits):
    multiplier, inverse = ngram_count.multiplier_for(key_bits)
    assert int(multiplier) * int(inverse) % 2**key_bits == 1 % 2**key_bits


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=40), st.data())
def test_checksum_is_a_sum_of_pieces_and_sees_changes(values, data):
    words = np.array(values, np.uint16)
    cut = data.draw(st.integers(0, len(words)))
    whole = ngram_count.checksum_words(words, 0)
    assert whole == (ngram_count.checksum_words(words[:cut], 0) + ngram_count.checksum_words(words[cut:], cut)) % 2**64
    changed = words.copy()
    changed[data.draw(st.integers(0, len(words) - 1))] ^= 1
    assert ngram_count.checksum_words(changed, 0) != whole
