"""The benchmark's JSON: the shipped file is read, and mistakes are told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import scone
from scone.evaluation.benchmark import read_benchmark_config
from scone.utils.errors import SconeError

SHIPPED = Path(scone.__file__).parent / "configs" / "benchmark_config.json"


def test_shipped_configuration_says_what_is_documented():
    config, raw = read_benchmark_config(SHIPPED), json.loads(SHIPPED.read_text())
    fields = {"name", "model_path", "embedding_cache_path", "f_gram_model_size", "max_f_grams"}
    assert all(set(model) == fields for model in raw["model_configs"])
    assert all(set(baseline) == {"name", "model_name"} for baseline in raw["baseline_configs"])
    fields = {"name", "dataset_name", "dataset_config_name", "text_column", "split"}
    assert all(set(data_set) == fields for data_set in raw["dataset_configs"])
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
