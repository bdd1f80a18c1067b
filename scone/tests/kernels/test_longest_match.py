"""The index and matching kernels equal their plain references, also on damaged input and beyond one block."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from scone.kernels import f_gram_trie, longest_match
from scone.kernels.f_gram_trie import LANES, ChildIndex, largest_match, prefetch
from scone.tests.kernels import reference
from scone.tests.tokenization.f_gram_strategies import cases
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError


@njit
def call_instructions(slots, start, wanted, low_mask):
    prefetch(slots, np.uint64(start) - np.uint64(1))  # may lie outside: harmless
    return largest_match(slots, np.uint64(start), np.uint32(wanted), np.uint32(low_mask))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=LANES + 3, max_size=LANES + 3),
    st.integers(0, 3),
    st.integers(0, LANES + 2),
    st.integers(0, 32),
)
def test_largest_match_equals_numpy(values, start, like, bits):
    slots = np.array(values, np.uint32)
    low_mask = np.uint32(2**bits - 1)
    wanted = slots[like] & ~low_mask
    group = slots[start : start + LANES]
    expected = max(0, *group[(group ^ wanted) <= low_mask].tolist(), 0)
    assert call_instructions(slots, start, wanted, low_mask) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**33), st.integers(0, 2**32 - 1)), unique=True, max_size=300), st.data())
def test_index_equals_a_dictionary(pairs, data):
    keys = np.array(pairs, np.uint64).reshape(-1, 2)
    index = ChildIndex.build(keys)
    absent = data.draw(st.lists(st.tuples(st.integers(0, 2**33), st.integers(0, 2**32 - 1)), max_size=20))
    rank_of = {pair: rank for rank, pair in enumerate(pairs)}
    for prefix, token in pairs + absent:
        found = f_gram_trie.find_child(tuple(index), prefix, token)
        assert found == rank_of.get((prefix, token), f_gram_trie.NO_F_GRAM)


def test_slots_keep_the_index_within_its_bytes():
    for num_f_grams in (0, 1, 47, 48, 49, 1000, 10**6, 10**7):
        slots = f_gram_trie.num_slots(num_f_grams)
        assert slots % LANES == 0
        assert slots > num_f_grams
        if num_f_grams >= 48:
            assert 13 * num_f_grams + 4 * slots <= 20 * num_f_grams


@settings(max_examples=40, deadline=None)
@given(cases())
def test_depth_first_order_is_the_preorder(case):
    assert case.vocabulary.depth_first_order().tolist() == reference.depth_first(case.f_grams)


@cache
def long_case() -> tuple[FGramVocabulary, np.ndarray]:
    """A vocabulary and a row of tokens that spans several blocks, with matches across every boundary."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 3, 4 * longest_match.BLOCK + 7)
    corpus = tokens.tolist()
    grams = [tuple(corpus[start : start + n]) for n in range(2, 7) for start in range(len(corpus) - n + 1)]
    counts = dict.fromkeys(grams, 0)
    for gram in grams:
        counts[gram] += 1
    return reference.vocabulary_of(counts, vocab_size=3, max_f_grams=500), tokens


def match_range(vocabulary: FGramVocabulary, tokens: np.ndarray, start: int, stop: int) -> np.ndarray:
    nodes = np.full(len(tokens), -7, np.int64)
    sizes, row = (vocabulary.vocab_size, vocabulary.longest), (tokens, np.zeros(0, bool), len(tokens))
    wrong = longest_match.match_positions(tuple(vocabulary.index), *sizes, *row, nodes, start, stop)
    assert wrong == -1
    return nodes


def test_any_range_of_positions_equals_the_whole():
    vocabulary, tokens = long_case()
    f_grams = [vocabulary.tokens(vocabulary.vocab_size + rank) for rank in range(vocabulary.num_f_grams)]
    assert vocabulary.depth_first_order().tolist() == reference.depth_first(f_grams)  # of many branches
    expected = reference.longest_matches(tokens.tolist(), f_grams, vocabulary.vocab_size)
    whole = match_range(vocabulary, tokens, 0, len(tokens))
    assert whole.tolist() == expected
    for start, stop in ((0, 1), (1, 2), (5, 517), (511, 1025), (len(tokens) - 1, len(tokens)), (9, 9)):
        nodes = match_range(vocabulary, tokens, start, stop)
        assert (nodes[start:stop] == whole[start:stop]).all()
        assert (nodes[:start] == -7).all()
        assert (nodes[stop:] == -7).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_damaged_index_is_harmless(seed):
    """Slots of any content, no empty one among them: wrong answers are allowed, nodes out of range are not."""
    vocabulary, tokens = long_case()
    random = np.random.default_rng(seed)
    index = vocabulary.index
    slots = random.integers(0, 2**32, len(index.slots), dtype=np.uint32) | np.uint32(1)
    names = ("keys", "suffixes", "lengths", "counts", "vocab_size", "max_n")
    same = {name: getattr(vocabulary, name) for name in names}
    damaged = FGramVocabulary(**same, _index=index._replace(slots=slots))
    nodes = match_range(damaged, tokens[:600], 0, 600)
    assert ((nodes >= 0) & (nodes < vocabulary.num_nodes)).all()


def test_links_that_point_forward_are_found():
    vocabulary, _ = long_case()
    arrays = {name: np.array(getattr(vocabulary, name)) for name in ("keys", "suffixes", "lengths")}
    limits = (vocabulary.vocab_size, vocabulary.max_n)

    def check(**changed):
        return f_gram_trie.check_links(*(arrays | changed).values(), *limits)

    assert check() == f_gram_trie.NO_F_GRAM
    for rank in (0, 7, vocabulary.num_f_grams - 1):
        for name in arrays:
            for value in (vocabulary.vocab_size + rank, 2**32 - 1):
                damaged = arrays[name].copy()
                damaged[rank] = np.array(value).astype(damaged.dtype)
                assert check(**{name: damaged}) != f_gram_trie.NO_F_GRAM, (rank, name, value)


def test_more_f_grams_than_32_bits_tell_apart_are_refused() -> None:
    """Before anything of their size is made; the most that do fit have no bit left for a fingerprint."""
    assert f_gram_trie.rank_bits(f_gram_trie.MOST_F_GRAMS) == 32
    with pytest.raises(SconeError, match=r"found 4,294,967,296 f-grams; expected at most 4,294,967,295"):
        f_gram_trie.empty_slots(2**32)
