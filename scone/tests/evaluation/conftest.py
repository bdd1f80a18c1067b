"""A small SCONE model on disk, with its tokenizer and its table, for tests of whole evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from scone.tests import tiny
from scone.tests.inference.served import make_model

WORDS = "which animal barks? a dog a cat the sun is hot and cold today yes no Question: Answer: " * 30


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; in it ``embeddings.cache``, and ``plain``, its trunk without f-grams."""
    folder = tmp_path_factory.mktemp("evaluation") / "final_model"
    return make_model(folder, WORDS, 2, 640, tiny.F_GRAM_SIZES)
