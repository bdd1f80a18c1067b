"""The benchmark end to end: table, live and plain models side by side; what is missing is named, the rest measured."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import scone
from scone.cli import main
from scone.configs.loading import from_mapping, save_options
from scone.evaluation.benchmark import kind_of, read_benchmark_config
from scone.evaluation.speed import flops_per_token, training_only_parameters
from scone.inference.loading import load_model
from scone.models.accounting import RunCost
from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.evaluation.conftest import WORDS
from scone.tests.processes import forked
from scone.utils.environment import PeakMemory, process_bytes
from scone.utils.errors import SconeError


@pytest.fixture
def config(served_model: Path, tmp_path: Path) -> dict:
    text = "".join(json.dumps({"text": WORDS[start : start + 400]}) + "\n" for start in range(0, 2400, 400))
    (tmp_path / "text.jsonl").write_text(text)
    model, table = str(served_model), str(served_model / "embeddings.cache")
    return {
        "model_configs": [
            {"name": "from the table", "model_path": model, "embedding_cache_path": table, "f_gram_model_size": "tiny"},
            {"name": "without its table", "model_path": model, "embedding_cache_path": str(tmp_path / "nowhere")},
            {"name": "nowhere", "model_path": str(tmp_path / "nowhere")},
        ],
        "baseline_configs": [{"name": "plain", "model_name": str(served_model / "plain")}],
        "dataset_configs": [
            {"name": "words", "dataset_name": str(tmp_path / "text.jsonl"), "split": "all"},
            {"name": "lost", "dataset_name": str(tmp_path / "lost.jsonl"), "split": "all"},
        ],
        "batch_sizes": [1, 2],
        "sequence_lengths": [32, 2048],
        "num_runs": 2,
        "warmup_runs": 0,
    }


def run(config: dict, folder: Path) -> int:
    (folder / "config.json").write_text(json.dumps(config))
    command = ["benchmark", "--config", str(folder / "config.json"), "--output_dir", str(folder / "out")]
    return main([*command, "--device", "cpu", "--cache_dir", str(folder / "cache"), "--max_tokens", "900"])


def test_everything_is_measured_and_what_is_missing_is_named(
    config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    table, live, plain = result["records"]
    assert [record["name"] for record in result["records"]] == ["from the table", "without its table", "plain"]
    assert table["perplexity"]["words"]["perplexity"] == pytest.approx(
        live["perplexity"]["words"]["perplexity"], rel=1e-4
    )
    assert (table["facts"]["served"], live["facts"]["served"]) == ("table", "live")
    for record in result["records"]:
        found = record["perplexity"]["words"]
        low, high = found["perplexity_interval"]
        assert low < found["perplexity"] < high
        assert found["word_perplexity"] > 1
        assert record["peak_process_bytes"] > record["resident_bytes"]
        assert [(speed["batch_size"], speed["sequence_length"]) for speed in record["speed"]] == [(1, 32), (2, 32)]
        for speed in record["speed"]:
            for name in ("prefill", "first_token", "decode_step"):
                percentiles = [speed[f"{name}_seconds_p{p}"] for p in (50, 90, 99)]
                assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2]
    assert table["inference_flops_per_token"] == plain["inference_flops_per_token"] < live["inference_flops_per_token"]
    assert table["training_flops_per_token"] == live["training_flops_per_token"] > plain["training_flops_per_token"]
    assert plain["training_flops_per_token"] == 3 * plain["inference_flops_per_token"]
    assert table["parameters"] == live["parameters"]
    assert table["parameters"]["training_only"] > table["f_gram_model_parameters"] > 0
    assert table["table_bytes"] > 0
    assert plain["table_bytes"] is None
    missing = {item["what"]: item["why"] for item in result["missing"]}
    assert "scone precompute --model_path" in missing["the table of without its table"]
    assert {"nowhere", "lost for plain", "plain at 2048 tokens"} <= set(missing)
    assert all("\n" not in why for why in missing.values()), "one line each"
    assert "found no file or folder" in shown
    assert "report:" in shown
    assert (tmp_path / "out" / "benchmark.html").read_text().count("<svg") == 3


def test_a_benchmark_that_is_stopped_keeps_the_models_that_are_done(config: dict, tmp_path: Path) -> None:
    config |= {"num_runs": 1, "sequence_lengths": [32], "batch_sizes": [1]}
    config["model_configs"] = [{**config["model_configs"][0], "name": f"model {place}"} for place in range(200)]
    process, report = forked(run, config, tmp_path, said=tmp_path / "said"), tmp_path / "out" / "benchmark.json"
    while process.is_alive() and not report.exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    found = json.loads(report.read_text())
    done = [record["name"] for record in found["records"]]
    missing = [item["what"] for item in found["missing"] if item["why"] == "not measured yet"]
    assert 1 <= len(done) < 200
    assert [*done, *missing] == [*(entry["name"] for entry in config["model_configs"]), "plain"]


def test_a_model_without_any_text_is_timed_and_nothing_at_all_fails(config: dict, tmp_path: Path, capsys) -> None:
    without_text = {"model_configs": [], "dataset_configs": config["dataset_configs"][1:], "batch_sizes": [1]}
    assert run(config | without_text, tmp_path) == 0
    (plain,) = json.loads((tmp_path / "out" / "benchmark.json").read_text())["records"]
    assert plain["perplexity"] == {}
    assert plain["speed"][0]["decode_tokens_per_second"] > 0
    shutil.rmtree(tmp_path / "out")
    config |= {"model_configs": config["model_configs"][2:], "baseline_configs": []}
    assert run(config, tmp_path) == 2
    assert "nothing could be measured: 1 of 1 models are missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_with_a_frozen_trunk_costs_less(config: dict, served_model: Path, tmp_path: Path) -> None:
    """Which trunks were frozen say the options beside the model; the FLOPs are those that its training counted."""
    frozen = tmp_path / "frozen"
    shutil.copytree(served_model, frozen)
    save_options(from_mapping({"training": {"freeze_trunk": True}}), frozen / "options.yaml")
    entries = [{"name": folder.name, "model_path": str(folder)} for folder in (served_model, frozen)]
    config |= {"model_configs": entries, "baseline_configs": [], "batch_sizes": [2], "sequence_lengths": [32]}
    assert run(config, tmp_path) == 0
    whole, without = json.loads((tmp_path / "out" / "benchmark.json").read_text())["records"]
    assert without["inference_flops_per_token"] == whole["inference_flops_per_token"]
    assert whole["training_flops_per_token"] == pytest.approx(3 * whole["inference_flops_per_token"])
    model, tokens = SconeForCausalLM.from_pretrained(frozen), np.arange(64).reshape(2, 32) % tiny.VOCAB_SIZE
    model.trunk.requires_grad_(False)
    cost = RunCost(model)
    cost.count({"input_ids": torch.from_numpy(tokens), "trie": model.trie_of(model.match(torch.from_numpy(tokens)))})
    expected = cost.to_dict()["training_flops_per_token"]
    assert flops_per_token(model, tokens, frozen_trunk=True)["training_flops_per_token"] == expected
    assert without["training_flops_per_token"] < 0.9 * whole["training_flops_per_token"]


def test_training_only_parameters_are_those_of_the_live_model(served_model: Path) -> None:
    live = load_model(served_model, device="cpu").model
    expected = sum(parameter.numel() for parameter in live.f_gram_embedding.parameters())
    assert training_only_parameters(served_model) == expected
    assert training_only_parameters(served_model / "plain") == 0
    assert training_only_parameters("gpt2-somewhere-else") is None


def test_peak_memory_sees_what_was_freed() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        before = process_bytes()
        torch.ones(40_000_000)
    assert peak.process_bytes >= before + 150_000_000
    assert peak.growth_bytes >= 150_000_000
    assert peak.accelerator_bytes is None


def test_kinds_are_named_by_what_was_learned() -> None:
    assert kind_of(tiny.trunk()) == "plain"
    assert kind_of(tiny.scone()) == "f-gram model + learned rows"
    assert kind_of(tiny.scone(learned_rows=0)) == "f-gram model"
    assert kind_of(tiny.scone(f_gram_model=False)) == "learned rows"


# ------------------------------------------------------------------ the JSON that says what to measure

SHIPPED = Path(scone.__file__).parent / "configs" / "benchmark_config.json"


def test_shipped_configuration_says_what_is_documented():
    config, raw = read_benchmark_config(SHIPPED), json.loads(SHIPPED.read_text())
    for section, fields in {
        "model_configs": {"name", "model_path", "embedding_cache_path", "f_gram_model_size", "max_f_grams"},
        "baseline_configs": {"name", "model_name"},
        "dataset_configs": {"name", "dataset_name", "dataset_config_name", "text_column", "split"},
    }.items():
        assert all(set(entry) == fields for entry in raw[section])
    assert [entry.name for entry in config.dataset_configs] == ["WikiText-103", "C4", "PG19"]
    assert [entry.split for entry in config.dataset_configs] == ["test", "validation", "test"]
    assert (config.batch_sizes, config.sequence_lengths) == ([1, 4, 8], [512, 1024])
    assert (config.num_runs, config.warmup_runs) == (5, 2)
    assert {entry.name for entry in config.entries} >= {"SCONE-Small-100K", "GPT2-Small", "GPT2-Medium"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle_configs": []}, "modle_configs"),
        ({"batch_sizes": 4}, "batch_sizes"),
        ({"batch_sizes": [0]}, r"found batch_sizes \[0\]; expected at least 1"),
        ({"num_runs": True}, "num_runs"),
        ({"model_configs": [{"name": "a"}]}, "model_path"),
        ({"model_configs": [{"name": "a", "model_path": {}}]}, "model_path"),
        ({"model_configs": ["a"]}, "model_configs"),
        ({"model_configs": [], "baseline_configs": []}, "found no models"),
        ({"baseline_configs": [{"name": "a", "model_name": "b"}] * 2}, "found the name a twice"),
    ],
)
def test_mistakes_are_told(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(SHIPPED.read_text()) | change))
    with pytest.raises(SconeError, match=message):
        read_benchmark_config(path)
