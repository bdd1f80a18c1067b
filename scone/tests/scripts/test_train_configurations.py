"""The report on a family of configurations, from what its runs leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from scone.configs.loading import from_mapping
from scone.models.accounting import f_gram_model_parameters, parameter_counts
from scone.models.configuration import SconeConfig
from scone.models.language_model import SconeForCausalLM
from scone.scripts.train_configurations import write_family_report
from scone.tests import tiny
from scone.utils.files import read_json, write_json


def finished(folder: Path, width: int, perplexity: float) -> SconeForCausalLM:
    """What the report reads of a finished run whose f-gram model has this width."""
    model = SconeForCausalLM.from_trunk(
        tiny.trunk(), tiny.vocabulary(), f_gram_model=tiny.F_GRAM_SIZES | {"hidden_size": width}, learned_rows=5
    )
    model.config.save_pretrained(folder / "final_model")
    log = {"final": {"eval_perplexity": perplexity}, "steps": 3, "tokens_per_step": 64}
    write_json(folder / "training_log.json", log | {"parameters": parameter_counts(model).to_dict()})
    return model


@pytest.mark.parametrize("limit", [None, 1000])
def test_the_report_shows_quality_over_the_size_of_the_f_gram_model(tmp_path, limit):
    widths = {"small-100k": 8, "medium-100k": 16}
    models = {name: finished(tmp_path / f"scone-{name}", width, 90.0 - width) for name, width in widths.items()}
    options = {
        name: from_mapping({"training": {"output_dir": str(tmp_path / f"scone-{name}"), "max_eval_tokens": limit}})
        for name in widths
    }
    write_family_report(tmp_path, options)
    page = (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    assert "Against the size of the f-gram model" in page
    assert ("the first 1,000 tokens of the validation split" in page) == (limit is not None)
    records = read_json(tmp_path / "benchmark.json")["records"]
    for record, model in zip(records, models.values(), strict=True):
        assert model.f_gram_embedding is not None
        assert model.f_gram_embedding.f_gram_model is not None
        weights = sum(weight.numel() for weight in model.f_gram_embedding.f_gram_model.parameters())
        assert record["f_gram_model_parameters"] == weights


def test_a_model_without_an_f_gram_model_has_no_parameters_of_one():
    assert f_gram_model_parameters(tiny.trunk().config) == 0
    assert f_gram_model_parameters(SconeConfig()) == 0
