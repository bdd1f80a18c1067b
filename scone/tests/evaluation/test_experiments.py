"""Experiments as a table, and the quality benchmark on a made-up ladder: every ratio is what the losses say."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from scone.tests.evaluation import experiments
from scone.tests.evaluation.experiments import run

bench, runner = experiments.module("bench_quality"), experiments.module("run")


def test_seeds_are_one_line_and_unfinished_runs_stand_last():
    def done(name, loss, flops, seed=1):
        cost = {"inference_flops_per_token": 1e6, "training_flops": flops}
        facts = {"run": name, "finished": True, "seed": seed, "cost": cost, "train_seconds": 4.0 + seed}
        return facts | {"tests": {"novels": {"loss": loss, "bits_per_byte": loss / 4}}}

    late = {"run": "late", "finished": False, "steps": 3, "max_steps": 10, "log": [{"eval_loss": 5.0, "step": 2}]}
    runs = {"late": late, "plain-seed1": done("plain", 4.0, 1e12), "plain-seed2": done("plain", 4.2, 1e12, 2)}
    report = {"experiment": {"tests": ["novels"]}, "runs": runs | {"rows": done("rows", 3.9, 2e12)}}
    _, _, plain, rows, *rest = runner.table(report).split("\n")
    spread = (math.exp(4.2) - math.exp(4.0)) / 2
    assert plain == f"| plain | 2 | {math.exp(4.1):.2f} ± {spread:.2f} | 1.0250 | 1.00× | 1.00× | 6 |"
    assert rows == f"| rows | 1 | {math.exp(3.9):.2f} | 0.9750 | 1.00× | 2.00× | 5 |"
    assert rest[-1] == "unfinished: late, 3 of 10 steps, validation loss 5.000 at step 2"


# ------------------------------------------------------------------ the benchmark


@pytest.fixture
def records(tmp_path):
    """The records of the benchmark by metric."""

    def measure(*parts):
        """Each a file of its own, behind one that is not there: runs that were not made."""
        paths = [tmp_path / f"{name}.json" for name in ("none", "ladder", "epochs")][: 1 + len(parts)]
        for path, runs in zip(paths[1:], parts, strict=True):
            path.write_text(json.dumps({"runs": runs}))
        assert bench.main(["--ladder", *map(str, paths), "--json", str(tmp_path / "quality.json")]) == 0
        report = json.loads((tmp_path / "quality.json").read_text())
        assert report["config"]["ladder"] == [path.name for path in paths]
        return {record["metric"]: record for record in report["records"]}

    return measure


def test_the_ladders_metrics_are_those_of_its_losses(records):
    """Of the law 3 + C^-0.5; the worst text, and the worst rung beside over-encoding, count."""

    def law(flops):
        return 3 + flops**-0.5

    runs = {f"7m-{each}-plain": run(f"7m-{each}-plain", each, law(each)) for each in (5, 10, 20, 40)}
    runs |= {f"7m-{each}-rows": run(f"7m-{each}-rows", each, law(1.6 * each)) for each in (5, 10)}
    runs["7m-20-rows"] = run("7m-20-rows", 20, law(1.6 * 20), c4=0.2, novels=-0.2)
    runs |= {f"7m-{each}-over-encoding": run(f"7m-{each}-over-encoding", each, law(each * 1.5)) for each in (5, 20)}
    runs["7m-5-over-encoding"]["tests"]["c4"]["loss"] -= 0.5
    epochs = {f"epochs4-{kind}": {"run": kind, "finished": True, "curve": [{"validation": each} for each in losses]}
              for kind, losses in (("plain", (5.0, 4.0)), ("rows", (4.0, 3.9)))}  # fmt: skip
    found = records(runs, epochs)
    assert found["compute_multiplier_7m"]["ratio"] == pytest.approx(1.6, rel=0.01)
    assert found["compute_multiplier_7m"]["met"]
    assert "beyond" not in found["compute_multiplier_7m"]["peer_name"]
    assert [found[f"compute_multiplier_{size}"]["ratio"] for size in ("27m", "92m")] == [None, None]
    assert found["compute_multiplier_92m"]["peer_name"] == "not run"
    worst = found["worst_text_vs_plain"]
    assert worst["ratio"] == pytest.approx(math.exp(law(32) + 0.1 - law(20)))
    assert (worst["met"], worst["peer_name"]) == (False, "plain, c4, 7m at 20 tokens per weight, rows")
    hashed = found["vs_over_encoding"]
    assert hashed["ratio"] == pytest.approx(math.exp(law(8) - law(7.5) + 0.25))
    assert hashed["peer_name"] == "over-encoding, 7m at 5 tokens per weight, rows"
    assert found["rows_overfit_4_epochs"]["ratio"] == pytest.approx(math.exp(-0.1))
    del runs["7m-40-plain"], runs["7m-5-over-encoding"], runs["7m-20-over-encoding"]
    epochs["epochs4-rows"]["finished"] = False
    for words in ("on the curve of rows", "beyond"):
        found = records(runs, epochs)
        assert found["compute_multiplier_7m"]["ratio"] == pytest.approx(1.6, rel=0.01)
        assert words in found["compute_multiplier_7m"]["peer_name"]
        runs = {name: each for name, each in runs.items() if name not in ("7m-5-rows", "7m-10-rows")}
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
