"""Hypothesis strategies for small corpora, their f-grams and batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from scone.tests.kernels import reference
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

LARGEST_VOCABULARY = 2**32 - 1


@dataclass(frozen=True)
class Case:
    """A small vocabulary and the plain facts it was made from."""

    vocabulary: FGramVocabulary
    f_grams: list[tuple[int, ...]]
    alphabet: tuple[int, ...]
    """Tokens that occur, separators included."""
    counts: dict[tuple[int, ...], int]
    """All n-grams of the corpus that may become f-grams."""

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.vocab_size

    def matches(self, tokens: list[int], mask: list[bool] | None = None, starts: list[bool] | None = None) -> list[int]:
        """What matching must give."""
        return reference.longest_matches(tokens, self.f_grams, self.vocab_size, mask, starts)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A corpus of at most 80 tokens over at most 5, N up to 6, with and without separators, V up to 2³² − 1."""
    vocab_size = draw(st.sampled_from([1, 2, 4, 300, LARGEST_VOCABULARY]))
    alphabet = tuple(sorted(token for token in {0, 1, 2, vocab_size - 2, vocab_size - 1} if 0 <= token < vocab_size))
    separators = draw(st.sets(st.sampled_from(alphabet), max_size=2))
    max_n = draw(st.integers(1, 6))
    corpus = draw(st.lists(st.sampled_from(alphabet), max_size=80))
    counts = reference.count_n_grams([np.array(corpus, np.int64)], max_n, separators)
    min_freq = draw(st.integers(1, 3))
    limit = draw(st.integers(0, 60))
    ranked = reference.ranked({gram: count for gram, count in counts.items() if count >= min_freq})[:limit]
    limits = {"vocab_size": vocab_size, "max_n": max_n, "max_f_grams": limit, "min_freq": min_freq}
    vocabulary = reference.vocabulary_of(counts, separator_ids=tuple(separators), **limits)
    return Case(vocabulary, ranked, alphabet, counts)


@st.composite
def batches(draw: st.DrawFn, alphabet: tuple[int, ...]) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of equal length, possibly none or empty, and a mask."""
    num_rows, length = draw(st.integers(0, 4)), draw(st.integers(0, 20))
    tokens, kept = st.sampled_from(alphabet), st.booleans()
    rows, masks = ([draw(st.lists(each, min_size=length, max_size=length)) for _ in range(num_rows)]
                   for each in (tokens, kept))  # fmt: skip
    return rows, masks
