"""Merged vocabularies are the vocabulary of all the parts' text."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.merging import merge_vocabularies
from scone.utils.errors import SconeError

V = 5
corpora = st.lists(st.lists(st.integers(1, V - 1), max_size=30), min_size=1, max_size=4)


def n_grams(tokens: list[int], max_n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(2, max_n + 1) for i in range(len(tokens) - n + 1))


def vocabulary(counts: Counter[tuple[int, ...]], max_n: int = 3, **limits: int) -> FGramVocabulary:
    return FGramVocabulary.from_counts(counts, vocab_size=V, max_n=max_n, separator_ids=(0,), **limits)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(2, 4), st.integers(1, 4), st.integers(0, 20), st.randoms())
def test_merged_counts_equal_the_count_of_everything(
    parts: list[list[int]], max_n: int, min_freq: int, max_f_grams: int, random: object
) -> None:
    counts = [n_grams(part, max_n) for part in parts]
    expected = vocabulary(sum(counts, Counter()), max_n, min_freq=min_freq, max_f_grams=max_f_grams)
    shuffled = [vocabulary(count, max_n) for count in counts]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    merged = merge_vocabularies(shuffled, min_freq=min_freq, max_f_grams=max_f_grams)
    assert merged.vocabulary.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(merged.vocabulary.counts, expected.counts)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 10))
def test_counts_of_cut_parts_are_too_small_by_no_more_than_the_stated_error(parts: list[list[int]], kept: int) -> None:
    counts = [n_grams(part, 3) for part in parts]
    cut = [vocabulary(count, max_f_grams=kept) for count in counts]
    merged = merge_vocabularies(cut)
    unseen = sum(part.num_f_grams == kept and part.counts[-1] == 1 for part in cut)  # cut at 1: taken to be whole
    for rank, count in enumerate(merged.vocabulary.counts):
        truth = sum(part[merged.vocabulary.tokens(V + rank)] for part in counts)
        assert count <= truth <= count + merged.largest_error + unseen


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (FGramVocabulary.from_counts({(1, 2): 3}, vocab_size=V + 1, max_n=3, separator_ids=(0,)), "tokens 5"),
        (FGramVocabulary.from_counts({(1, 2): 3}, vocab_size=V, max_n=2, separator_ids=(0,)), "max_n 3"),
        (FGramVocabulary.from_counts({(1, 2): 3}, vocab_size=V, max_n=3), "separators"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(other: FGramVocabulary, what: str) -> None:
    with pytest.raises(SconeError, match=what):
        merge_vocabularies([vocabulary(Counter({(1, 2): 3})), other])


def test_vocabularies_of_two_tokenizers_are_refused() -> None:
    parts = [
        FGramVocabulary.from_counts({(1, 2): 3}, vocab_size=V, tokenizer_fingerprint=name)
        for name in ("one", "two", "")
    ]
    with pytest.raises(SconeError, match="tokenizer one"):
        merge_vocabularies(parts)
    assert merge_vocabularies([parts[2], parts[0]]).vocabulary.tokenizer_fingerprint == "one"
