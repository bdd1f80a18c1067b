"""Experiments as results, and the quality benchmark on a made-up ladder: every ratio is what the losses say."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scone.tests.evaluation import experiments

experiment_results, bench = experiments.module("experiment_results"), experiments.module("bench_quality")
mean_loss = experiment_results.mean_loss
plain_loss_at, run_results = experiment_results.plain_loss_at, experiment_results.run_results


@pytest.fixture
def results():
    return {result.name: result for result in run_results(experiments.experiment())}


def test_seeds_are_averaged_and_unfinished_runs_left_out(results):
    assert "late" not in results
    plain = results["plain"].perplexity["validation"]
    assert plain["perplexity"] == pytest.approx(math.exp(4.0))
    assert plain["perplexity_spread"] == pytest.approx([math.exp(3.99), math.exp(4.01)])
    assert "perplexity_spread" not in results["rows-1k"].perplexity["validation"]
    assert results["plain"].facts["seeds"] == [1, 2]
    assert mean_loss(results["plain"], ["novels", "news"]) == pytest.approx(4.15)
    assert results["rows-1k-shuffled"].kind == "learned rows, shuffled table"
    assert [results[name].num_f_grams for name in ("plain", "rows-100", "over-encoding-1k")] == [None, 100, 1000]
    assert [results[f"{name}-1k"].f_gram_model_parameters for name in ("model", "both", "rows")] == [8500, 500, 0]


@given(doublings=st.floats(0, 2) | st.floats(-1, -0.02) | st.floats(2.02, 3))  # nearly a budget is that budget
def test_plain_between_budgets_is_interpolated_in_log_flops_and_not_beyond(doublings):
    flops = 1e12 * 2**doublings
    found = plain_loss_at(run_results(experiments.experiment()), flops, ["validation"])
    assert found == (pytest.approx(4.0 - 0.1 * doublings, abs=2e-4) if 0 <= doublings <= 2 else None)


# ------------------------------------------------------------------ the benchmark


@pytest.fixture
def records(tmp_path):
    """The records of the benchmark by metric."""

    def measure(ladder):
        (tmp_path / "ladder.json").write_text(json.dumps(ladder))
        command = ["--ladder", str(tmp_path / "ladder.json"), "--json", str(tmp_path / "quality.json")]
        assert bench.main(command) == 0
        return {record["metric"]: record for record in json.loads((tmp_path / "quality.json").read_text())["records"]}

    return measure


def test_the_ladders_metrics_are_those_of_its_losses(records):
    """Of the law 3 + C^-0.5; the worst text, and the worst rung beside over-encoding, count."""

    def run(name, flops, loss, **texts):
        tests = {text: {"loss": loss + texts.get(text, 0.0)} for text in ("novels", "c4")}
        tests = {text: test | {"block_losses": [test["loss"]] * 3} for text, test in tests.items()}
        return {"run": name, "seed": 1, "tokens": 1, "cost": {"training_flops": flops}, "tests": tests}

    def law(flops):
        return 3 + flops**-0.5

    runs = {f"7m-{each}-plain": run(f"7m-{each}-plain", each, law(each)) for each in (5, 10, 20, 40)}
    runs |= {f"7m-{each}-rows": run(f"7m-{each}-rows", each, law(1.6 * each)) for each in (5, 10)}
    runs["7m-20-rows"] = run("7m-20-rows", 20, law(1.6 * 20), c4=0.1, novels=-0.1)
    runs |= {f"7m-{each}-over-encoding": run(f"7m-{each}-over-encoding", each, law(each * 1.5)) for each in (5, 20)}
    runs["7m-5-over-encoding"]["tests"]["c4"]["loss"] -= 0.5
    curves = {"epochs4-plain": (5.0, 4.0), "epochs4-rows": (4.0, 3.9)}
    runs |= {name: {"run": name, "finished": True, "curve": [{"validation": each} for each in losses]}
             for name, losses in curves.items()}  # fmt: skip
    found = records({"runs": runs})
    assert found["compute_multiplier_7m"]["ratio"] == pytest.approx(1.6, rel=0.01)
    assert found["compute_multiplier_7m"]["met"]
    assert "beyond" not in found["compute_multiplier_7m"]["peer_name"]
    assert [found[f"compute_multiplier_{size}"]["ratio"] for size in ("27m", "92m")] == [None, None]
    assert found["compute_multiplier_92m"]["peer_name"] == "not run"
    worst = found["worst_text_vs_plain"]
    assert worst["ratio"] == pytest.approx(math.exp(law(32) + 0.1 - law(20)))
    assert (worst["met"], worst["peer_name"]) == (False, "plain, c4, 7m at 20 tokens per weight")
    hashed = found["vs_over_encoding"]
    assert hashed["ratio"] == pytest.approx(math.exp(law(8) - law(7.5) + 0.25))
    assert hashed["peer_name"] == "over-encoding, 7m at 5 tokens per weight"
    assert found["rows_overfit_4_epochs"]["ratio"] == pytest.approx(math.exp(-0.1))
    del runs["7m-40-plain"], runs["7m-5-over-encoding"], runs["7m-20-over-encoding"]
    runs["epochs4-rows"]["finished"] = False
    for words, gone in (("on the curve of rows", "7m-5-rows"), ("beyond", "7m-10-rows")):
        found = records({"runs": runs})
        assert found["compute_multiplier_7m"]["ratio"] == pytest.approx(1.6, rel=0.01)
        assert words in found["compute_multiplier_7m"]["peer_name"]
        del runs[gone]
    for metric in ("vs_over_encoding", "rows_overfit_4_epochs"):
        assert (found[metric]["ratio"], found[metric]["peer_name"]) == (None, "not run")


def test_the_quick_ladder_says_what_the_benchmark_needs(tmp_path, capsys):
    """Its runs are three budgets of plain and one of each peer; without a ladder the benchmark says what to do."""
    names = [name.split("-", 2) for name in yaml.safe_load(bench.QUICK.read_text())["runs"]]
    assert sorted(kind for _, _, kind in names) == ["over-encoding", "plain", "plain", "plain", "rows"]
    (size, (budget, _)), = bench.QUICK_MULTIPLIERS.items()  # fmt: skip
    assert [size, budget, "rows"] in names
    assert bench.main(["--ladder", str(tmp_path / "none.json")]) == 1
    assert "run experiments/run.py" in capsys.readouterr().out
