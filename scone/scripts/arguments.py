"""The commands' own arguments: those that several have, said once, and how a command names its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scone.configs.schema import SconeOptions
from scone.utils.errors import SconeError

if TYPE_CHECKING:
    from scone.inference.engine import SconeInferenceEngine

ROW_TYPES = ("fp32", "fp16", "bf16", "int8", "int4")
SHARED: dict[str, dict[str, Any]] = {
    "model_path": {"required": True, "metavar": "FOLDER", "help": "the model: a final_model folder"},
    "embedding_cache_path": {"metavar": "FILE", "help": "its table (default: compute f-gram embeddings live)"},
    "tokenizer_path": {"metavar": "FOLDER", "help": "tokenizer (default: the model's own)"},
    "placement": {"default": "ram", "help": "where the table is kept: ram, mmap, direct, or tiers"},
    "quantization": {"metavar": "TYPE", "help": "quantise the trunk: fp16, int8 or int4"},
    "group_size": {"type": int, "help": "values that share a scale in int8 and int4 rows (default: 64)"},
    "json": {"action": "store_true", "help": "print the result as JSON"},
}


def arguments(*shared: str, **own: dict[str, Any]) -> Callable[[argparse._ActionsContainer], None]:
    """What adds the ``shared`` arguments that are named, and a command's ``own``: what argparse wants of each, by name
    (and ``positional`` for one without a flag).
    """

    def add(parser: argparse._ActionsContainer) -> None:
        for name, settings in ({name: SHARED[name] for name in shared} | own).items():
            flag = name if settings.get("positional") else f"--{name}"
            parser.add_argument(flag, **{key: value for key, value in settings.items() if key != "positional"})

    return add


def number(low: float, text: str, default: float | None = None, kind: type[int] | type[float] = int) -> dict[str, Any]:
    """An argument that is a number of at least ``low``; its help is ``text`` and the default."""

    def read(given: str) -> float:
        value = kind(given)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"found {given}; expected at least {low}")
        return value

    read.__name__ = "whole number" if kind is int else "number"  # argparse names it where the text is none
    shown = text if default is None else f"{text} (default: {default})"
    return {"type": read, "default": default, "metavar": "N" if kind is int else "X", "help": shown}


def switch(text: str) -> dict[str, Any]:
    """An argument that is given or not."""
    return {"action": "store_true", "help": text}


def load_engine(options: SconeOptions, extra: argparse.Namespace) -> SconeInferenceEngine:
    """Model, table and tokenizer as the arguments name them that `evaluate`, `generate` and `serve` share.

    Raises SconeError: a placement of no table, and what `SconeInferenceEngine.from_pretrained` refuses.
    """
    if extra.embedding_cache_path is None and extra.placement != SHARED["placement"]["default"]:
        raise SconeError(
            f"found --placement {extra.placement} without --embedding_cache_path; expected a table to place; give it, "
            "or leave --placement out"
        )
    from scone.inference.engine import SconeInferenceEngine

    return SconeInferenceEngine.from_pretrained(
        extra.model_path,
        extra.embedding_cache_path,
        "mmap" if options.inference.use_memory_map else extra.placement,
        extra.quantization,
        options.training.device,
        extra.tokenizer_path,
    )


def check_tokenizer(tokenizer: Any, vocabulary: Any, advice: str) -> None:
    """Refuse a tokenizer other than the one whose tokens the f-grams of ``vocabulary`` were counted on."""
    from scone.tokenization.tokenizers import tokenizer_fingerprint

    found, expected = tokenizer_fingerprint(tokenizer), vocabulary.tokenizer_fingerprint
    if expected and found != expected:
        raise SconeError(
            f"found a tokenizer with fingerprint {found[:12]}…; expected {expected[:12]}…, with which the f-grams were "
            f"counted; {advice}"
        )
