"""Merging counts says nothing that counting everything together would not say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.tests.tokenization.test_counting import SEPARATOR, VOCAB_SIZE, assert_same, corpora, count
from scone.tokenization.counting_merge import merge_vocabularies
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError


@settings(max_examples=25, deadline=None)
@given(st.lists(corpora(), min_size=1, max_size=3), st.integers(0, 200))
def test_merged_full_counts_are_the_counts_of_all(groups, max_f_grams):
    parts = [count(shards).vocabulary for shards in groups]
    together = count([shard for shards in groups for shard in shards], max_f_grams=max_f_grams)
    merged = merge_vocabularies(parts, most_missing=[0] * len(parts), max_f_grams=max_f_grams)
    assert_same(merged.vocabulary, together.vocabulary)
    assert merged.complete


@settings(max_examples=40, deadline=None)
@given(corpora(), corpora(), st.integers(0, 150), st.integers(0, 150), st.booleans())
def test_merged_cut_counts_are_the_first_ranks_of_all(shards, others, size, other_size, known):
    parts = [count(shards, max_f_grams=size).vocabulary, count(others, max_f_grams=other_size).vocabulary]
    together = count([*shards, *others]).vocabulary
    most_missing = [_most_missing(shards, size), _most_missing(others, other_size)]
    try:
        merged = merge_vocabularies(parts, most_missing=most_missing if known else None)
    except SconeError:  # nothing can be proved
        return
    assert_same(merged.vocabulary, together.truncated(merged.vocabulary.num_f_grams))


def _most_missing(shards: list[np.ndarray], size: int) -> int:
    everything = count(shards).vocabulary.counts
    return int(everything[size]) if size < len(everything) else 0


def test_vocabularies_of_different_tokenizers_are_refused():
    options = {"vocab_size": VOCAB_SIZE, "separator_ids": [SEPARATOR]}
    one = FGramVocabulary.from_counts({(1, 2): 3}, **options, tokenizer_fingerprint="a")
    two = FGramVocabulary.from_counts({(1, 2): 3}, **options, tokenizer_fingerprint="b")
    with pytest.raises(SconeError, match="found tokenizer_fingerprint b in vocabulary 2, a in the first"):
        merge_vocabularies([one, two])
    with pytest.raises(SconeError, match="no vocabularies"):
        merge_vocabularies([])
