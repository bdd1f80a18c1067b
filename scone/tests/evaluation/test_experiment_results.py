"""Experiments as results: seeds are averaged, kinds are read from options, plain's budgets are never extrapolated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scone.evaluation.report import write_report
from scone.evaluation.results import RunResult
from scone.tests.evaluation import experiments

experiment_results = experiments.module("experiment_results")
kind_of_options, mean_loss = experiment_results.kind_of_options, experiment_results.mean_loss
plain_loss_at, run_results = experiment_results.plain_loss_at, experiment_results.run_results


@pytest.fixture
def results() -> dict[str, RunResult]:
    return {result.name: result for result in run_results(experiments.experiment())}


def test_seeds_are_averaged_and_unfinished_runs_left_out(results: dict[str, RunResult]) -> None:
    assert "late" not in results
    plain = results["plain"].perplexity["validation"]
    assert plain["perplexity"] == pytest.approx(math.exp(4.0))
    assert plain["perplexity_spread"] == pytest.approx([math.exp(3.99), math.exp(4.01)])
    assert "perplexity_spread" not in results["rows-1k"].perplexity["validation"]
    assert results["plain"].facts["seeds"] == [1, 2]
    assert mean_loss(results["plain"], ["novels", "news"]) == pytest.approx(4.15)


def test_kinds_and_sizes_are_read_from_the_options(results: dict[str, RunResult]) -> None:
    assert {name: result.kind for name, result in results.items()} == {
        "plain": "plain", "plain-2x-steps": "plain", "plain-4x-steps": "plain", "plain-2x-deep": "plain",
        "model-100": "f-gram model", "model-1k": "f-gram model",
        "rows-100": "learned rows", "rows-1k": "learned rows",
        "both-1k": "f-gram model + learned rows", "over-encoding-1k": "over-encoding",
        "rows-1k-shuffled": "learned rows, shuffled table",
    }  # fmt: skip
    assert [results[name].num_f_grams for name in ("plain", "rows-100", "over-encoding-1k")] == [None, 100, 1000]
    assert results["model-1k"].f_gram_model_parameters == 8500
    assert results["both-1k"].f_gram_model_parameters == 500
    assert results["rows-1k"].f_gram_model_parameters == 0
    layers = {"model.f_gram.num_hidden_layers": None}
    assert (
        kind_of_options({"model.combination": "replace", "model.learned_rows": 0} | layers) == "f-gram model, replace"
    )
    assert kind_of_options({"model.rows_backoff": False} | layers) == "f-gram model + learned rows, no back-off"
    assert kind_of_options({"model.rows_backoff": False}) == "learned rows, no back-off"


@given(doublings=st.floats(0, 2))
def test_plain_between_budgets_is_interpolated_in_log_flops(doublings: float) -> None:
    found = plain_loss_at(run_results(experiments.experiment()), 1e12 * 2**doublings, ["validation"])
    assert found == pytest.approx(4.0 - 0.1 * doublings, abs=2e-4)


@pytest.mark.parametrize("flops", [0.99e12, 4.01e12, 1e15])
def test_plain_is_not_extrapolated(flops: float) -> None:
    assert plain_loss_at(run_results(experiments.experiment()), flops, ["validation"]) is None


def test_one_budget_is_no_curve() -> None:
    only = [result for result in run_results(experiments.experiment()) if result.name == "plain"]
    assert plain_loss_at(only, 1e12, ["validation"]) is None
    assert plain_loss_at([], 1e12, ["validation"]) is None


def test_an_experiment_becomes_a_report(results: dict[str, RunResult], tmp_path: Path) -> None:
    write_report(list(results.values()), tmp_path, title="An experiment")
    page = (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    # on each of three texts: inference and training FLOPs, S, and the f-gram models, which differ in size
    assert page.count("<svg") == 3 * 4
    assert page.count("<title>plain: seeds</title>") == 2 * 3
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["records"]) == 11
