"""The f-gram vocabulary: closed, strictly ranked, nested by truncation, and refused when its file is damaged."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from scone.tests.kernels import reference
from scone.tests.tokenization.f_gram_strategies import LARGEST_VOCABULARY, cases
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.utils.errors import SconeError


def same(left: FGramVocabulary, right: FGramVocabulary) -> bool:
    """Equal in all that a vocabulary consists of."""
    arrays = all(
        np.array_equal(getattr(left, name), getattr(right, name))
        and getattr(left, name).dtype == getattr(right, name).dtype
        for name in ("keys", "suffixes", "lengths", "counts")
    )
    index = np.array_equal(left.index.slots, right.index.slots) and left.index.max_probes == right.index.max_probes
    names = ("vocab_size", "max_n", "separator_ids", "tokenizer_fingerprint", "fingerprint")
    return arrays and index and all(getattr(left, name) == getattr(right, name) for name in names)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_vocabulary_is_prefix_and_suffix_closed(case):
    vocabulary, size = case.vocabulary, case.vocab_size
    grams = [vocabulary.tokens(size + rank) for rank in range(vocabulary.num_f_grams)]
    assert grams == case.f_grams
    assert vocabulary.counts.tolist() == [case.counts[gram] for gram in grams]
    for rank, gram in enumerate(grams):
        assert Matcher(vocabulary).match(np.array(gram))[-1] == size + rank
        assert vocabulary.lengths[rank] == len(gram)
        for link, part in ((vocabulary.prefixes[rank], gram[:-1]), (vocabulary.suffixes[rank], gram[1:])):
            assert vocabulary.tokens(int(link)) == part
            assert link < size + rank
    assert vocabulary.token_matrix(np.arange(len(grams))).tolist() == [
        [*gram, *[-1] * (vocabulary.longest - len(gram))] for gram in grams
    ]
    vocabulary.verify()


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 60))
def test_truncated_vocabulary_is_the_smaller_vocabulary(case, size):
    grams = case.f_grams[:size]
    smaller = FGramVocabulary.from_ranked(
        grams,
        [case.counts[gram] for gram in grams],
        vocab_size=case.vocab_size,
        max_n=case.vocabulary.max_n,
        separator_ids=case.vocabulary.separator_ids,
    )
    truncated = case.vocabulary.truncated(size)
    assert same(truncated, smaller)
    truncated.verify()


@settings(max_examples=30, deadline=None)
@given(cases())
def test_saved_vocabulary_is_the_same(case):
    with tempfile.TemporaryDirectory() as folder:
        path = case.vocabulary.save(folder)
        assert path == Path(folder) / "f_grams.safetensors"
        loaded = FGramVocabulary.load(folder)
        assert same(loaded, case.vocabulary)
        loaded.verify()
        assert loaded.truncated(3).num_f_grams == min(3, loaded.num_f_grams)
        again = loaded.save(Path(folder) / "again.safetensors")
        assert again.read_bytes() == path.read_bytes()


def test_ways_of_making_one_agree():
    counts = {(1, 2): 3, (2, 1): 3, (2, 2): 2, (1, 2, 1): 3, (2, 1, 2): 2, (0, 2): 9, (1, 1): 1}
    made = reference.vocabulary_of(counts, vocab_size=3, max_n=3, min_freq=2, separator_ids=[0])
    grams = reference.ranked({gram: count for gram, count in counts.items() if 0 not in gram and count > 1})
    assert [made.tokens(3 + rank) for rank in range(made.num_f_grams)] == grams
    others = (
        FGramVocabulary.from_ranked(grams, made.counts, vocab_size=3, separator_ids=[0]),
        FGramVocabulary.from_links(
            made.prefixes, made.last_tokens, made.counts, vocab_size=3, max_n=3, separator_ids=[0]
        ),
    )
    for other in others:
        assert same(other, made)


def test_nodes_take_64_bits_where_32_do_not_suffice():
    last = LARGEST_VOCABULARY - 1
    counts = {(last, last): 2, (0, last): 1}
    small = reference.vocabulary_of(counts, vocab_size=LARGEST_VOCABULARY, max_f_grams=1)
    large = reference.vocabulary_of(counts, vocab_size=LARGEST_VOCABULARY)
    assert (small.keys.dtype, large.keys.dtype) == (np.uint32, np.uint64)
    assert same(large.truncated(1), small)
    assert Matcher(large).match([last, last, 0, last]).tolist() == [last, last + 1, 0, last + 2]


@pytest.mark.parametrize(
    ("f_grams", "counts", "fault"),
    [
        ([(1, 5)], [1], "token outside"),
        ([(1, -1)], [1], "token outside"),
        ([(1, 0)], [1], "separator"),
        ([(0, 1)], [1], "separator"),
        ([(1, 2, 3)], [1], "prefix"),
        ([(1, 2), (1, 2, 3)], [1, 1], "suffix"),
        ([(1, 2), (1, 2)], [1, 1], "occurs at a lower rank"),
        ([(1, 2), (2, 3)], [1, 2], "out of order"),
        ([(2, 3), (1, 2)], [1, 1], "out of order"),
        ([(1, 1), (1, 1, 1), (2, 2)], [1, 1, 1], "out of order"),
        ([(1, 1), (1, 1, 1), (1, 1, 1, 1)], [1, 1, 1], "longer than max_n"),
    ],
)
def test_what_is_no_vocabulary_is_refused(f_grams, counts, fault):
    with pytest.raises(ValueError, match=f"rank {len(f_grams) - 1} .*{fault}"):
        FGramVocabulary.from_ranked(f_grams, counts, vocab_size=5, max_n=3, separator_ids=[0])


def test_limits_and_questions_about_what_is_not_there():
    for limits in ({"vocab_size": 0}, {"vocab_size": 2**32}, {"max_n": 0}, {"max_n": 256}, {"separator_ids": [5]}):
        with pytest.raises(ValueError, match="expected"):
            FGramVocabulary.from_ranked([], [], **({"vocab_size": 5} | limits))
    for f_grams, counts, word in (([(1,)], [1], "lengths"), ([(1, 2)], [], "counts")):
        with pytest.raises(ValueError, match=word):
            FGramVocabulary.from_ranked(f_grams, counts, vocab_size=5)
    vocabulary = reference.vocabulary_of({(1, 2): 1}, vocab_size=5)
    for node in (-1, 6):
        with pytest.raises(ValueError, match="does not exist"):
            vocabulary.tokens(node)
    with pytest.raises(ValueError, match="ranks are"):
        vocabulary.token_matrix(np.array([1]))
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.counts[0] = 3


@functools.cache
def made_vocabulary() -> FGramVocabulary:
    """About a hundred f-grams, enough for every array to have many bytes."""
    corpus = np.random.default_rng(0).integers(0, 4, 400).tolist()
    counts = Counter(tuple(corpus[at : at + n]) for n in range(2, 5) for at in range(len(corpus) - n + 1))
    return reference.vocabulary_of(counts, vocab_size=4, max_f_grams=100, tokenizer_fingerprint="abc")


def test_other_files_are_named(tmp_path):
    """The file itself is plain safetensors."""
    path = made_vocabulary().save(tmp_path)
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == ["counts", "keys", "lengths", "slots", "suffixes"]
        assert file.metadata()["tokenizer_fingerprint"] == "abc"
    saved = path.read_bytes()
    for content, message in (
        ((2).to_bytes(8, "little") + b"{}", "no f-gram vocabulary header"),
        (saved.replace(b'"format_version":"1"', b'"format_version":"9"'), r"version 9; expected scone-f-gram-vocab"),
    ):
        path.write_bytes(content)
        with pytest.raises(SconeError, match=message):
            FGramVocabulary.load(path)
    with pytest.raises(SconeError, match="cannot read"):
        FGramVocabulary.load(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", ["counts", "_index", "_fingerprint"])
def test_verify_finds_arrays_that_do_not_belong_together(wrong):
    whole = made_vocabulary()
    parts = {name: np.array(getattr(whole, name)) for name in ("keys", "suffixes", "lengths", "counts")}
    parts |= {"vocab_size": 4, "max_n": 4, "_index": whole.index}
    if wrong == "counts":
        parts["counts"][5] += 1000
    else:
        parts[wrong] = whole.truncated(50).index if wrong == "_index" else "0" * 64
    message = {"counts": "rank 5 is out of order"}.get(wrong, f"{wrong[1:]} do not fit")
    with pytest.raises(SconeError, match=message):
        FGramVocabulary(**parts).verify()


def test_a_file_that_changed_is_not_reopened_in_a_worker(tmp_path):
    made_vocabulary().save(tmp_path)
    loaded = FGramVocabulary.load(tmp_path)
    reopen, arguments = loaded.__reduce__()
    assert same(reopen(*arguments), loaded)
    loaded.truncated(10).save(tmp_path)
    with pytest.raises(SconeError, match="found other f-grams"):
        reopen(*arguments)
