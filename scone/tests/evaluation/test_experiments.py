"""Experiments as results, and the quality benchmark on a made-up one: every ratio is the one that the losses say."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scone.configs.loading import from_mapping
from scone.tests.evaluation import experiments

experiment_results, bench = experiments.module("experiment_results"), experiments.module("bench_quality")
kind_of_options, mean_loss = experiment_results.kind_of_options, experiment_results.mean_loss
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
    """The records of the benchmark by metric, and its configuration."""

    def measure(experiment, ladder=None):
        (tmp_path / "experiment.json").write_text(json.dumps(experiment))
        if ladder is not None:
            (tmp_path / "ladder.json").write_text(json.dumps(ladder))
        command = ["--results", str(tmp_path / "experiment.json"), "--json", str(tmp_path / "quality.json")]
        command += ["--ladder", str(tmp_path / "ladder.json")]
        assert bench.main(command) == 0
        report = json.loads((tmp_path / "quality.json").read_text())
        found = {record["metric"].removeprefix("perplexity_vs_"): record for record in report["records"]}
        return found | {"config": report["config"]}

    return measure


def assert_ratios(found, differences):
    for metric, difference in differences.items():
        assert found[metric]["ratio"] == pytest.approx(math.exp(difference), rel=1e-3), metric


def test_ratios_are_those_of_the_losses(records):
    experiment = experiments.experiment()
    for name in ("both-1k", "plain-2x-steps"):
        experiment["runs"][name]["tokens"] += 16  # a run that took a step more is an equal
    found = records(experiment)
    assert found["config"]["best"] == "both-1k", "controls and variants are not candidates"
    expected = {  # both-1k has a loss of 3.83 at twice plain's training FLOPs
        "plain_equal_tokens": (3.83 - 4.0, 0.9, True),
        "plain_equal_train_flops": (3.83 - 3.9, 0.97, True),
        "doubled_plain": (3.83 - 3.88, 1.0, True),
        "over_encoding": (3.83 - 3.89, 0.98, True),
        "rows_only": (3.83 - 3.86, 1.0, True),
        "model_only": (3.83 - 3.92, 1.0, True),
        "plain_equal_tokens_100": (3.9 - 4.0, 0.9, False),  # rows-100 is the best of 100 f-grams
        "model_only_100": (3.9 - 3.95, 1.0, True),
        "plain_equal_tokens_novels": (3.83 - 4.0, 0.9, True),
    }
    assert_ratios(found, {metric: difference for metric, (difference, _, _) in expected.items()})
    for metric, (_, target, met) in expected.items():
        assert (found[metric]["target"], found[metric]["met"]) == (target, met), metric
    equal = found["plain_equal_tokens"]
    assert (equal["peer_name"], equal["ours"]) == ("plain, 2 seeds", pytest.approx(math.exp(3.93)))


def test_what_was_not_run_is_null(records):
    """No extrapolation of plain, no peer of other sizes or tokens, and nothing met or missed by what is not there."""
    experiment = experiments.experiment()
    for name in ("plain-2x-steps", "plain-4x-steps", "plain-2x-deep", "over-encoding-1k"):
        del experiment["runs"][name]
    for name in ("plain-seed1", "plain-seed2"):
        experiment["runs"][name]["tokens"] = 5_000
    found = records(experiment)
    for metric in ("plain_equal_train_flops", "doubled_plain", "over_encoding", "plain_equal_tokens"):
        assert [found[metric][field] for field in ("ratio", "peer", "met")] == [None] * 3, metric
    assert "outside its runs" in found["plain_equal_train_flops"]["peer_name"]
    assert found["rows_only"]["met"]


def test_each_kind_speaks_by_its_best_settings(records):
    """By validation loss; a gate is a setting, and so is plain's own learning rate, at one budget or at another."""
    experiment, run = experiments.experiment(), experiments.run
    gate = {"model.combination": "gate"}
    experiment["runs"] = experiment["runs"] | {
        "plain-fast": run("plain-fast", 3.95, experiments.PLAIN),
        "plain-2x-fast": run("plain-2x-fast", 3.89, experiments.PLAIN, training=2e12, tokens=20_000),
        "plain-slow": run("plain-slow", 4.2, experiments.PLAIN),
        "rows-gate": run("rows-gate", 3.84, experiments.ROWS | gate),
        "both-gate": run("both-gate", 3.8, gate | {"model.learned_rows": 1000}, training=2e12),
    }
    found = records(experiment)
    assert found["config"]["best"] == "both-gate"
    peers = {"plain_equal_tokens": 3.95, "plain_equal_train_flops": 3.89, "rows_only": 3.84, "model_only": 3.92}
    assert_ratios(found, {metric: 3.8 - loss for metric, loss in peers.items()})
    assert found["plain_equal_tokens"]["peer_name"] == "plain-fast"


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
    found = records(experiments.experiment(), {"runs": runs})
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
    for words, gone in (("on the curve of rows", ()), ("beyond", ("7m-5-rows", "7m-10-rows"))):  # one run is no curve
        runs = {name: run for name, run in runs.items() if name not in gone}
        found = records(experiments.experiment(), {"runs": runs})
        assert found["compute_multiplier_7m"]["ratio"] == pytest.approx(1.6, rel=0.01)
        assert words in found["compute_multiplier_7m"]["peer_name"]
    for metric in ("vs_over_encoding", "rows_overfit_4_epochs"):
        assert (found[metric]["ratio"], found[metric]["peer_name"]) == (None, "not run")


def test_ladder_and_passes_are_read_from_files_of_their_own(tmp_path):
    """A file that is not there is a run that was not made."""
    folder = {name: tmp_path / f"{name}.json" for name in ("results", "ladder", "epochs", "report")}
    folder["results"].write_text(json.dumps(experiments.experiment()), encoding="utf-8")
    runs = {f"epochs4-{kind}": {"run": kind, "finished": True, "curve": [{"validation": loss}]}
            for kind, loss in (("plain", 4.0), ("rows", 4.1))}  # fmt: skip
    folder["epochs"].write_text(json.dumps({"runs": runs}), encoding="utf-8")
    arguments = ["--results", folder["results"], "--ladder", folder["ladder"], folder["epochs"], "--json"]
    assert bench.main([str(each) for each in (*arguments, folder["report"])]) == 0
    report = json.loads(folder["report"].read_text(encoding="utf-8"))
    found = {record["metric"]: record for record in report["records"]}
    assert report["config"]["ladder"] == ["ladder.json", "epochs.json"]
    assert found["rows_overfit_4_epochs"]["ratio"] == pytest.approx(math.exp(0.1))
    assert not found["rows_overfit_4_epochs"]["met"]
    assert found["worst_text_vs_plain"]["peer_name"] == "not run"


def test_the_quick_experiment_says_what_the_benchmark_needs(tmp_path, capsys):
    """Its options exist, and every metric has its peers; without any results it says what to do."""
    kinds = set()
    for changes in bench.QUICK["runs"].values():
        options = bench.QUICK["base"] | changes
        from_mapping(experiments.module("run").nested(options))
        kinds.add(kind_of_options(options))
    assert kinds == {"plain", *bench.OURS, bench.OVER_ENCODING}
    assert bench.main(["--results", str(tmp_path / "none.json")]) == 1
    assert "run experiments/run.py" in capsys.readouterr().out
