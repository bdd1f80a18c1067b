"""Named configurations: the documented f-gram configurations, and the sizes of well-known trunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def _f_gram_configuration(model: str, vocabulary: str) -> Mapping[str, Any]:
    hidden_size, layers, heads, intermediate_size = _F_GRAM_MODELS[model]
    max_f_grams, min_freq = _VOCABULARIES[vocabulary]
    return MappingProxyType(
        {
            "data.max_n": 3,
            "data.min_freq": min_freq,
            "data.max_f_grams": max_f_grams,
            "model.f_gram.hidden_size": hidden_size,
            "model.f_gram.num_hidden_layers": layers,
            "model.f_gram.num_attention_heads": heads,
            "model.f_gram.intermediate_size": intermediate_size,
        }
    )


F_GRAM_CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {f"{model}-{size}": _f_gram_configuration(model, size) for model in _F_GRAM_MODELS for size in _VOCABULARIES}
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


@dataclass(frozen=True)
class TrunkConfiguration:
    """An architecture by its ``model_type`` in transformers and the ``fields`` of its configuration."""

    model_type: str
    fields: Mapping[str, Any]


def _gpt2(width: int, layers: int, heads: int) -> TrunkConfiguration:
    return TrunkConfiguration("gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads})


def _sized(
    model_type: str, width: int, layers: int, heads: int, intermediate: int, positions: int = 0, **rest: Any
) -> TrunkConfiguration:
    fields = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    fields |= {"intermediate_size": intermediate} | ({"max_position_embeddings": positions} if positions else {})
    return TrunkConfiguration(model_type, fields | rest)


def _smol(width: int, layers: int, heads: int, kv: int, inner: int, positions: int, theta: float) -> TrunkConfiguration:
    rest: dict[str, Any] = {
        "vocab_size": 49152,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    sizes = (width, layers, heads, inner, positions)
    return _sized("llama", *sizes, num_key_value_heads=kv, tie_word_embeddings=True, **rest)


def _qwen2(positions: int) -> TrunkConfiguration:
    rest: dict[str, Any] = {"vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    rest |= {"bos_token_id": 151643, "eos_token_id": 151643}
    return _sized("qwen2", 896, 24, 14, 4864, positions, num_key_value_heads=2, **rest)


_TINY_LLAMA = _sized(
    *("llama", 2048, 22, 32, 5632, 2048),
    num_key_value_heads=4,
    vocab_size=32000,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
)
_LLAMA_3_1B = _sized(
    *("llama", 2048, 16, 32, 8192, 131072),
    num_key_value_heads=8,
    vocab_size=128256,
    head_dim=64,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_id=128001,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
TRUNK_CONFIGURATIONS: Mapping[str, TrunkConfiguration] = MappingProxyType(
    {
        "openai-community/gpt2": _gpt2(768, 12, 12),
        "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
        "openai-community/gpt2-large": _gpt2(1280, 36, 20),
        "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
        "distilbert/distilgpt2": _gpt2(768, 6, 12),
        "google-bert/bert-base-uncased": _sized("bert", 768, 12, 12, 3072, pad_token_id=0),
        "google-bert/bert-large-uncased": _sized("bert", 1024, 24, 16, 4096, pad_token_id=0),
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY_LLAMA,
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINY_LLAMA,
        "TinyLlama/TinyLlama_v1.1": _TINY_LLAMA,
        "HuggingFaceTB/SmolLM-135M": _smol(576, 30, 9, 3, 1536, 2048, 1e4),
        "HuggingFaceTB/SmolLM-360M": _smol(960, 32, 15, 5, 2560, 2048, 1e4),
        "HuggingFaceTB/SmolLM2-135M": _smol(576, 30, 9, 3, 1536, 8192, 1e5),
        "HuggingFaceTB/SmolLM2-360M": _smol(960, 32, 15, 5, 2560, 8192, 1e5),
        "Qwen/Qwen2-0.5B": _qwen2(131072),
        "Qwen/Qwen2.5-0.5B": _qwen2(32768),
        "meta-llama/Llama-3.2-1B": _LLAMA_3_1B,
        f"scone/{MODERN_TRUNK}": _sized("qwen3", 512, 8, 8, 1408, 2048, num_key_value_heads=8, head_dim=64),
    }
)
"""Hub name → architecture, for training from scratch where the hub cannot be reached."""


def trunk_configuration(name: str) -> TrunkConfiguration | None:
    """The built-in architecture of a hub name or its short form ("gpt2", "Qwen2-0.5B"); None when there is none."""
    by_name = {full.lower(): trunk for full, trunk in TRUNK_CONFIGURATIONS.items()}
    by_short_name = {full.split("/")[1]: trunk for full, trunk in by_name.items()}
    return by_name.get(name.lower()) or by_short_name.get(name.lower())
