"""How large the demo is, and the options of its two trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from scone.configs.loading import Layer, merge
from scone.configs.presets import MODERN_TRUNK
from scone.configs.schema import SconeOptions


@dataclass(frozen=True)
class DemoOptions:
    """What the demo does, and how large. The sizes were chosen by experiment (docs/experiments/demo.md)."""

    data: str = "python-stdlib"
    text_column: str = "text"
    output_dir: str = "demo"
    minutes: float = 8.0
    steps: int = 420
    batch_size: int = 16
    max_length: int = 256
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 3
    max_n: int = 4
    max_f_grams: int = 300_000
    seed: int = 42
    num_evaluations: int = 4
    max_test_tokens: int = 200_000


QUICK = {
    "minutes": 2.0,
    "steps": 60,
    "batch_size": 8,
    "vocab_size": 2048,
    "max_f_grams": 50_000,
    "num_evaluations": 2,
    "max_test_tokens": 20_000,
}
"""What ``--quick`` changes: every step in about a minute; too short for the gain to be large."""

MAX_EVAL_TOKENS = 65_536
"""Validation text that a training reads each time: its cost must not depend on the corpus."""


def model_options(options: DemoOptions, name: str) -> SconeOptions:
    """What `scone train` makes of the modern trunk's recipe and the demo's sizes. The two trainings differ in the input
    embedding and the folder only.
    """
    folder = Path(options.output_dir)
    values = {
        "data.dataset_name": options.data,
        "data.text_column": options.text_column,
        "data.max_length": options.max_length,
        "data.max_n": options.max_n,
        "data.max_f_grams": options.max_f_grams,
        "data.cache_dir": str(folder / "cache"),
        "data.num_workers": 0,
        "model.base_model_name": MODERN_TRUNK,
        "model.hidden_size": options.hidden_size,
        "model.num_hidden_layers": options.num_hidden_layers,
        "model.tokenizer": "train",
        "model.vocab_size": options.vocab_size,
        "model.use_f_gram_embeddings": name == "scone",
        "model.learned_rows": options.max_f_grams,
        "training.output_dir": str(folder / name),
        "training.max_steps": options.steps,
        "training.batch_size": options.batch_size,
        "training.warmup_steps": max(1, options.steps // 12),
        "training.logging_steps": max(1, options.steps // 40),
        "training.eval_steps": max(1, options.steps // options.num_evaluations),
        "training.max_eval_tokens": MAX_EVAL_TOKENS,
        "training.save_steps": -(-options.steps // 2),  # a demo that is stopped goes on from here
        "training.save_total_limit": 1,
        "training.seed": options.seed,
        "training.device": "cpu",
        "training.report_to": "none",
    }
    if not hasattr(torch.optim, "Muon"):
        values["training.optimizer"] = "adamw"
    return merge([Layer("the demo", values)])[0]
