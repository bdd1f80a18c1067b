"""SCONE: scale a language model's input embeddings with frequent n-grams, at fixed inference cost.

The public names are loaded on first use, so that ``import scone`` and ``scone --help`` stay instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "EmbeddingTable": "scone.inference.embedding_table",
    "FGramVocabulary": "scone.tokenization.f_gram_vocabulary",
    "Matcher": "scone.tokenization.matcher",
    "RowOptimizer": "scone.training.optimizer",
    "SconeConfig": "scone.models.configuration",
    "SconeError": "scone.utils.errors",
    "SconeForCausalLM": "scone.models.language_model",
    "SconeInferenceEngine": "scone.inference.engine",
    "count_f_grams": "scone.tokenization.counting",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'scone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
