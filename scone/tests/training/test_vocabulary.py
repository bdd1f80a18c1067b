"""The cache of counted vocabularies: what was counted once is cut, not counted again, and is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scone.configs.loading import from_mapping
from scone.configs.schema import RANKINGS, DataOptions, SconeOptions
from scone.data.token_file import TokenFile, TokenFileWriter
from scone.evaluation.sweep import count_once, shared_matcher
from scone.tests import tiny
from scone.tokenization.f_gram_file import FILE_NAME
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.training.artifacts import prepare_vocabulary
from scone.training.options import ranked
from scone.training.run import Corpus
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


def prepare(
    tokens: TokenFile, cache: Path, min_freq: int, max_f_grams: int, ranking: str = "frequency"
) -> FGramVocabulary:
    data = DataOptions(max_n=3, min_freq=min_freq, max_f_grams=max_f_grams, ranking=ranking, cache_dir=str(cache))
    return prepare_vocabulary(tokens, data, vocab_size=V, separator_ids=(0,), tokenizer_fingerprint="t", quiet=True)


@pytest.mark.parametrize(
    ("ranking", "first", "second", "is_cut"),
    [
        ("frequency", (2, 200), (5, 100), True),
        ("frequency", (2, 200), (2, 50), True),
        ("frequency", (2, 10**6), (20, 10**9), True),  # the first holds all that occur twice
        ("frequency", (2, 50), (2, 200), False),
        ("frequency", (5, 200), (2, 200), False),
        ("gain", (2, 200), (2, 50), True),
        ("gain", (2, 500_000), (2, 10**6), True),  # the first holds all of the same candidates
        ("gain", (2, 200), (5, 100), False),  # others to choose from
        ("gain", (2, 10**7), (2, 50), False),
        ("gain", (2, 50), (2, 200), False),
    ],
)
def test_a_vocabulary_cut_from_a_larger_one_equals_the_counted_one(
    tokens: TokenFile, tmp_path: Path, ranking: str, first: tuple[int, int], second: tuple[int, int], is_cut: bool
) -> None:
    prepare(tokens, tmp_path / "shared", *first, ranking)
    assert len(list(tmp_path.glob("shared/vocabularies/*/*/counting.json"))) == 1
    found = prepare(tokens, tmp_path / "shared", *second, ranking)
    assert len(list(tmp_path.glob("shared/vocabularies/*/*/counting.json"))) == (1 if is_cut else 2)
    counted = prepare(tokens, tmp_path / "alone", *second, ranking)
    assert found.fingerprint == counted.fingerprint
    assert found.num_f_grams == counted.num_f_grams > 0
    np.testing.assert_array_equal(found.counts, counted.counts)
    files = [next(tmp_path.glob(f"{name}/vocabularies/*/{second[0]}-{second[1]}")) for name in ("shared", "alone")]
    assert (files[0] / FILE_NAME).read_bytes() == (files[1] / FILE_NAME).read_bytes()


def test_each_ranking_has_a_vocabulary_of_its_own(tokens: TokenFile, tmp_path: Path) -> None:
    found = [prepare(tokens, tmp_path, 2, 50, ranking) for ranking in ("gain", "frequency", "gain")]
    assert [each.ranking for each in found] == ["gain", "frequency", "gain"]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint
    assert len(list(tmp_path.glob("vocabularies/*/*/counting.json"))) == 2


def options(cache: Path, max_n: int, min_freq: int, max_f_grams: int, ranking: str | None) -> SconeOptions:
    sizes = {"max_n": max_n, "min_freq": min_freq, "max_f_grams": max_f_grams, "ranking": ranking}
    return from_mapping({"data": {**sizes, "cache_dir": str(cache)}}, "test")


def test_runs_that_name_no_ranking_have_what_suits_them(tmp_path: Path) -> None:
    """Gain from 10 tokens read for each f-gram on: of one pass, since rows start again with the next."""
    run = options(tmp_path, 3, 2, 50, None)
    steps = {"batch_size": 2, "gradient_accumulation_steps": 5}
    for changes, corpus_tokens, ranking in [
        ({"max_steps": 5} | steps, 10**6, "gain"),  # 5 × 2 × 5 × 10 tokens
        ({"max_steps": 4} | steps, 10**6, "frequency"),
        ({"max_steps": 5} | steps, 499, "frequency"),
        ({"max_steps": -1, "num_epochs": 3}, 500, "gain"),
        ({"max_steps": -1, "num_epochs": 3}, 499, "frequency"),
        ({"max_steps": -1, "num_epochs": 0.5}, 999, "frequency"),
    ]:
        each = replace(run, data=replace(run.data, max_length=10), training=replace(run.training, **changes))
        assert ranked(each, corpus_tokens).data.ranking == ranking
        for named in RANKINGS:
            assert ranked(replace(each, data=replace(each.data, ranking=named)), corpus_tokens).data.ranking == named


def test_several_runs_count_each_ranking_once(tokens: TokenFile, tmp_path: Path) -> None:
    sizes = [(3, 2, 100), (3, 2, 60), (3, 5, 60), (2, 2, 60)]
    runs = [options(tmp_path, *each, ranking) for each in sizes for ranking in ("gain", "frequency")]
    tokenizer = tiny.word_tokenizer((f"w{number}" for number in range(V)), "w1", eos_token="w0")
    corpus = Corpus(tokenizer, tokens, None)
    count_once(runs, corpus, quiet=True)
    # of each N and ranking the largest, and by gain another floor has other candidates
    assert len(list(tmp_path.glob("vocabularies/*/*/counting.json"))) == 2 + 3
    assert len(list(tmp_path.glob(f"vocabularies/*/*/{FILE_NAME}"))) == len(runs)
    matcher = shared_matcher(runs, corpus)
    assert matcher is not None
    assert (matcher.vocabulary.ranking, matcher.vocabulary.num_f_grams) == ("frequency", 100)
    matcher = shared_matcher(runs[::2], corpus)
    assert matcher is not None
    assert (matcher.vocabulary.ranking, matcher.vocabulary.num_f_grams) == ("gain", 100)
    assert shared_matcher([], corpus) is None


def test_too_high_a_floor_gets_one_line(tokens: TokenFile, tmp_path: Path) -> None:
    with pytest.raises(SconeError, match="found no n-gram of 2 to 3 tokens that occurs 100000 times in"):
        prepare(tokens, tmp_path, 100_000, 10)
