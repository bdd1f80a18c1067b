"""The corpus that training tests read, written once, and the plainest run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scone.tests.training.runs import options, write_corpus
from scone.training.run import train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised and counted files lie beside it, in ``cache``, and are shared by all tests."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final model of the plainest run; nobody changes it."""
    return train(options(corpus, tmp_path_factory.mktemp("whole") / "run"), quiet=True)
