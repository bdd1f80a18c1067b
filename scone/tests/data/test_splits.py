"""Splits by name and by content: deterministic, disjoint, independent of order, never without training text."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.data import sources
from scone.data.sources import split_of_name, split_of_path, split_of_single_file, split_rule

HELD_OUT = ("validation", "test")
documents = st.lists(st.text(min_size=1, max_size=30), max_size=60)


@settings(max_examples=100, deadline=None)
@given(documents, st.randoms(use_true_random=False), st.booleans())
def test_splits_depend_on_content_alone_and_small_corpora_get_every_split_that_they_can_fill(texts, random, large):
    with pytest.MonkeyPatch.context() as patch:
        if large:
            patch.setattr(sources, "SMALL_CORPUS", 5)
            patch.setattr(sources, "LARGE_SHARE", 3)
        rule, other_rule = split_rule(texts, HELD_OUT), split_rule(random.sample(texts, len(texts)), HELD_OUT)
        found = {text: rule(text) for text in texts}
        assert found == {text: other_rule(text) for text in texts}
    if not large:
        assert set(found.values()) == set(("train", *HELD_OUT)[: len(found)])


def test_held_out_shares():
    texts = [f"document {number} " + "x" * (number * 7 % 50) for number in range(30_000)]
    for corpus, share in ((texts[:5000], 1 / 50), (texts, 1 / 100)):
        rule = split_rule(corpus, HELD_OUT)
        total = sum(map(len, corpus))
        for split in HELD_OUT:
            held_out = sum(len(text) for text in corpus if rule(text) == split)
            assert 0.8 * share < held_out / total < 1.2 * share


def test_one_long_document_stays_in_training():
    texts = ["a" * 100_000, *(f"short {number}" * 50 for number in range(20))]
    for salt in range(10):
        rule = split_rule([texts[0] + str(salt), *texts[1:]], HELD_OUT)
        assert rule(texts[0] + str(salt)) == "train"


SPLITS_OF_NAMES = {
    split_of_name: {
        "train": "train", "wiki.train.tokens": "train", "validation-00000-of-00008.parquet": "validation",
        "wiki.valid.tokens": "validation", "dev.jsonl.zst": "validation", "test_sft": "test", "contest.txt": None,
        "notes.txt": None,
    },
    # the file's before the folders'
    lambda name: split_of_path(PurePosixPath(name)): {
        "test/wiki.train.tokens": "train", "Train/part-0.jsonl": "train", "tests-of-mine/part-0.jsonl": None,
    },
    # at the end of its name
    split_of_single_file: {
        "wiki.test.tokens": "test", "train.jsonl.zst": "train", "c4-validation.00000-of-00008.json.gz": "validation",
        "test-results.txt": None, "dev-notes.md": None, "2024.txt": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(("split_of", "names"), SPLITS_OF_NAMES.items(), ids=["name", "path", "single file"])
def test_names_say_splits(split_of, names):
    assert {name: split_of(name) for name in names} == names
