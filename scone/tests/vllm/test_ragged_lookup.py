"""The lookup of a step of continuous batching equals matching each request's whole text, wherever it was cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.models.table_lookup import find_with
from scone.tests.tokenization.f_gram_strategies import Case, cases
from scone.tokenization.matcher import CONTEXT, HashedGrams, Matcher
from scone.vllm.lookups import looked_up_in_line


@st.composite
def texts(draw: st.DrawFn, alphabet: tuple[int, ...]) -> list[tuple[list[int], int]]:
    """Requests: a text, and how much of it was computed before; possibly none, possibly nothing new."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        text = draw(st.lists(st.sampled_from(alphabet), max_size=14))
        found.append((text, draw(st.integers(0, len(text)))))
    return found


def line_of(requests: list[tuple[list[int], int]], context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """New tokens, beginnings and what is before them, as a server has them; with padding at the end."""
    new = [text[cut:] for text, cut in requests]
    starts = np.cumsum([0, *map(len, new)])
    before = np.full((len(requests), context), -1, np.int64)
    for row, (text, cut) in zip(before, requests, strict=True):
        known = text[max(cut - context, 0) : cut]
        row[len(row) - len(known) :] = known
    return np.array([*itertools.chain(*new), 0, 0], np.int64), starts, before


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_every_split_gives_the_whole_texts_f_grams(case: Case, data: st.DataObject) -> None:
    foreign = case.vocab_size + data.draw(st.integers(0, 3))
    requests = data.draw(texts((*case.alphabet, foreign)))
    context = case.vocabulary.max_n - 1
    matcher = Matcher(case.vocabulary)
    found = looked_up_in_line(find_with(matcher), *line_of(requests, context), case.vocab_size)
    expected: list[int] = []
    for text, cut in requests:
        known = [token < case.vocab_size for token in text]
        nodes = case.matches([token if ok else 0 for token, ok in zip(text, known, strict=True)], known)
        expected += [node if ok else 0 for node, ok in zip(nodes, known, strict=True)][cut:]
    assert found.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 5), max_size=2), st.data())
def test_every_split_gives_the_whole_texts_hashed_grams(
    num_rows: int, separators: set[int], data: st.DataObject
) -> None:
    grams = HashedGrams(num_rows, tuple(separators))
    requests = data.draw(texts(tuple(range(6))))
    found = looked_up_in_line(grams.rows, *line_of(requests, CONTEXT), 6)
    whole = [grams.rows(np.array(text, np.int64))[cut:] for text, cut in requests]
    assert found.tolist() == np.concatenate([np.zeros((0, 2), np.int64), *whole]).tolist()
