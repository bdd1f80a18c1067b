"""Arguments that several commands have, said once; each command names those that it takes."""

from __future__ import annotations

import argparse
from typing import Any

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


def add_shared(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add the shared arguments that are named."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])
