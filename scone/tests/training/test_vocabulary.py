"""The cache of counted vocabularies: what was counted once is cut, not counted again, and is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scone.configs.schema import DataOptions
from scone.data.token_file import TokenFile, TokenFileWriter
from scone.tokenization.f_gram_file import FILE_NAME
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.artifacts import prepare_vocabulary
from scone.utils.errors import SconeError

V = 20


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    writer = TokenFileWriter(folder, V, 0)
    for _ in range(20):
        writer.add_document(np.minimum(generator.geometric(0.3, 100), V - 1).astype(np.uint16))
    writer.finish({"tokenizer_fingerprint": "t"})
    return TokenFile.open(folder)


def prepare(tokens: TokenFile, cache: Path, min_freq: int, max_f_grams: int) -> FGramVocabulary:
    data = DataOptions(max_n=3, min_freq=min_freq, max_f_grams=max_f_grams, cache_dir=str(cache))
    return prepare_vocabulary(tokens, data, vocab_size=V, separator_ids=(0,), tokenizer_fingerprint="t", quiet=True)


@pytest.mark.parametrize(
    ("first", "second", "is_cut"),
    [
        ((2, 200), (5, 100), True),
        ((2, 200), (2, 50), True),
        ((2, 10**6), (20, 10**9), True),  # the first holds all that occur twice
        ((2, 50), (2, 200), False),
        ((5, 200), (2, 200), False),
    ],
)
def test_a_vocabulary_cut_from_a_larger_one_equals_the_counted_one(
    tokens: TokenFile, tmp_path: Path, first: tuple[int, int], second: tuple[int, int], is_cut: bool
) -> None:
    prepare(tokens, tmp_path / "shared", *first)
    assert len(list(tmp_path.glob("shared/vocabularies/*/*/counting.json"))) == 1
    found = prepare(tokens, tmp_path / "shared", *second)
    assert len(list(tmp_path.glob("shared/vocabularies/*/*/counting.json"))) == (1 if is_cut else 2)
    counted = prepare(tokens, tmp_path / "alone", *second)
    assert found.fingerprint == counted.fingerprint
    assert found.num_f_grams == counted.num_f_grams > 0
    np.testing.assert_array_equal(found.counts, counted.counts)
    files = [next(tmp_path.glob(f"{name}/vocabularies/*/{second[0]}-{second[1]}")) for name in ("shared", "alone")]
    assert (files[0] / FILE_NAME).read_bytes() == (files[1] / FILE_NAME).read_bytes()


def test_too_high_a_floor_gets_one_line(tokens: TokenFile, tmp_path: Path) -> None:
    with pytest.raises(SconeError, match="found no n-gram of 2 to 3 tokens that occurs 100000 times in"):
        prepare(tokens, tmp_path, 100_000, 10)
