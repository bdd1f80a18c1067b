"""A tiny tokenizer for the tests of the data package."""

from __future__ import annotations

import pytest

from scone.tokenization.tokenizers import train_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level BPE of 300 entries; encodes any text."""
    texts = ["the cat sat on the mat and the dog sat on the log. " * 20, "one two three four five six seven\n" * 20]
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("tokenizer"))
