"""The laws of matching: longest, causal, incremental as in batch, never across a separator or padding."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import longest_match
from scone.tests.kernels import reference
from scone.tests.tokenization.f_gram_strategies import batches, cases
from scone.tokenization import matcher as matcher_module
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher, inspect_tokens, match_lengths
from scone.utils.errors import SconeError


def as_array(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(len(rows), len(rows[0]) if rows else 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_match_equals_brute_force(data):
    """With and without padding, which stands wherever it likes, and starts of examples, which no match reaches over.

    The reference looks at each position's own past alone, so matching is causal, too.
    """
    case = data.draw(cases())
    rows, masks = data.draw(batches(case.alphabet))
    tokens, mask = as_array(rows), as_array(masks).astype(bool)
    flags = data.draw(st.lists(st.booleans(), min_size=tokens.size, max_size=tokens.size))
    starts = np.array(flags, bool).reshape(tokens.shape)
    matcher = Matcher(case.vocabulary)
    for padding, first in itertools.product((None, mask), (None, starts)):
        each = [[None] * len(rows) if words is None else words.tolist() for words in (padding, first)]
        expected = [case.matches(*triple) for triple in zip(rows, *each, strict=True)]
        assert matcher.match(tokens, padding, starts=first).tolist() == expected
    if rows:
        assert matcher.match(tokens[0]).tolist() == case.matches(rows[0])
    for row, first, nodes in zip(tokens, starts, matcher.match(tokens, starts=starts), strict=True):
        apart = [matcher.match(example) for example in np.split(row, np.flatnonzero(first))]
        assert np.concatenate(apart).tolist() == nodes.tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_incremental_match_equals_batch_match(data):
    case = data.draw(cases())
    rows, masks = data.draw(batches(case.alphabet))
    tokens, mask = as_array(rows), as_array(masks).astype(bool)
    matcher = Matcher(case.vocabulary)
    whole = matcher.match(tokens)
    whole_masked = matcher.match(tokens, mask)
    states = masked_states = np.full(len(tokens), longest_match.FRESH)
    for position in range(tokens.shape[1]):
        states = matcher.step(states, tokens[:, position])
        assert (states == whole[:, position]).all()
        nodes = matcher.step(masked_states, tokens[:, position], mask[:, position])
        assert (nodes == whole_masked[:, position]).all()
        masked_states = np.where(mask[:, position], nodes, longest_match.FRESH)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_match_crosses_a_separator(data):
    """And what is matched stands there; lengths are those of the matches, though f-grams reach over counted pieces."""
    case = data.draw(cases())
    row = data.draw(st.lists(st.sampled_from(case.alphabet), max_size=60))
    matcher, tokens = Matcher(case.vocabulary), np.array(row, np.int64)
    found = [case.vocabulary.tokens(node) for node in matcher.match(tokens).tolist()]
    for position, matched in enumerate(found):
        assert matched == tuple(row[position + 1 - len(matched) : position + 1])
        assert len(matched) == 1 or not set(case.vocabulary.separator_ids).intersection(matched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher_module, "_PIECE", 7)
        counts = match_lengths(matcher, tokens).tolist()
    assert counts == [sum(len(each) == length for each in found) for length in range(case.vocabulary.longest + 1)]


def small_matcher() -> Matcher:
    """f-grams (1, 2), (2, 3), (1, 2, 3) over five tokens; 0 is the separator."""
    counts = {(1, 2): 5, (2, 3): 5, (1, 2, 3): 4}
    return Matcher(reference.vocabulary_of(counts, vocab_size=5, separator_ids=[0]))


def test_threads_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr(matcher_module, "TOKENS_PER_THREAD", 16)
    tokens = np.random.default_rng(0).integers(0, 5, (3, 401))
    matcher = small_matcher()
    one = matcher.match(tokens, num_threads=1)
    for num_threads in (2, 5):
        assert (matcher.match(tokens, num_threads=num_threads) == one).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integer_type_is_taken(dtype):
    matcher = small_matcher()
    tokens = np.array([[1, 2, 3], [4, 2, 3]], dtype)
    assert matcher.match(tokens).tolist() == [[1, 5, 7], [4, 2, 6]]
    assert matcher.match(tokens.tolist(), mask=[[1, 1, 1], [1, 0, 1]]).tolist() == [[1, 5, 7], [4, 2, 3]]
    assert matcher.step(np.array([5, 5], dtype), tokens[:, 2]).tolist() == [7, 7]


@pytest.mark.parametrize("token", [5, -1, 2**40])
def test_a_foreign_token_is_named(token):
    matcher = small_matcher()
    with pytest.raises(SconeError, match=rf"found token {token}; expected 0 … 4 .* has 5 tokens"):
        matcher.match(np.array([1, 2, token, 3]))
    with pytest.raises(SconeError, match=rf"found token {token}; expected 0 … 4"):
        matcher.step([-1, 1], [2, token])


def test_wrong_calls_are_refused():
    matcher = small_matcher()
    with pytest.raises(ValueError, match="expected integers"):
        matcher.match(np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"expected \[B, T\] or \[T\]"):
        matcher.match(np.zeros((1, 1, 1), np.int64))
    with pytest.raises(ValueError, match="mask has shape"):
        matcher.match(np.array([1, 2]), mask=[1])
    for state in (8, -2):
        with pytest.raises(ValueError, match=f"state {state} is no node"):
            matcher.step([state], [1])


def test_a_pickled_matcher_matches_alike(tmp_path_factory):
    matcher = small_matcher()
    folder = tmp_path_factory.mktemp("vocabulary")
    matcher.vocabulary.save(folder)
    from_file = Matcher(FGramVocabulary.load(folder))
    tokens = np.array([1, 2, 3, 0, 2, 3])
    for original in (matcher, from_file):
        restored = pickle.loads(pickle.dumps(original))
        assert (restored.match(tokens) == matcher.match(tokens)).all()
        assert restored.vocabulary.fingerprint == matcher.vocabulary.fingerprint
        assert not restored.vocabulary.keys.flags.writeable


def test_inspection_tells_every_position():
    records = inspect_tokens(np.array([4, 1, 2, 3]), small_matcher())
    assert [(record.position, record.token, record.match_length, record.f_gram) for record in records] == [
        *((0, 4, 1, (4,)), (1, 1, 1, (1,)), (2, 2, 2, (1, 2)), (3, 3, 3, (1, 2, 3)))
    ]
    assert [(record.node, record.rank, record.count) for record in records[1:]] == [
        *((1, None, None), (5, 0, 5), (7, 2, 4))
    ]
