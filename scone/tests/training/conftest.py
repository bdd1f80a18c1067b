"""The corpus that training tests read, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from scone.tests.training.runs import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised and counted files lie beside it, in ``cache``, and are shared by all tests."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
