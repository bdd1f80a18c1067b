"""The counting kernels equal their references: odd sizes, repeats, nothing at all, keys of up to 64 bits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import ngram_count, reference
from scone.kernels.ngram_count import NO_ID

KEY_SPACES = [(3, 4, 1), (3, 4, 3), (50, 12, 6), (1 << 16, 32, 20), (3_000_000_000, 64, 52), (4_294_967_295, 64, 60)]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[np.ndarray, np.uint32, int, int, int]:
    """Ids of a block with the id before it, and a key space: num_ids, key bits, remainder bits."""
    num_ids, key_bits, remainder_bits = draw(st.sampled_from(KEY_SPACES))
    seen = [int(NO_ID), *draw(st.lists(st.integers(0, num_ids - 1), min_size=1, max_size=4))]
    ids = draw(st.lists(st.sampled_from(seen), min_size=1, max_size=200))
    return np.array(ids[1:] or ids, np.uint32), np.uint32(ids[0]), num_ids, key_bits, remainder_bits


def _partitioned(ids, carry, num_ids, key_bits, remainder_bits):  # type: ignore[no-untyped-def]
    multiplier, inverse = ngram_count.multiplier_for(key_bits)
    parts = np.zeros(len(ids), np.uint16)
    remainders = np.zeros(len(ids), np.uint32 if remainder_bits <= 32 else np.uint64)
    offsets = np.zeros((1 << (key_bits - remainder_bits)) + 1, np.int64)
    total = ngram_count.partition_keys(
        ids, carry, num_ids, multiplier, key_bits, remainder_bits, parts, remainders, offsets
    )
    assert total == offsets[-1]
    return multiplier, inverse, parts, remainders, offsets


@settings(max_examples=60, deadline=None)
@given(blocks())
def test_partition_keys_equals_reference(block):
    ids, carry, num_ids, key_bits, remainder_bits = block
    multiplier, inverse, parts, remainders, offsets = _partitioned(*block)
    expected_parts, expected = reference.partition_keys(ids, carry, num_ids, multiplier, key_bits, remainder_bits)
    assert parts.tolist() == expected_parts
    assert [remainders[a:b].tolist() for a, b in pairwise(offsets)] == expected
    for part in set(expected_parts) - {int(ngram_count.NO_PARTITION)}:
        found = remainders[offsets[part] : offsets[part + 1]]
        keys = ngram_count.keys_of_remainders(found, part, inverse, key_bits, remainder_bits)
        assert all(int(key) < num_ids**2 for key in keys)


@settings(max_examples=40, deadline=None)
@given(blocks(), st.integers(0, 2))
def test_ids_come_back_to_their_positions(block, keep_every):
    ids, carry, num_ids, key_bits, remainder_bits = block
    multiplier, inverse, parts, remainders, offsets = _partitioned(*block)
    every_key = {
        int(key)
        for part in range(len(offsets) - 1)
        if offsets[part] < offsets[part + 1]
        for key in ngram_count.keys_of_remainders(
            remainders[offsets[part] : offsets[part + 1]], part, inverse, key_bits, remainder_bits
        )
    }
    survivors = np.array(sorted(every_key)[:: keep_every + 1], np.uint64)
    slot_bits = max(1, (2 * len(survivors)).bit_length())
    table = np.zeros(2 * ((len(offsets) - 1) << slot_bits), remainders.dtype)
    ngram_count.build_id_table(survivors, multiplier, key_bits, remainder_bits, slot_bits, table)
    in_order, found = np.zeros(len(ids), np.uint32), np.zeros(len(ids), np.uint32)
    ngram_count.ids_of_remainders(remainders, offsets, slot_bits, table, in_order)
    ngram_count.restore_positions(in_order, offsets, parts, found)
    expected = reference.ids_by_position(ids, int(carry), num_ids, survivors.tolist())
    assert found.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 5), max_size=60), max_size=4),
    st.sampled_from([np.uint32, np.uint64]),
    st.integers(1, 3),
)
def test_count_partition_equals_counter(shares, dtype, floor):
    remainders = np.array([value for share in shares for value in share], dtype)
    stops = np.cumsum([len(share) for share in shares], dtype=np.int64)
    starts = stops - np.array([len(share) for share in shares], np.int64)
    table, distinct = ngram_count.count_partition(remainders, starts, stops, np.zeros(4, dtype), 0)
    expected = reference.count_partition(remainders.tolist())
    assert distinct == len(expected)
    found, counts = ngram_count.collect_counts(table, floor)
    assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == {
        key: count for key, count in expected.items() if count >= floor
    }


@pytest.mark.parametrize("key_bits", [1, 2, 13, 32, 63, 64])
def test_multiplier_can_be_undone(key_bits):
    multiplier, inverse = ngram_count.multiplier_for(key_bits)
    assert int(multiplier) * int(inverse) % 2**key_bits == 1 % 2**key_bits


def test_counts_are_counted_and_the_last_bin_takes_the_rest():
    histogram = np.zeros(4, np.int64)
    ngram_count.histogram_counts(np.array([1, 1, 2, 3, 4, 2**40], np.uint64), histogram)
    assert histogram.tolist() == [0, 2, 1, 3]


def test_tokens_are_counted_and_the_first_outside_is_found():
    tokens = np.array([1, 2, 2, 7, 9], np.uint16)
    counts = np.zeros(8, np.int64)
    assert ngram_count.histogram_tokens(tokens, counts) == 4
    assert counts.tolist() == [0, 1, 2, 0, 0, 0, 0, 1]
    assert ngram_count.histogram_tokens(tokens[:0], counts) == -1


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
