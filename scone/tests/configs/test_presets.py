"""The named configurations hold what was promised, and every built-in trunk is one that transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from scone.configs.loading import Layer, load_options, merge
from scone.configs.presets import F_GRAM_CONFIGURATIONS, TRUNK_CONFIGURATIONS, trunk_configuration
from scone.configs.schema import ModelOptions
from scone.models.trunk import trunk_configuration as configured

REPOSITORY = Path(__file__).parents[3]


def test_f_gram_configurations_are_the_promised_ones():
    sizes = {"small": (384, 6, 6, 1536), "medium": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
    vocabularies = {"100k": (100_000, 100), "500k": (500_000, 50), "1m": (1_000_000, 20)}
    assert set(F_GRAM_CONFIGURATIONS) == {f"{size}-{count}" for size in sizes for count in vocabularies}
    for name, values in F_GRAM_CONFIGURATIONS.items():
        options, _ = merge([Layer("preset", values)])
        size, count = name.split("-")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        assert tuple(getattr(options.model.f_gram, each) for each in names) == sizes[size]
        assert (options.data.max_f_grams, options.data.min_freq, options.data.max_n) == (*vocabularies[count], 3)


def test_known_trunks_have_their_sizes():
    """By full and short name."""
    sizes = {
        "gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25),
        "distilgpt2": (768, 6, 12), "bert-base-uncased": (768, 12, 12), "bert-large-uncased": (1024, 24, 16),
    }  # fmt: skip
    configs = {name: AutoConfig.for_model(**trunk_configuration(name)) for name in sizes}
    assert {name: (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
            for name, config in configs.items()} == sizes  # fmt: skip
    for name in TRUNK_CONFIGURATIONS:
        assert trunk_configuration(name) is trunk_configuration(name.split("/")[1]) is TRUNK_CONFIGURATIONS[name]
    assert trunk_configuration("someone/unknown") is None


def test_the_modern_trunk_has_any_width(caplog):
    config = configured(ModelOptions(base_model_name="scone-modern", hidden_size=256, num_hidden_layers=4))
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("qwen3", 4, 4)
    assert (config.head_dim, config.intermediate_size, config.num_hidden_layers) == (64, 704, 4)
    config = configured(ModelOptions(base_model_name="scone-modern", hidden_size=96, num_attention_heads=3))
    assert (config.head_dim, config.num_key_value_heads) == (32, 3)
    ours = [record for record in caplog.records if record.name.startswith("scone")]
    assert ours == [], "nobody asks the hub for a name of ours"


def test_ready_yaml_files_hold_the_documented_values():
    if not (REPOSITORY / "configs").is_dir():
        pytest.skip("the ready YAML files are in the repository, not in an installed package")
    base = load_options(REPOSITORY / "configs" / "base_config.yaml")
    assert (base.model.hidden_size, base.model.num_hidden_layers, base.model.num_attention_heads) == (768, 12, 12)
    assert (base.model.intermediate_size, base.model.layer_norm_eps) == (3072, 1e-12)
    assert (base.training.learning_rate, base.inference.batch_size) == (5e-5, 32)
    large = load_options(REPOSITORY / "configs" / "large_config.yaml")
    assert large.model.base_model_name == "gpt2-large"
    assert (large.data.max_n, large.data.min_freq, large.data.max_f_grams) == (4, 50, 5_000_000)
    assert (large.training.batch_size, large.training.gradient_accumulation_steps) == (4, 4)
    assert (large.training.learning_rate, large.training.warmup_steps, large.training.fp16) == (3e-5, 1000, True)
