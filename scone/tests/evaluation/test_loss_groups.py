"""Laws of grouped losses: buckets add up to the total, groups are those of the plain loop, intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation.perplexity import mean_interval, perplexity, students_factor, windows
from scone.tests import tiny
from scone.tokenization.matcher import Matcher


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.scone()


TOKENS = tiny.corpus(400, seed=3)


@settings(max_examples=25, deadline=None)
@given(max_length=st.integers(2, 64), data=st.data())
def test_sums_over_groups_equal_the_total(model, max_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(max(1, max_length // 4), max_length))
    tokens = TOKENS[: data.draw(st.integers(2, len(TOKENS)))]
    result = perplexity(
        model, tokens, max_length, 16, stride, matcher=model.matcher, quiet=True, separator_id=tiny.SEPARATOR
    )
    for groups in (result.by_match_length, result.by_rank):
        assert sum(group["num_predicted"] for group in groups) == result.num_predicted
        assert sum(group["num_predicted"] * group["loss"] for group in groups) == pytest.approx(result.loss_sum)
    assert result.documents[0].sum() == pytest.approx(result.loss_sum)
    assert result.documents[1].sum() == result.num_predicted


@pytest.mark.parametrize("stride", [3, 16])
def test_groups_equal_the_plain_loop(model, stride: int) -> None:
    """Each prediction is filed under the f-gram that the model saw there: one that begins in the window."""
    expected: dict[int, list[int]] = {}
    ranks: list[int] = []
    documents: list[int] = []
    for window in windows(len(TOKENS), 16, stride):
        nodes = Matcher(model.vocabulary).match(TOKENS[window.start : window.end])
        for target in range(window.first_target, window.end):
            node = int(nodes[target - 1 - window.start])
            expected.setdefault(len(model.vocabulary.tokens(node)), []).append(target)
            if node >= tiny.VOCAB_SIZE:
                ranks.append(node - tiny.VOCAB_SIZE)
            documents.append(int((TOKENS[:target] == tiny.SEPARATOR).sum()))
    result = perplexity(model, TOKENS, 16, 8, stride, matcher=model.matcher, quiet=True, separator_id=tiny.SEPARATOR)
    assert {group["length"]: group["num_predicted"] for group in result.by_match_length} == {
        length: len(targets) for length, targets in expected.items()
    }
    no_f_gram, *buckets = result.by_rank
    assert (no_f_gram["first_rank"], no_f_gram["num_predicted"]) == (None, len(expected[1]))
    for bucket in buckets:
        assert bucket["num_predicted"] == sum(bucket["first_rank"] <= rank <= bucket["last_rank"] for rank in ranks)
    assert buckets[-1]["last_rank"] == model.vocabulary.num_f_grams - 1
    counts = np.bincount(documents, minlength=len(result.documents[1]))
    assert counts.tolist() == result.documents[1].tolist()
    assert result.num_documents == np.count_nonzero(counts)


def test_a_plain_model_is_judged_on_the_same_groups(model) -> None:
    plain = perplexity(tiny.trunk(), TOKENS, 16, matcher=model.matcher, quiet=True)
    ours = perplexity(model, TOKENS, 16, matcher=model.matcher, quiet=True)
    assert [one["num_predicted"] for one in plain.by_rank] == [one["num_predicted"] for one in ours.by_rank]
    assert perplexity(tiny.trunk(), TOKENS, 16, quiet=True).by_rank == ()


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    """2,000 corpora of 12 documents of uneven lengths, whose losses vary by document."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        counts = rng.integers(50, 400, 12)
        sums = counts * (3.0 + 0.3 * rng.standard_normal(12))
        low, high = mean_interval(sums, counts)
        covered += low < 3.0 < high
    assert 0.92 < covered / 2000 < 0.97


def test_too_few_documents_give_no_interval() -> None:
    assert mean_interval(np.array([3.0, 4.0, 0.0]), np.array([1, 1, 0])) is None
    assert mean_interval(np.array([3.0, 3.0, 3.0]), np.array([1, 1, 1])) == (3.0, 3.0)


@pytest.mark.parametrize(("degrees", "quantile"), [(2, 4.303), (5, 2.571), (30, 2.042), (10**6, 1.960)])
def test_students_factor_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert students_factor(degrees) == pytest.approx(quantile, rel=0.035)
    assert math.isfinite(students_factor(1))
