"""The ranking by gain: what its plain reference says, closed, nested, the same from every engine, and kept in files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scone.cli import main
from scone.tests.kernels import reference
from scone.tests.training.runs import write_corpus
from scone.tokenization import f_gram_file
from scone.tokenization.counting import CountResult, count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher
from scone.tokenization.ranking import num_candidates, rank_by_gain
from scone.utils.errors import SconeError

VOCAB_SIZE, SEPARATOR = 7, 6


@st.composite
def corpora(draw: st.DrawFn) -> list[np.ndarray]:
    """Up to three corpora of skewed tokens and separators, some empty."""
    shards = []
    for _ in range(draw(st.integers(0, 3))):
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        length, skew = draw(st.sampled_from([0, 1, 5, 60, 400])), draw(st.sampled_from([0.3, 0.6, 0.9]))
        shards.append(np.minimum(generator.geometric(skew, length) - 1, VOCAB_SIZE - 1).astype(np.uint16))
    return shards


def by_gain(shards: list[np.ndarray], max_n: int = 3, **options: object) -> CountResult:
    made: dict = {"vocab_size": VOCAB_SIZE, "separator_ids": [SEPARATOR], "ranking": "gain", "quiet": True} | options
    return count_f_grams(shards, max_n=max_n, **made)


def f_grams(vocabulary: FGramVocabulary) -> list[tuple[int, ...]]:
    return [vocabulary.tokens(vocabulary.vocab_size + rank) for rank in range(vocabulary.num_f_grams)]


@settings(max_examples=80, deadline=None)
@given(corpora(), st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 0, 1, 7, 40]))
@example([np.array([0, 1, 2, 3] * 3, np.uint16)], 2, 2, 5)
@example([np.zeros(60, np.uint16)], 5, 1, None)
@example([np.array([0] * 20_000 + [1, 2], np.uint16)], 70, 1, None)  # products of so many shares are 0
def test_gain_ranking_equals_its_plain_reference(shards, max_n, min_freq, limit):
    everything = reference.count_n_grams(shards, max_n + 1, [SEPARATOR])
    counts = {gram: count for gram, count in everything.items() if count >= min_freq}
    token_counts = np.bincount(np.concatenate([np.empty(0, np.uint16), *shards]), minlength=VOCAB_SIZE)
    token_counts[SEPARATOR] = 0
    worth = reference.gain_scores(counts, token_counts, max_n)
    vocabulary = by_gain(shards, max_n, min_freq=min_freq, max_f_grams=limit).vocabulary
    found = f_grams(vocabulary)
    assert vocabulary.counts.tolist() == [counts[gram] for gram in found]
    assert len(found) == len(set(found)) == min(len(worth), len(worth) if limit is None else limit)
    # sums of the reference round otherwise: what they say is equal to the last bits may stand in either order
    in_order = sorted(worth.values(), reverse=True)[: len(found)]
    np.testing.assert_allclose([worth[gram] for gram in found], in_order, rtol=1e-9, atol=1e-9)
    assert (vocabulary.max_n, vocabulary.ranking, vocabulary.separator_ids) == (max_n, "gain", (SEPARATOR,))


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(2, 5), st.integers(1, 3), st.integers(0, 80))
def test_gain_ranking_is_closed_and_nested(shards, max_n, min_freq, limit):
    whole = by_gain(shards, max_n, min_freq=min_freq).vocabulary
    whole.verify()
    rank_of = {gram: rank for rank, gram in enumerate(f_grams(whole))}
    for gram, rank in rank_of.items():
        assert all(rank_of[part] < rank for part in (gram[:-1], gram[1:]) if len(part) > 1)
    part = by_gain(shards, max_n, min_freq=min_freq, max_f_grams=limit).vocabulary
    cut = whole.truncated(limit)
    cut.verify()
    assert (part.fingerprint, part.counts.tolist()) == (cut.fingerprint, cut.counts.tolist())
    assert cut.ranking == whole.resized(VOCAB_SIZE + 3).ranking == "gain"


@settings(max_examples=15, deadline=None)
@given(corpora(), st.sampled_from([1, 3]), st.randoms(use_true_random=False))
def test_neither_order_nor_threads_change_it(shards, num_threads, random):
    first = by_gain(shards, min_freq=2).vocabulary
    shuffled = list(shards)
    random.shuffle(shuffled)
    other = by_gain(shuffled, min_freq=2, num_threads=num_threads).vocabulary
    assert (other.fingerprint, other.counts.tolist()) == (first.fingerprint, first.counts.tolist())


def text(length: int = 3000) -> np.ndarray:
    """Tokens that follow from the one before: what by gain and by frequency differ in."""
    generator = np.random.default_rng(5)
    follows = generator.integers(0, 59, (59, 3))
    tokens = [0]
    for _ in range(length):
        surprise = generator.random() < 0.3
        tokens.append(int(generator.zipf(1.5) % 59 if surprise else follows[tokens[-1], generator.integers(3)]))
    return np.array(tokens, np.uint16)


LIMITS: dict = {"vocab_size": 60, "max_n": 3, "min_freq": 3, "max_f_grams": 100, "separator_ids": [59]}


def test_the_rankings_choose_otherwise_and_match_alike():
    gain, frequency = (
        count_f_grams([text()], ranking=each, quiet=True, **LIMITS).vocabulary for each in ("gain", "frequency")
    )
    assert gain.num_f_grams == frequency.num_f_grams == 100
    assert set(f_grams(gain)) != set(f_grams(frequency))
    assert gain.fingerprint != frequency.fingerprint
    assert np.any(np.diff(gain.counts.astype(np.int64)) > 0), "counts do not fall along the ranks"
    tokens = text()[:200]
    assert Matcher(gain).match(tokens).tolist() == reference.longest_matches(tokens, f_grams(gain), 60)


def test_a_vocabulary_of_a_million_begins_with_that_of_100_000():
    assert num_candidates(100_000) == num_candidates(1_000_000) == num_candidates(4_000_000) == 16_000_000
    assert num_candidates(10_000_000) == 40_000_000
    assert (num_candidates(0), num_candidates(None)) == (0, None)


def test_the_ranking_is_kept_by_files_and_processes(tmp_path):
    result = count_f_grams([text()], ranking="gain", quiet=True, **LIMITS)
    vocabulary = result.vocabulary
    loaded = FGramVocabulary.load(vocabulary.save(tmp_path / "v.safetensors"))
    loaded.verify()
    copied = pickle.loads(pickle.dumps(vocabulary))
    for each in (loaded, copied, pickle.loads(pickle.dumps(loaded))):
        assert (each.ranking, each.fingerprint) == ("gain", vocabulary.fingerprint)
        assert each.counts.tolist() == vocabulary.counts.tolist()
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()
    assert (result.statistics.ranking, result.statistics.count_at_cut) == ("gain", vocabulary.counts.min())


def test_a_file_that_names_no_ranking_is_by_frequency_and_one_that_names_another_is_refused(tmp_path):
    vocabulary = count_f_grams([text()], ranking="frequency", quiet=True, **LIMITS).vocabulary
    path = vocabulary.save(tmp_path)
    arrays, metadata = f_gram_file.open_file(path)
    assert "ranking" not in metadata
    loaded = FGramVocabulary.load(path)
    loaded.verify()
    assert loaded.ranking == "frequency"
    made = {key: value for key, value in metadata.items() if key != "header_sha256"}
    f_gram_file.write_file(tmp_path / "other.safetensors", arrays, made | {"ranking": "beauty"})
    with pytest.raises(SconeError, match="ranking is 'beauty'; expected gain or frequency"):
        FGramVocabulary.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="ranking is 'beauty'"):
        FGramVocabulary.from_ranked([(1, 2)], [3], vocab_size=5, ranking="beauty")


def test_the_order_of_counts_is_checked_by_frequency_alone_and_closure_always():
    grams = [(1, 2), (2, 3), (1, 2, 3)]
    made = FGramVocabulary.from_ranked(grams, [2, 5, 2], vocab_size=5, ranking="gain")
    made.verify()
    with pytest.raises(ValueError, match="out of order"):
        FGramVocabulary.from_ranked(grams, [2, 5, 2], vocab_size=5)
    with pytest.raises(ValueError, match="suffix"):
        FGramVocabulary.from_ranked([grams[0], grams[2]], [2, 2], vocab_size=5, ranking="gain")
    with pytest.raises(ValueError, match="lower rank"):
        FGramVocabulary.from_ranked([grams[0], grams[0]], [2, 2], vocab_size=5, ranking="gain")


def test_mistakes_get_one_line():
    for options, message in (
        ({"ranking": "beauty"}, "found ranking = 'beauty'; expected gain or frequency"),
        ({"max_n": 255}, "found max_n = 255; expected at most 254"),
        ({"memory_budget_bytes": 20_000}, r"n-grams of up to 4 tokens .* \(what the ranking by gain chooses from"),
    ):
        with pytest.raises(SconeError, match=message) as error:
            count_f_grams([text()], quiet=True, **({"ranking": "gain"} | LIMITS | options))
        assert "\n" not in str(error.value)
    vocabulary = count_f_grams([text()], ranking="gain", quiet=True, **LIMITS).vocabulary
    with pytest.raises(ValueError, match="candidates are ranked by gain"):
        rank_by_gain(vocabulary, np.zeros(60, np.int64), 3)
    with pytest.raises(ValueError, match="59 token counts for 60 tokens"):
        rank_by_gain(vocabulary, np.zeros(59, np.int64), 3)


def test_the_memory_plan_knows_how_many_candidates_there_are():
    """More candidates than f-grams, and no more than the corpus can hold."""
    with pytest.raises(SconeError, match=r"for 1,000 n-grams of up to 4 tokens"):
        count_f_grams([text()], quiet=True, memory_budget_bytes=20_000, ranking="gain", **LIMITS)
    with pytest.raises(SconeError, match=r"for 100 n-grams of up to 3 tokens"):
        count_f_grams([text()], quiet=True, memory_budget_bytes=20_000, ranking="frequency", **LIMITS)


def test_a_budget_that_takes_files_changes_nothing():
    options = LIMITS | {"min_freq": 50, "ranking": "gain", "quiet": True}
    whole, small = (count_f_grams([text(60_000)], memory_budget_bytes=each, **options) for each in (None, 600_000))
    assert [each.statistics.on_disk for each in (whole, small)] == [False, True]
    assert small.vocabulary.num_f_grams == 100
    assert small.vocabulary.fingerprint == whole.vocabulary.fingerprint


@pytest.mark.parametrize("ranking", ["gain", "frequency"])
def test_a_corpus_where_nothing_is_frequent_enough_has_no_f_grams(ranking):
    for tokens in ([], [1], [1, 2, 3, 4]):
        made = count_f_grams([np.array(tokens, np.uint16)], ranking=ranking, quiet=True, **LIMITS)
        assert made.vocabulary.num_f_grams == 0
        assert made.statistics.count_at_cut is None


@pytest.mark.parametrize("ranking", ["gain", "frequency"])
def test_both_rankings_from_the_command_line(ranking, tmp_path, capsys):
    common = ["--dataset_name", str(write_corpus(tmp_path)), "--cache_dir", str(tmp_path / "cache")]
    common += ["--tokenizer", "train", "--vocab_size", "300", "--max_n", "2", "--min_freq", "5"]
    common += ["--max_f_grams", "50", "--ranking", ranking]
    assert main(["count", *common, "--output", str(tmp_path / "counted"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counted = FGramVocabulary.load(tmp_path / "counted")
    assert (report["count"]["ranking"], counted.ranking, counted.max_n) == (ranking, ranking, 2)
    assert len(report["count"]["levels"]) == (2 if ranking == "gain" else 1)
    assert sum(report["held_out_positions_by_length"].values()) > 0
    assert main(["count", *common]) == 0
    assert f"50 of 50 asked for, by {ranking}" in capsys.readouterr().out
    sizes = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --max_length 32 --max_steps 2 --device cpu"
    where = ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--num_workers", "0"]
    assert main(["train", *common, *sizes.split(), *where]) == 0
    trained = FGramVocabulary.load(tmp_path / "run" / "final_model")
    assert (trained.ranking, trained.fingerprint) == (ranking, counted.fingerprint)
    trained.verify()
    assert list(Path(tmp_path / "cache").glob("vocabularies/*/5-50"))
