"""Arguments that several commands have, said once; each command names those that it takes."""

from __future__ import annotations

import argparse
from typing import Any

from scone.utils.errors import SconeError

ROW_TYPES = ("fp32", "fp16", "bf16", "int8", "int4")
SHARED: dict[str, dict[str, Any]] = {
    "model_path": {"required": True, "metavar": "FOLDER", "help": "the model: a final_model folder"},
    "embedding_cache_path": {
        "metavar": "FILE",
        "help": "its embedding table (default: compute f-gram embeddings live)",
    },
    "tokenizer_path": {"metavar": "FOLDER", "help": "tokenizer (default: the model's own)"},
    "placement": {"default": "ram", "help": "where the table is kept: ram, mmap, direct, or tiers"},
    "quantization": {"metavar": "TYPE", "help": "quantise the trunk: fp16, int8 or int4"},
    "group_size": {"type": int, "help": "values that share a scale in int8 and int4 rows (default: 64)"},
    "json": {"action": "store_true", "help": "print the result as JSON"},
}


def check_tokenizer(tokenizer: Any, vocabulary: Any, advice: str) -> None:
    """Refuse a tokenizer other than the one whose tokens the f-grams of ``vocabulary`` were counted on."""
    from scone.tokenization.tokenizers import tokenizer_fingerprint

    found, expected = tokenizer_fingerprint(tokenizer), vocabulary.tokenizer_fingerprint
    if expected and found != expected:
        raise SconeError(
            f"found a tokenizer with fingerprint {found[:12]}…; expected {expected[:12]}…, with which the f-grams were "
            f"counted; {advice}"
        )


def add_shared(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add the shared arguments that are named."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])
