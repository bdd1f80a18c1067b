"""Sizes of a text from its tokens equal those of the text itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation.perplexity import sizes_of
from scone.tokenization.tokenizers import train_tokenizer

SAMPLE = "The cat sat on the mat.\n\nThe dog\tran — naïve façade, 日本語 text;  two  spaces \r\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(iter([SAMPLE]), 400, tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc the\n\t\r éß日—.  "), max_size=60))
def test_size_equals_that_of_the_text(tokenizer, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        return
    assert sizes_of(tokenizer, tokens) == {"num_bytes": len(text.encode("utf-8")), "num_words": len(text.split())}


def test_special_tokens_have_no_bytes_and_end_words(tokenizer) -> None:
    word = tokenizer("cat", add_special_tokens=False)["input_ids"]
    special = tokenizer.all_special_ids[0]
    assert sizes_of(tokenizer, [*word, special, *word, *word]) == {"num_bytes": 9, "num_words": 2}


def test_other_tokenizers_have_no_size(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"])}
    assert set(sizes_of(BertTokenizerFast(vocab=vocabulary), [5, 5]).values()) == {None}
