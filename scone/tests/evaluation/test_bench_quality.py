"""The quality benchmark on a made-up experiment: every ratio is the one that the losses say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scone.tests.evaluation import experiments


@pytest.fixture
def bench() -> ModuleType:
    return experiments.module("bench_quality")


def records(bench: ModuleType, folder: Path, experiment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    (folder / "experiment.json").write_text(json.dumps(experiment))
    command = ["--results", str(folder / "experiment.json"), "--json", str(folder / "quality.json")]
    assert bench.main(command) == 0
    report = json.loads((folder / "quality.json").read_text())
    assert report["benchmark"] == "quality"
    return {record["metric"]: record for record in report["records"]} | {"config": report["config"]}


def test_ratios_are_those_of_the_losses(bench: ModuleType, tmp_path: Path) -> None:
    found = records(bench, tmp_path, experiments.experiment())
    assert found["config"]["best"] == "both-1k", "controls and variants are not candidates"
    expected = {  # both-1k has a loss of 3.83 at twice plain's training FLOPs
        "perplexity_vs_plain_equal_tokens": (3.83 - 4.0, 0.9, True),
        "perplexity_vs_plain_equal_train_flops": (3.83 - 3.9, 0.97, True),
        "perplexity_vs_doubled_plain": (3.83 - 3.88, 1.0, True),
        "perplexity_vs_over_encoding": (3.83 - 3.89, 0.98, True),
        "perplexity_vs_rows_only": (3.83 - 3.86, 1.0, True),
        "perplexity_vs_model_only": (3.83 - 3.92, 1.0, True),
        "perplexity_vs_plain_equal_tokens_100": (3.9 - 4.0, 0.9, False),  # rows-100 is the best of 100 f-grams
        "perplexity_vs_model_only_100": (3.9 - 3.95, 1.0, True),
        "perplexity_vs_plain_equal_tokens_novels": (3.83 - 4.0, 0.9, True),
    }
    for metric, (difference, target, met) in expected.items():
        record = found[metric]
        assert record["ratio"] == pytest.approx(math.exp(difference), rel=1e-3), metric
        assert (record["target"], record["met"]) == (target, met), metric
    assert found["perplexity_vs_plain_equal_tokens"]["peer_name"] == "plain, 2 seeds"
    assert found["perplexity_vs_plain_equal_tokens"]["ours"] == pytest.approx(math.exp(3.93))


def test_what_was_not_run_is_null(bench: ModuleType, tmp_path: Path) -> None:
    """No extrapolation of plain, no peer of other sizes, and nothing met or missed by what is not there."""
    experiment = experiments.experiment()
    for name in ("plain-2x-steps", "plain-4x-steps", "plain-2x-deep", "over-encoding-1k"):
        del experiment["runs"][name]
    found = records(bench, tmp_path, experiment)
    for metric in ("plain_equal_train_flops", "doubled_plain", "over_encoding"):
        record = found[f"perplexity_vs_{metric}"]
        assert (record["ratio"], record["peer"], record["met"]) == (None, None, None)
    assert "outside its runs" in found["perplexity_vs_plain_equal_train_flops"]["peer_name"]
    assert found["perplexity_vs_plain_equal_tokens"]["met"]


def test_each_kind_speaks_by_its_best_settings(bench: ModuleType, tmp_path: Path) -> None:
    """By validation loss; a gate is a setting, and so is plain's own learning rate, at one budget or at another."""
    experiment = experiments.experiment()
    more = {
        "plain-fast": experiments.run("plain-fast", 3.95, experiments.PLAIN),
        "plain-2x-fast": experiments.run("plain-2x-fast", 3.89, experiments.PLAIN, training=2e12, tokens=20_000),
        "plain-slow": experiments.run("plain-slow", 4.2, experiments.PLAIN),
        "rows-gate": experiments.run("rows-gate", 3.84, experiments.ROWS | {"model.combination": "gate"}),
        "both-gate": experiments.run(
            "both-gate", 3.8, {"model.combination": "gate", "model.learned_rows": 1000}, training=2e12
        ),
    }
    experiment["runs"] = more | experiment["runs"]
    found = records(bench, tmp_path, experiment)
    assert found["config"]["best"] == "both-gate"
    expected = {"plain_equal_tokens": 3.95, "plain_equal_train_flops": 3.89, "rows_only": 3.84, "model_only": 3.92}
    for metric, loss in expected.items():
        assert found[f"perplexity_vs_{metric}"]["ratio"] == pytest.approx(math.exp(3.8 - loss), rel=1e-3), metric
    assert found["perplexity_vs_plain_equal_tokens"]["peer_name"] == "plain-fast"


def test_a_run_that_took_a_step_more_is_an_equal(bench: ModuleType, tmp_path: Path) -> None:
    experiment = experiments.experiment()
    experiment["runs"]["both-1k"]["tokens"] += 16
    experiment["runs"]["plain-2x-steps"]["tokens"] += 16
    found = records(bench, tmp_path, experiment)
    assert found["perplexity_vs_plain_equal_tokens"]["ratio"] == pytest.approx(math.exp(3.83 - 4.0), rel=1e-3)
    assert found["perplexity_vs_plain_equal_train_flops"]["ratio"] == pytest.approx(math.exp(3.83 - 3.9), rel=1e-3)


def test_plain_of_other_tokens_is_no_equal_peer(bench: ModuleType, tmp_path: Path) -> None:
    experiment = experiments.experiment()
    for name in ("plain-seed1", "plain-seed2"):
        experiment["runs"][name]["tokens"] = 5_000
    assert records(bench, tmp_path, experiment)["perplexity_vs_plain_equal_tokens"]["ratio"] is None


def test_without_results_it_says_what_to_do(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--results", str(tmp_path / "none.json")]) == 1
    assert "run experiments/run.py" in capsys.readouterr().out


def test_the_quick_experiment_says_what_the_benchmark_needs(bench: ModuleType) -> None:
    """Its options exist, and every metric has its peers."""
    from scone.configs.loading import from_mapping

    kind_of_options = experiments.module("experiment_results").kind_of_options
    kinds = set()
    for changes in bench.QUICK["runs"].values():
        flat = bench.QUICK["base"] | changes
        nested: dict[str, Any] = {}
        for option, value in flat.items():
            *sections, last = option.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        from_mapping(nested)
        kinds.add(kind_of_options(flat))
    assert kinds == {"plain", *bench.OURS, bench.OVER_ENCODING}


@pytest.mark.parametrize(("size", "name"), [(10_000, "10k"), (1_000_000, "1m"), (1_500, "1500"), (30, "30")])
def test_sizes_in_names(bench: ModuleType, size: int, name: str) -> None:
    assert bench.short(size) == name
