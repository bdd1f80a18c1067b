"""Laws of the trie batch kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels.trie_batch import build_trie_batch
from scone.tests import tiny
from scone.tests.kernels import reference
from scone.tokenization.matcher import Matcher


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    max_n=st.integers(2, 5),
    min_freq=st.sampled_from([1, 3, 10, 10**6]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    num_rows=st.sampled_from([0, 1, 7, 10**6]),
)
def test_trie_batch_equals_its_plain_reference(seed, max_n, min_freq, shape, num_rows):
    vocabulary = tiny.vocabulary(tiny.corpus(300, seed), max_n, min_freq)
    nodes = Matcher(vocabulary).match(tiny.corpus(shape[0] * shape[1], seed).reshape(shape))  # so that much matches
    inputs = (nodes, vocabulary.keys, vocabulary.suffixes, vocabulary.vocab_size, max_n, num_rows)
    fast, plain = build_trie_batch(*inputs), reference.trie_batch(*inputs)
    for name in ("position_index", "f_grams", "f_gram_offsets", "depths", "depth_offsets", "row_ids", "row_chains"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(plain, name), err_msg=name)
    assert (np.diff(fast.f_gram_index) > 0).all()
    # within one depth the order of nodes is free: compare each node by the tokens on its path
    assert sorted(_paths(fast)) == sorted(_paths(plain))
    assert [_paths(fast)[i] for i in fast.f_gram_index] == [_paths(plain)[i] for i in plain.f_gram_index]
    assert [_paths(fast)[i] for i in fast.f_gram_index if len(vocabulary.keys)] == [
        vocabulary.tokens(int(node)) for node in fast.f_grams if len(vocabulary.keys)
    ]


def _paths(batch) -> list[tuple[int, ...]]:
    return [
        tuple(int(batch.tokens[a]) for a in row[: depth + 1])
        for row, depth in zip(batch.ancestors, batch.depths, strict=True)
    ]


@pytest.mark.parametrize("nodes", [np.zeros((0,), np.int64), np.full((2, 3), tiny.SEPARATOR)])
def test_a_batch_without_f_grams_still_has_one_node(nodes):
    vocabulary = tiny.vocabulary()
    batch = build_trie_batch(nodes, vocabulary.keys, vocabulary.suffixes, vocabulary.vocab_size, 3, 5)
    assert not batch.position_index.any()
    assert len(batch.f_grams) == 1
    assert len(batch.tokens) >= 1
