"""Named configurations: the documented f-gram configurations, and the sizes of well-known trunks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_F_GRAM_MODELS = {  # hidden size, layers, heads, intermediate size
    "small": (384, 6, 6, 1536),
    "medium": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
_VOCABULARIES = {  # f-grams, fewest occurrences
    "100k": (100_000, 100),
    "500k": (500_000, 50),
    "1m": (1_000_000, 20),
}


F_GRAM_CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        f"{model}-{size}": {
            "data.max_n": 3,
            "data.min_freq": min_freq,
            "data.max_f_grams": max_f_grams,
            "model.f_gram.hidden_size": width,
            "model.f_gram.num_hidden_layers": layers,
            "model.f_gram.num_attention_heads": heads,
            "model.f_gram.intermediate_size": inner,
        }
        for model, (width, layers, heads, inner) in _F_GRAM_MODELS.items()
        for size, (max_f_grams, min_freq) in _VOCABULARIES.items()
    }
)
"""Name ("small-100k") → dotted option name → value."""


MODERN_TRUNK = "scone-modern"
"""Rotary positions, RMSNorm, normalised queries and keys, SwiGLU, no biases, output projections that start at zero."""
MODERN_RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "data.min_freq": 3,
        "model.input_norm": True,
        "training.optimizer": "muon",
        "training.learning_rate": 4e-3,
        "training.lr_scheduler_type": "cosine",
        "training.warmup_steps": 100,
        "training.weight_decay": 0.1,
    }
)
"""What is not given of these has these values where that trunk is trained from scratch (docs/experiments)."""


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads}


def _sized(model_type: str, width: int, layers: int, heads: int, inner: int, **rest: Any) -> dict[str, Any]:
    fields = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, **fields, "intermediate_size": inner, **rest}


_MODERN = {"max_position_embeddings": 2048, "num_key_value_heads": 8, "head_dim": 64}
TRUNK_CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "openai-community/gpt2": _gpt2(768, 12, 12),
        "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
        "openai-community/gpt2-large": _gpt2(1280, 36, 20),
        "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
        "distilbert/distilgpt2": _gpt2(768, 6, 12),
        "google-bert/bert-base-uncased": _sized("bert", 768, 12, 12, 3072, pad_token_id=0),
        "google-bert/bert-large-uncased": _sized("bert", 1024, 24, 16, 4096, pad_token_id=0),
        f"scone/{MODERN_TRUNK}": _sized("qwen3", 512, 8, 8, 1408, **_MODERN),
    }
)
"""Hub name → ``model_type`` in transformers and fields of its configuration, for training from scratch where the hub
cannot be reached. Others need it, or a folder.
"""


def trunk_configuration(name: str) -> Mapping[str, Any] | None:
    """The built-in architecture of a hub name or its short form ("gpt2"); None when there is none."""
    by_name = {full.lower(): trunk for full, trunk in TRUNK_CONFIGURATIONS.items()}
    by_short_name = {full.split("/")[1]: trunk for full, trunk in by_name.items()}
    return by_name.get(name.lower()) or by_short_name.get(name.lower())
