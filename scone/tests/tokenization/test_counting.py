"""The laws of counting: exact, whatever the pruning, the shards, the threads, the memory budget and the token ids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scone.tests.kernels import reference
from scone.tests.kernels.reference import count_n_grams
from scone.tokenization.counting import CountResult, count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError

VOCAB_SIZE = 12
SEPARATOR = 11
DEFAULTS: dict = {"vocab_size": VOCAB_SIZE, "max_n": 4, "separator_ids": [SEPARATOR], "ranking": "frequency"}
TINY_BUDGETS = [None, 120_000, 400_000]


@st.composite
def corpora(draw: st.DrawFn) -> list[np.ndarray]:
    """A few corpora of skewed, repetitive tokens with separators, some of them empty, of any integer type."""
    shards = []
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.sampled_from([0, 1, 2, 7, 60, 700]))
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        tokens = np.minimum(generator.geometric(draw(st.sampled_from([0.2, 0.5, 0.9])), length) - 1, VOCAB_SIZE - 1)
        shards.append(tokens.astype(draw(st.sampled_from([np.uint16, np.uint32, np.int64, np.uint8]))))
    return shards


def count(shards: list[np.ndarray], **options: object) -> CountResult:
    return count_f_grams(shards, quiet=True, **(DEFAULTS | options))


def expected(shards: list[np.ndarray], **options: object) -> FGramVocabulary:
    made = DEFAULTS | options
    everything = count_n_grams(shards, made["max_n"], made["separator_ids"])
    return reference.vocabulary_of(everything, **made)


def assert_same(found: FGramVocabulary, wanted: FGramVocabulary) -> None:
    assert found.fingerprint == wanted.fingerprint
    for name in ("counts", "lengths", "suffixes"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(1, 6), st.sampled_from([1, 2, 3]))
@example([], 3, 1)
@example([np.zeros(700, np.uint16)], 6, 1)
def test_counts_equal_collections_counter(shards, max_n, num_threads):
    result = count(shards, max_n=max_n, num_threads=num_threads)
    assert_same(result.vocabulary, expected(shards, max_n=max_n))
    assert result.statistics.num_tokens == sum(len(shard) for shard in shards)


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(1, 12), st.integers(0, 300), st.sampled_from(TINY_BUDGETS))
def test_pruned_counting_equals_count_everything_then_filter(shards, min_freq, max_f_grams, budget):
    result = count(shards, min_freq=min_freq, max_f_grams=max_f_grams, memory_budget_bytes=budget)
    wanted = expected(shards, min_freq=min_freq, max_f_grams=max_f_grams)
    assert_same(result.vocabulary, wanted)
    assert result.statistics.count_at_cut == (int(wanted.counts[-1]) if wanted.num_f_grams else None)
    assert bool(result.statistics.notes) == (0 < wanted.num_f_grams < max_f_grams)


@settings(max_examples=25, deadline=None)
@given(corpora(), st.randoms(use_true_random=False), st.sampled_from([1, 3]), st.sampled_from(TINY_BUDGETS))
def test_shards_in_any_order_give_the_same_vocabulary(shards, random, num_threads, budget):
    options = {"max_f_grams": 100, "min_freq": 2}
    first = count(shards, **options)
    shuffled = list(shards)
    random.shuffle(shuffled)
    other = count(shuffled, num_threads=num_threads, memory_budget_bytes=budget, **options)
    assert_same(other.vocabulary, first.vocabulary)
    how = {"seconds": 0.0, "on_disk": False, "temporary_bytes": 0, "num_threads": 1}
    assert dataclasses.replace(other.statistics, **how) == dataclasses.replace(first.statistics, **how)


@settings(max_examples=15, deadline=None)
@given(corpora(), st.sampled_from([2**18, 2**20]), st.sampled_from([1, 2]))
def test_token_ids_may_be_large(shards, vocab_size, min_freq):
    spread = (vocab_size - 1) // (VOCAB_SIZE - 1)
    shards = [shard.astype(np.uint32) * np.uint32(spread) for shard in shards]
    options = {"vocab_size": vocab_size, "separator_ids": [SEPARATOR * spread], "min_freq": min_freq}
    options["max_f_grams"] = 200
    result = count(shards, num_threads=2, memory_budget_bytes=28 * vocab_size + 300_000, **options)
    assert_same(result.vocabulary, expected(shards, **options))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1, 2, 12], {}, "found token 12 at index 2 of corpus 1"),
        ([1, -3], {}, "found token -3 at index 1 of corpus 1"),
        ([1.5], {}, "type float64"),
        ([[1]], {}, "shape"),
        ([1, 2], {"max_n": 0}, "max_n = 0"),
        ([1, 2], {"min_freq": 0}, "min_freq = 0"),
        ([1, 2], {"vocab_size": 2**32}, "vocab_size"),
        ([1, 2] * 500, {"memory_budget_bytes": 1000}, "memory budget of 1000 B; expected at least"),
    ],
)
def test_mistakes_get_one_line(tokens, options, message):
    with pytest.raises(SconeError, match=message) as error:
        count([np.array([1], np.uint16), np.array(tokens)], **options)
    assert "\n" not in str(error.value)


def test_a_separator_at_the_edge_of_a_block_or_a_corpus_is_not_crossed():
    once = np.array([1, 2, SEPARATOR, 1, 2, 3], np.uint16)
    result = count([once, once, np.array([3, 1], np.uint16)], memory_budget_bytes=120_000)
    found = {result.vocabulary.tokens(VOCAB_SIZE + r): int(c) for r, c in enumerate(result.vocabulary.counts)}
    assert found == {(1, 2): 4, (2, 3): 2, (1, 2, 3): 2, (3, 1): 1}
